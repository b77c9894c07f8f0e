"""A folder of class folders without train/ and val/ becomes one with them."""

import hashlib
import json
import shlex

import pytest

from support.commands import rsb
from trainer.base.errors import DataError, UserError
from trainer.data.dataset import open_data
from trainer.data.datasets.split import split_folder, split_name
from trainer.data.index import open_index
from trainer.data.profile import find_profile


@pytest.fixture
def flat(make_folder):
    """photos/<class>/: 10, 5 and 2 images."""
    root = make_folder(name="all", photos={"rose": 10, "iris": 5, "lily": 2})
    return root / "photos"


def names(folder, split):
    found = open_index(folder, split)
    return {found.name(i).decode() for i in range(found.num_images)}


def test_each_class_gives_its_share_by_the_hash_of_its_names(flat, tmp_path):
    out = tmp_path / "out"
    assert split_folder(flat, out, 0.2) == {"train": 8 + 4 + 1, "val": 2 + 1 + 1}
    expected = set()
    for name, num_val in (("rose", 2), ("iris", 1), ("lily", 1)):
        paths = [f"{name}/{path.name}" for path in (flat / name).iterdir()]
        paths.sort(key=lambda path: hashlib.sha256(path.encode()).hexdigest())
        expected |= set(paths[:num_val])
    assert names(out, "val") == expected
    assert len(names(out, "train") | expected) == 17 and not names(out, "train") & expected
    facts = json.loads((out / "split.json").read_text())
    assert facts["val_share"] == 0.2 and (facts["train"], facts["val"]) == (13, 4)


def test_the_same_images_elsewhere_are_split_the_same(flat, tmp_path, make_folder):
    other = make_folder(name="again", photos={"lily": 2, "rose": 10, "iris": 5}) / "photos"
    for root, out in ((flat, tmp_path / "a"), (other, tmp_path / "b")):
        split_folder(root, out, 0.3)
    assert names(tmp_path / "a", "val") == names(tmp_path / "b", "val")


