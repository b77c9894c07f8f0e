"""Parquet files: which columns, what stays in memory, and what is refused."""

import sys

import pyarrow
import pyarrow.parquet
import pytest

from support import packing
from trainer.base.errors import DataError
from trainer.data.datasets import parquet
from trainer.data.datasets.packed import open_files
from trainer.data.profile import find_profile

ROWS = [("cat", "a.jpg", b"1"), ("dog", "b.jpg", b"22"), ("cat", None, b"333")]


def write(root, train, val=None, **how):
    root.mkdir(exist_ok=True)
    for split, table in (("train", train), ("validation", val if val is not None else train)):
        pyarrow.parquet.write_table(table, root / f"{split}.parquet", **how)
    return root


def contents(index):
    return [
        (index.classes[index.labels[i]], index.name(i).decode(), index.content(i))
        for i in range(index.num_images)
    ]


@pytest.mark.parametrize("is_struct", [True, False])
def test_images_are_structs_or_bytes_and_nameless_ones_are_called_by_their_row(tmp_path, is_struct):
    found = contents(open_files(write(tmp_path, packing.table_of(ROWS, None, is_struct)), "train"))
    names = ("a.jpg", "b.jpg") if is_struct else ("000000000", "000000001")
    expected = [
        ("cat", f"cat/{names[0]}", b"1"),
        ("cat", "cat/000000002", b"333"),
        ("dog", f"dog/{names[1]}", b"22"),
    ]
    assert sorted(found) == sorted(expected)


def test_classes_are_in_the_order_of_the_class_labels(tmp_path):
    found = open_files(write(tmp_path, packing.table_of(ROWS, ["dog", "cat"])), "train")
    assert found.classes == ("dog", "cat") and [row[0] for row in contents(found)] == [
        "dog",
        "cat",
        "cat",
    ]


def test_numbers_and_categories_are_labels_too(tmp_path):
    images = pyarrow.array([row[2] for row in ROWS], pyarrow.large_binary())
    categories = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    for name, labels, classes in (
        ("labels", [1, 0, 1], ("0", "1")),
        ("label", categories, ("a", "b")),
        ("fine_label", [0, 1, 2], ("0", "1", "2")),
    ):
        table = pyarrow.table(
            {"img": images, "id": [5, 6, 7], name: labels, "coarse_label": [0, 0, 0]}
        )
        assert open_files(write(tmp_path / name, table), "train").classes == classes


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_memory_stays_flat_over_an_epoch(tmp_path, monkeypatch, codec):
    import random

    rng = random.Random(0)
    rows = [("cat" if i % 2 else "dog", f"{i:04d}", rng.randbytes(20_000)) for i in range(400)]
    root = write(
        tmp_path,
        packing.table_of(rows, None),
        packing.table_of(rows[:2], None),
        row_group_size=20,
        compression=codec,
    )
    monkeypatch.setattr(parquet, "_HELD_BYTES", 900_000)  # two groups
    index = open_files(root, "train")
    before, most = pyarrow.total_allocated_bytes(), 0
    for i in rng.sample(range(400), 200):
        name, content = index.name(i).decode(), index.content(i)
        assert content == rows[int(name.partition("/")[2])][2]
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 2_000_000  # of 8 million


def test_repeats_and_neighbours_do_not_read_their_group_again(tmp_path, monkeypatch):
    rows = [("cat" if i % 2 else "dog", f"{i:04d}", b"x") for i in range(40)]
    index = open_files(write(tmp_path, packing.table_of(rows, None), row_group_size=10), "train")
    read = []
    real = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, i, **how: read.append(i) or real(self, i, **how),
    )
    for _ in range(3):
        for i in range(40):
            index.content(i)
    assert sorted(read) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": [b"1"], "size": [3]}, "0 label columns among image, size; "),
        ({"label": [0], "size": [3]}, "0 image columns among label, size; "),
        (
            {"one": [b"1"], "two": [b"2"], "label": [0]},
            "2 image columns among one, two, label; ",
        ),
        ({"image": [b"1"], "label": [0.5]}, "label has type double; "),
        ({"image": [b"1"], "label": [True]}, "label has type bool; "),
        ({"image": [b"1", b"2"], "label": [0, None]}, "row 1 has no label; "),
        ({"image": [b"1", None], "label": [0, 1]}, "row 1 has no image bytes (None); "),
        ({"image": ["1.jpg"], "label": [0]}, "0 image columns among image, label; "),
    ],
)
def test_tables_without_images_or_labels_are_refused_in_one_line(tmp_path, table, message):
    write(tmp_path, pyarrow.table(table))
    with pytest.raises(DataError) as refused:
        find_profile(str(tmp_path))
    text = str(refused.value)
    assert text.startswith(str(tmp_path)) and message in text and "; " in text and "\n" not in text


def test_an_image_that_is_only_a_path_is_not_opened(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    images = pyarrow.array(
        [{"bytes": None, "path": str(tmp_path / "secret.jpg")}], packing.image_type()
    )
    with pytest.raises(DataError, match=r"row 0 has no image bytes \(.*secret.jpg\); "):
        open_files(write(tmp_path, pyarrow.table({"image": images, "label": [0]})), "train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b[: len(b) // 3] + b"\xff" * (len(b) * 2 // 3 - 8) + b[-8:],
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    write(tmp_path, packing.table_of(ROWS, None))
    path = tmp_path / "validation.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as refused:
        open_files(tmp_path, "train")
    text = str(refused.value)
    assert (
        text.startswith(f"{path}: damaged (")
        and text.endswith("; download the file again")
        and "\n" not in text
    )


def test_groups_that_a_worker_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_LARGEST_GROUP_MIB", 0.00001)
    with pytest.raises(DataError, match=r"a row group of 0 MiB, .*row_group_size=100"):
        open_files(write(tmp_path, packing.table_of(ROWS, None)), "train")


def test_files_that_name_their_classes_differently_are_refused(tmp_path):
    write(tmp_path, packing.table_of(ROWS, ["cat", "dog"]), packing.table_of(ROWS, ["dog", "cat"]))
    with pytest.raises(DataError, match="class names differ"):
        open_files(tmp_path, "train")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from trainer.cli.main import app

    write(tmp_path, packing.table_of(ROWS, None))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = CliRunner().invoke(app, ["check-data", "--data", str(tmp_path)])
    assert done.exit_code == 2
    assert (
        'pyarrow, which is not installed; run .venv/bin/python -m pip install "rsb[parquet]"'
        in " ".join(done.output.split())
    )
