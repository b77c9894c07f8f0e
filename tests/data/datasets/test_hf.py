"""Folders that `datasets` wrote: which splits, how they are read, and what is refused."""

import json
import sys

import datasets
import pytest

from trainer.base.errors import DataError
from trainer.data.dataset import open_data
from trainer.data.datasets import hf
from trainer.data.datasets.packed import open_files
from trainer.data.profile import find_profile

ROWS = [("dog", "b.jpg", b"22"), ("cat", "a.jpg", b"1"), ("cat", "c.jpg", b"333")]
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
)


def dataset_of(rows=ROWS, features=FEATURES):
    return datasets.Dataset.from_list(
        [{"image": {"bytes": row[2], "path": row[1]}, "label": row[0]} for row in rows],
        features=features,
    )


def write(root, train=None, val=None, name="validation"):
    train = dataset_of() if train is None else train
    datasets.DatasetDict(
        {"train": train, name: train if val is None else val, "test": dataset_of(ROWS[:1])}
    ).save_to_disk(str(root))
    return root


def contents(index):
    return [
        (index.classes[index.labels[i]], index.name(i).decode(), index.content(i))
        for i in range(index.num_images)
    ]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_rows_are_read_in_the_order_of_the_class_labels(tmp_path, name):
    root = write(tmp_path / "set", val=dataset_of(ROWS[:2]), name=name)
    assert contents(open_files(root, "train")) == [
        ("dog", "dog/b.jpg", b"22"),
        ("cat", "cat/a.jpg", b"1"),
        ("cat", "cat/c.jpg", b"333"),
    ]
    assert open_files(root, "val").num_images == 2


def test_a_shuffled_selection_is_read_as_it_was_saved(tmp_path):
    train = dataset_of(ROWS * 5).shuffle(seed=1).select(range(9))
    found = open_files(write(tmp_path / "set", train, dataset_of()), "train")
    expected = [FEATURES["label"].int2str(label) for label in train["label"]]
    assert sorted(row[0] for row in contents(found)) == sorted(expected)
    assert all((row[0], row[1].partition("/")[2], row[2]) in ROWS for row in contents(found))


def test_many_record_batches_are_mapped_not_read(tmp_path):
    import pyarrow

    rows = [("cat" if i % 3 else "dog", f"{i:04d}", bytes([i % 256]) * 5000) for i in range(2500)]
    index = open_files(write(tmp_path / "set", dataset_of(rows), dataset_of()), "train")
    assert len(index._reader._cells._chunks) > 1
    before = pyarrow.total_allocated_bytes()
    for i in range(0, 2500, 7):
        number = int(index.name(i).decode().partition("/")[2])
        assert index.content(i) == bytes([number % 256]) * 5000
    assert pyarrow.total_allocated_bytes() - before < 2**20  # of 12 MB


def test_what_datasets_writes_as_parquet_is_the_same_set(tmp_path):
    root = write(tmp_path / "set", dataset_of(ROWS * 50), dataset_of())
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for word in ("train", "validation"):
        datasets.load_from_disk(str(root / word)).to_parquet(
            str(hub / f"data/{word}-00000-of-00001.parquet")
        )
    for split in ("train", "val"):
        saved, ours = open_files(root, split), open_files(hub, split)
        assert (ours.classes, ours.fingerprint) == (
            saved.classes,
            saved.fingerprint,
        ) and ours.classes == ("dog", "cat")
        assert contents(ours) == contents(saved)


def _without(feature):
    return dataset_of().remove_columns(feature)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda: _without("label"), "0 label columns among image; "),
        (lambda: _without("image"), "0 image columns among label; "),
        (
            lambda: (
                dataset_of(
                    ROWS,
                    datasets.Features(
                        {"image": datasets.Image(), "label": datasets.Value("string")}
                    ),
                )
                .add_column("extra", [1.5] * 3)
                .rename_column("label", "name")
                .rename_column("extra", "label")
            ),
            "label has type double; ",
        ),
    ],
    ids=["no label", "no image", "no classes"],
)
def test_sets_without_images_or_labels_are_refused_in_one_line(tmp_path, train, message):
    write(tmp_path / "set", train())
    with pytest.raises(DataError) as refused:
        find_profile(str(tmp_path / "set"))
    text = str(refused.value)
    assert text.startswith(str(tmp_path)) and message in text and "; " in text and "\n" not in text


def test_one_split_alone_is_refused(tmp_path):
    dataset_of().save_to_disk(str(tmp_path / "set"))
    with pytest.raises(
        DataError, match="one split only; use a DatasetDict with train and val or validation"
    ):
        find_profile(str(tmp_path / "set"))


def test_test_stands_for_a_validation_that_is_not_there(tmp_path):
    datasets.DatasetDict({"train": dataset_of(), "test": dataset_of()}).save_to_disk(
        str(tmp_path / "set")
    )
    data = open_data(find_profile(str(tmp_path / "set")), tmp_path / "set")
    assert data.split == "test" and data.val.num_images == data.train.num_images


def test_a_set_without_validation_is_refused(tmp_path):
    datasets.DatasetDict({"train": dataset_of()}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(
        DataError, match="a datasets folder without val; use a val/ that save_to_disk wrote"
    ):
        find_profile(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{}" * 20]
)
@pytest.mark.parametrize(
    "pattern", ["train/*.arrow", "train/state.json", "train/dataset_info.json"]
)
def test_a_damaged_folder_is_named(tmp_path, pattern, damage):
    root = write(tmp_path / "set")
    (path,) = root.glob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as refused:
        open_files(root, "train")
    text = str(refused.value)
    assert text.startswith(str(root)) and "; " in text and "\n" not in text


def test_a_folder_that_names_files_elsewhere_is_refused(tmp_path):
    root, other = write(tmp_path / "set"), write(tmp_path / "other")
    (arrow,) = (other / "train").glob("*.arrow")
    for name in (str(arrow), f"../../other/train/{arrow.name}"):
        (root / "train/state.json").write_text(
            json.dumps(
                json.loads((other / "train/state.json").read_text())
                | {"_data_files": [{"filename": name}]}
            )
        )
        with pytest.raises(DataError, match=r"damaged .*outside the folder"):
            open_files(root, "train")


def test_without_datasets_one_line_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r'which is not installed; run .venv/bin/python -m pip install "rsb\[hf\]"'
    ):
        find_profile(str(tmp_path / "set"))
    assert hf.Reader  # the module itself needs no library
