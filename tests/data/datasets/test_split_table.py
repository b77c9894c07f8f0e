"""A table of paths and labels becomes train/ and val/."""

import csv
import json

import pytest

from support.commands import rsb
from trainer.base.errors import DataError
from trainer.data.dataset import open_data
from trainer.data.datasets.split import split_folder, split_name, split_table
from trainer.data.index import open_index
from trainer.data.profile import find_profile

NUMBERS = {"rose": 10, "iris": 5}


@pytest.fixture
def photos(make_folder):
    """photos/<class>/<number>.jpg"""
    return make_folder(name="all", photos=NUMBERS) / "photos"


def write(path, *rows, head="path,label"):
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([head.split(","), *rows])
    return path


def images(root):
    return [(f"{name}/{i}.jpg", name) for name, number in NUMBERS.items() for i in range(number)]


def names(folder, split):
    found = open_index(folder, split)
    return {found.name(i).decode() for i in range(found.num_images)}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_is_split_as_its_images_in_class_folders_would_be(photos, tmp_path, suffix):
    table = photos / f"labels{suffix}"
    if suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        paths, labels = zip(*images(photos), strict=True)
        parquet.write_table(arrow.table({"path": paths, "label": labels}), table)
    else:
        write(table, *images(photos))
    counts = split_table(table, tmp_path / "a", 0.2)
    assert counts == split_folder(photos, tmp_path / "b", 0.2) == {"train": 12, "val": 3}
    for split in ("train", "val"):
        assert names(tmp_path / "a", split) == names(tmp_path / "b", split)
    a, b = (open_data(find_profile(str(tmp_path / one)), tmp_path / one) for one in "ab")
    assert a.fingerprint == b.fingerprint and a.split.startswith("val (0.2 of each class")


def test_a_column_says_the_split_and_test_is_left_out_where_there_is_val(photos, tmp_path):
    places = ["train", "Valid", "test"]
    rows = [(path, label, places[i % 3]) for i, (path, label) in enumerate(images(photos))]
    table = write(photos / "labels.csv", *rows, head="file,class,split")
    assert split_table(table, tmp_path / "a", 0.2) == {"train": 5, "val": 5, "left_out": 5}
    assert names(tmp_path / "a", "train") == {path for path, _, split in rows if split == "train"}
    assert "labels.csv" in open_data(find_profile(str(tmp_path / "a")), tmp_path / "a").split
    two = [(path, label, "train" if i % 3 else "test") for i, (path, label, _) in enumerate(rows)]
    table = write(photos / "two.csv", *two, head="path,label,split")
    assert split_table(table, tmp_path / "b", 0.2) == {"train": 10, "val": 5}
    assert json.loads((tmp_path / "b/split.json").read_text())["column"] == "two.csv"


def test_two_files_of_a_name_in_one_class_keep_their_paths(make_folder, tmp_path):
    root = make_folder(name="all", a={"x": 2}, b={"x": 2, "y": 2})
    rows = [(f"{folder}/x/{i}.jpg", "cat") for folder in "ab" for i in (0, 1)]
    table = write(root / "labels.csv", *rows, ("b/y/0.jpg", "dog"), ("b/y/1.jpg", "dog"))
    split_table(table, tmp_path / "out", 0.5)
    found = names(tmp_path / "out", "train") | names(tmp_path / "out", "val")
    cats = {f"cat/{folder}__x__{i}.jpg" for folder in "ab" for i in (0, 1)}
    assert found == cats | {"dog/0.jpg", "dog/1.jpg"}


@pytest.mark.parametrize(
    ("head", "row", "place"),
    [
        ("path,name", ("rose/0.jpg", "rose"), "no column label"),
        ("path,label", ("rose/77.jpg", "rose"), "labels.csv:3: "),
        ("path,label", ("rose/0.jpg", "rose"), "labels.csv:3: "),  # twice
        ("path,label", ("rose/1.jpg", ""), "labels.csv:3: "),
        ("path,label", ("rose/1.jpg", "../rose"), "labels.csv:3: "),
        ("path,label", ("rose/1.jpg", "rose", "x"), "labels.csv:3: "),
        ("path,label", ("notes.txt", "rose"), "labels.csv:3: "),
        ("path,label", ("iris/0.jpg", "iris"), "one image only"),
    ],
)
def test_what_a_table_cannot_say_is_refused_at_its_line(photos, tmp_path, head, row, place):
    (photos / "notes.txt").touch()
    table = write(photos / "labels.csv", ("rose/0.jpg", "rose"), row, head=head)
    with pytest.raises(DataError) as refused:
        split_table(table, tmp_path / "out", 0.2)
    assert place in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_split_is_refused_at_its_line(photos, tmp_path):
    rows = [("rose/0.jpg", "rose", "train"), ("rose/1.jpg", "rose", "holdout")]
    table = write(photos / "labels.csv", *rows, head="path,label,split")
    with pytest.raises(DataError, match=r"labels.csv:3: split 'holdout'"):
        split_table(table, tmp_path / "out", 0.2)


def test_a_table_as_data_names_the_command_that_splits_it(photos):
    table = write(photos / "labels.csv", *images(photos))
    with pytest.raises(DataError) as refused:
        find_profile(str(table))
    assert "split" in refused.value.hint and str(split_name(table)) in refused.value.hint
    done = rsb("split", "--data", table)
    assert done.exit_code == 0, done.output
    assert find_profile(str(split_name(table))).num_val == 3


def test_images_named_alike_elsewhere_are_all_of_the_class(make_folder, tmp_path):
    """The table lies in a folder of its own, so that their paths begin with two points."""
    make_folder(name="imgs", a={"x": 6}, b={"x": 6})
    (tmp_path / "lists").mkdir()
    paths = [f"../imgs/{part}/x/{i}.jpg" for part in "ab" for i in range(6)]
    table = write(tmp_path / "lists/labels.csv", *((path, "x") for path in paths))
    counts = split_table(table, tmp_path / "out", 0.3)
    assert sum(counts.values()) == 12
    assert len(names(tmp_path / "out", "train")) == counts["train"]
    assert len(names(tmp_path / "out", "val")) == counts["val"]


def test_one_file_by_two_paths_is_refused(photos, tmp_path):
    rows = [("rose/1.jpg", "rose"), ("rose/2.jpg", "rose"), ("rose/../rose/1.jpg", "rose")]
    with pytest.raises(DataError, match="line 2 too"):
        split_table(write(photos / "labels.csv", *rows), tmp_path / "out", 0.2)


def test_a_column_without_a_val_row_is_refused_before_a_folder_is_made(photos, tmp_path):
    rows = [(path, label, "train") for path, label in images(photos)]
    table = write(photos / "labels.csv", *rows, head="path,label,split")
    with pytest.raises(DataError, match="no row of val"):
        split_table(table, tmp_path / "out", 0.2)
    assert not (tmp_path / "out").exists()