def test_the_row_says_by_which_rule_its_images_were_split(flat, tmp_path, make_folder):
    split_folder(flat, tmp_path / "out", 0.2)
    made = open_data(find_profile(str(tmp_path / "out")), tmp_path / "out")
    assert made.split.startswith("val (0.2 of each class")
    other = make_folder(name="other", train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    for content in ("", "{}", "[]", '{"val_share": "x"}', '{"val_share": null}'):
        (other / "split.json").write_text(content)  # somebody else's
        assert open_data(find_profile(str(other)), other).split == "val"


def test_splits_of_other_names_are_those_of_their_usual_ones(make_folder, tmp_path):
    """The same images, labels and fingerprint as under train/ and val/; timm's --train-split and
    --val-split.
    """
    splits = {"a": {"rose": 3, "iris": 2}, "b": {"rose": 1, "iris": 1}}
    root = make_folder(name="named", learn=splits["a"], holdout=splits["b"], test=splits["b"])
    usual = make_folder(name="usual", train=splits["a"], val=splits["b"])
    done = rsb("split", "--data", root, "--train-split", "learn", "--val_split", "holdout")
    assert done.exit_code == 0, done.output
    made = open_data(find_profile(str(split_name(root))), split_name(root))
    plain = open_data(find_profile(str(usual)), usual)
    assert made.fingerprint == plain.fingerprint and made.classes == ("iris", "rose")
    assert "holdout" in made.split and plain.split == "val"
    for split, folder in (("train", "learn"), ("val", "holdout")):
        found = open_index(split_name(root), split)
        for i in range(found.num_images):
            assert found.path(i).resolve() == (root / folder / found.name(i).decode()).resolve()
    again = rsb("split", "--data", root, "--train-split", "learn", "--out", tmp_path / "other")
    assert (
        again.exit_code == 0
        and "test" in open_data(find_profile(str(tmp_path / "other")), tmp_path / "other").split
    )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--train-split", "lern"], "train_split=lern"),
        (["--train-split", "a", "--val-split", "a"], "val_split=a"),
        (["--train-split", "a", "--out", "named/a/out"], "named/a/out"),
        (["--train-split", "a", "--val-split", "b"], "empty"),
    ],
)
def test_splits_that_cannot_be_are_one_line(make_folder, tmp_path, monkeypatch, words, found):
    root = make_folder(name="named", a={"rose": 2, "iris": 2}, val={"rose": 1, "iris": 1})
    (root / "b" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = rsb("split", "--data", "named", *words)
    assert done.exit_code == 2 and found in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named"]


def test_a_new_image_moves_at_most_one_other(flat, tmp_path):
    split_folder(flat, tmp_path / "before", 0.2)
    (flat / "rose" / "new.jpg").write_bytes((flat / "rose" / "0.jpg").read_bytes())
    split_folder(flat, tmp_path / "after", 0.2)
    before, after = (names(tmp_path / name, "val") for name in ("before", "after"))
    assert len(before - after) <= 1


def test_training_on_a_flat_folder_names_the_command_that_splits_it(flat):
    with pytest.raises(DataError) as refused:
        find_profile(str(flat))
    line = str(refused.value)
    printed = line.split("`")[1]
    name, *words = shlex.split(printed)[1:]
    done = rsb(name, *(part for word in words for part in _option(word)))
    assert done.exit_code == 0, done.stderr
    assert str(split_name(flat)) in line and "\n" not in line
    assert find_profile(str(split_name(flat))).num_val == 4


def _option(word):
    name, _, value = word.partition("=")
    return f"--{name}", value


@pytest.mark.parametrize("name", ["train", "Train", "notes"])
def test_folders_that_look_alike_are_refused_as_before(make_folder, name):
    root = make_folder(train={"a": 1, "b": 1})
    (root / "train").rename(root / name)
    with pytest.raises(DataError) as refused:
        find_profile(str(root))
    assert "class folders" not in str(refused.value)


def test_what_cannot_be_split_is_refused_and_leaves_nothing(flat, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        split_folder(flat, tmp_path / "there", 0.2)
    with pytest.raises(UserError, match="lies in"):
        split_folder(flat, flat / "split", 0.2)
    (flat / "lily" / "0.jpg").unlink()
    with pytest.raises(DataError, match="lily: one image only"):
        split_folder(flat, tmp_path / "out", 0.2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--share", "1.5"), "share=1.5"),
        (("--share", "0"), "share=0"),
        (("--data", "/no/such/folder"), "no such folder"),
        (("--data", ""), "no folder"),
    ],
)
def test_a_wrong_word_is_one_line(flat, words, found):
    done = rsb("split", *(() if "--data" in words else ("--data", flat)), *words)
    assert done.exit_code == 2 and found in done.stderr and done.stderr.count("\n") == 1


def test_a_split_is_made_anew_where_images_came_and_nothing_else_is(flat, tmp_path):
    out = tmp_path / "out"
    assert split_folder(flat, out, 0.2)["train"] == 13
    (flat / "rose" / "new.jpg").write_bytes((flat / "rose" / "0.jpg").read_bytes())
    with pytest.raises(UserError, match="again=1"):
        split_folder(flat, out, 0.2)
    assert rsb("split", "--data", flat, "--out", out, "--again").exit_code == 0
    assert len(names(out, "train") | names(out, "val")) == 18
    (out / "train" / "rose" / "mine.jpg").write_bytes(b"mine")  # no link
    with pytest.raises(UserError) as refused:
        split_folder(flat, out, 0.2, is_again=True)
    assert "again" not in refused.value.hint and (out / "train/rose/mine.jpg").exists()


@pytest.mark.parametrize("names", [("training", "testing"), ("Training", "Validation")])
def test_folders_named_like_splits_are_no_classes(make_folder, names):
    root = make_folder(**{name: {"a": 2, "b": 2} for name in names})
    done = rsb("split", "--data", root)
    assert done.exit_code == 2 and "rename" in done.stderr
    for name in names:  # nor are they where images lie in them
        (root / name / "0.jpg").write_bytes((root / name / "a" / "0.jpg").read_bytes())
    done = rsb("split", "--data", root)
    assert done.exit_code == 2 and not split_name(root).exists()
