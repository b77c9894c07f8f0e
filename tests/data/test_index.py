"""The index: what it lists, when it is stale, what it costs, what it refuses."""

import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from trainer.base.errors import DataError
from trainer.data import content as contents
from trainer.data import image_folder, index
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import FolderSet
from trainer.data.datasets.packed import open_files
from trainer.data.image_folder import is_image_folder
from trainer.data.index import ARRAYS, Index, open_index, store_index
from trainer.data.profile import find_profile

TWO_CLASSES = {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}


def test_lists_every_image_once_with_its_class_and_size(make_folder):
    root = make_folder(**TWO_CLASSES)
    (root / "train/cat/deeper").mkdir()
    shutil.copy(root / "train/cat/0.jpg", root / "train/cat/deeper/x.JPEG")
    for ignored in ("train/cat/notes.txt", "train/cat/._0.jpg", "train/stray.jpg"):
        (root / ignored).write_bytes(b"x")
    (root / "train/.hidden").mkdir()

    found = open_index(root, "train")

    listed = {
        found.path(i): (found.classes[found.labels[i]], found.sizes[i])
        for i in range(found.num_images)
    }
    names = ["cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "cat/deeper/x.JPEG", "dog/0.jpg", "dog/1.jpg"]
    paths = [root / "train" / name for name in names]
    assert list(listed) == paths
    assert listed == {
        path: (path.relative_to(root / "train").parts[0], path.stat().st_size) for path in paths
    }
    assert found.classes == ("cat", "dog")


def test_names_beyond_ascii_come_back_as_they_lie_on_the_disk(make_folder):
    root = make_folder(**TWO_CLASSES)
    for name in ("Bär.png".encode(), b"\xff\xfe.png"):
        (root / "train/dog" / os.fsdecode(name)).write_bytes(b"x")
    found = open_index(root, "train")
    assert {found.path(i) for i in range(found.num_images)} == set((root / "train").glob("*/*"))


def test_validation_serves_as_val(make_folder):
    root = make_folder(train={"a": 1, "b": 1}, validation={"a": 2, "b": 1})
    assert open_index(root, "val").num_images == 3


def test_an_unchanged_folder_is_not_listed_again(make_folder, settle, monkeypatch):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    first = open_index(root, "train")
    monkeypatch.setattr(index, "build_index", lambda *_: pytest.fail("listed again"))
    second = open_index(root, "train")
    assert (second.fingerprint, second.path(4), second.classes) == (
        first.fingerprint,
        first.path(4),
        first.classes,
    )


def test_a_changed_folder_is_listed_again_and_its_old_arrays_dropped(make_folder, settle, cache):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    first = open_index(root, "train")
    (root / "train/dog/0.jpg").unlink()
    second = open_index(root, "train")
    assert (first.num_images, second.num_images) == (5, 4)
    assert first.path(4) == root / "train/dog/1.jpg"  # what is open stays readable
    assert len(list(cache.rglob("train-*.npy"))) == len(ARRAYS) + 1  # and the times


def test_a_folder_touched_just_now_is_not_believed(make_folder):
    root = make_folder(**TWO_CLASSES)
    folder = root / "train/dog"
    changed_ns = folder.stat().st_mtime_ns
    assert open_index(root, "train").num_images == 5
    (folder / "new.png").write_bytes(b"x")
    os.utime(folder, ns=(changed_ns, changed_ns))  # as a coarse clock would show it
    assert open_index(root, "train").num_images == 6


def test_a_file_rewritten_in_place_is_seen(make_folder, settle):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    first = open_index(root, "train")
    with open(root / "train/dog/0.jpg", "ab") as file:  # no folder's time changes
        file.write(b"more")
    second = open_index(root, "train")
    assert second.fingerprint != first.fingerprint
    assert second.sizes[3] == first.sizes[3] + 4


@pytest.mark.parametrize("is_time_kept", [False, True])
def test_as_many_other_bytes_are_other_content(make_folder, settle, is_time_kept):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    first = open_index(root, "train")
    before = content(first)
    assert content(open_index(root, "train")) == before
    path = root / "train/dog/0.jpg"
    about, whole = path.stat(), bytearray(path.read_bytes())
    whole[-20] ^= 1
    path.write_bytes(whole)
    if is_time_kept:  # as rsync and touch do
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    second = open_index(root, "train")
    assert second.fingerprint == first.fingerprint and content(second) != before


def test_content_is_read_once_for_settled_files(make_folder, settle, monkeypatch):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    first = content(open_index(root, "train"))
    with monkeypatch.context() as watched:
        watched.setattr(contents, "content_of", lambda path: pytest.fail("read again"))
        assert content(open_index(root, "train")) == first
    monkeypatch.setattr(image_folder, "_FILE_SETTLED_NS", 10**12)
    shutil.copytree(root, root.with_name("young"))
    found = open_index(root.with_name("young"), "train")
    assert found.state is None and content(found) == first  # not of the place, and not believed
    assert content(open_index(root.with_name("young"), "train")) == first


def content(found):
    return [*contents.content_digest(FolderSet(found))][-1]


def test_files_that_are_not_listed_are_counted_by_extension(make_folder, settle):
    root = make_folder(**TWO_CLASSES)
    for name in ("cat/a.JFIF", "cat/b.gif", "dog/c.gif", "dog/d.heic", "dog/bare", "stray.jpg"):
        (root / "train" / name).write_bytes(b"x")
    for name in (".DS_Store", "cat/._0.jpg"):  # what a file manager leaves is none of the user's
        (root / "train" / name).write_bytes(b"x")
    settle(root)
    expected = {".jfif": 1, ".gif": 2, ".heic": 1, "no extension": 1, ".jpg in no class folder": 1}
    for _ in range(2):  # scanned, then from the cache
        assert open_index(root, "train").ignored == expected
    assert open_index(root, "val").ignored == {}


def test_files_of_many_kinds_are_counted_together(make_folder):
    root = make_folder(**TWO_CLASSES)
    for number in range(30):
        (root / f"train/cat/scan.{number:03}").write_bytes(b"x")
    ignored = open_index(root, "train").ignored
    assert len(ignored) == 21 and ignored["others"] == 10


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}"])
@pytest.mark.parametrize("pattern", ["train.json", "train-*.labels.npy"])
def test_a_damaged_cache_is_built_anew(make_folder, settle, cache, content, pattern):
    root = make_folder(**TWO_CLASSES)
    settle(root)
    open_index(root, "train")
    (damaged,) = cache.rglob(pattern)
    damaged.write_bytes(content)
    assert open_index(root, "train").labels.tolist() == [0, 0, 0, 1, 1]


def test_the_fingerprint_is_of_names_labels_and_sizes_not_of_the_place(make_folder, tmp_path):
    root = make_folder(**TWO_CLASSES)
    seen = [open_index(root, "train").fingerprint]
    moved = shutil.copytree(root, tmp_path / "moved")
    assert open_index(moved, "train").fingerprint == seen[0]
    for change in (
        lambda: (root / "train/dog/0.jpg").rename(root / "train/dog/9.jpg"),
        lambda: (root / "train/dog/9.jpg").rename(root / "train/cat/9.jpg"),
        lambda: (root / "train/cat/9.jpg").write_bytes(b"other"),
    ):
        change()
        seen.append(open_index(root, "train").fingerprint)
    assert len(set(seen)) == 4


def test_links_to_files_and_class_folders_count_as_what_they_lead_to(make_folder, tmp_path):
    root = make_folder(**TWO_CLASSES)
    elsewhere = shutil.move(root / "train/dog", tmp_path / "dogs")
    (root / "train/dog").symlink_to(elsewhere)
    (root / "train/cat/link.jpg").symlink_to(tmp_path / "dogs/0.jpg")
    (root / "train/cat/nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    found = open_index(root, "train")
    sizes = {found.path(i).name: int(found.sizes[i]) for i in range(3, found.num_images)}
    dogs = {name: (tmp_path / "dogs" / name).stat().st_size for name in ("0.jpg", "1.jpg")}
    assert sizes == {"link.jpg": dogs["0.jpg"], "nowhere.jpg": 0} | dogs


def _drop(*names):
    return lambda root: [shutil.rmtree(root / name) for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("train"), "has no train/; "),
        (_drop("val"), "has no val/ or validation/; "),
        (_drop("train/dog"), "class 'dog' is in val/ only; "),
        (_drop("val/cat"), "class 'cat' is in train/ only; "),
        (_drop("train/cat", "train/dog", "val/cat", "val/dog"), "train/ has no class folder; "),
        (
            lambda root: [path.unlink() for path in (root / "train/dog").iterdir()],
            "dog: has no image (.jpg",
        ),
        (
            lambda root: (root / "train/dog/again").symlink_to(root),
            "dog/again: is a link to a folder; ",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_in_one_line(make_folder, change, message):
    root = make_folder(**TWO_CLASSES)
    change(root)
    with pytest.raises(DataError) as refused:
        open_index(root, "train"), open_index(root, "val")
    text = str(refused.value)
    assert str(root) in text and message in text and "; " in text and "\n" not in text


@pytest.mark.parametrize(
    ("split", "name"),
    [("train", "Train"), ("train", "training"), ("val", "Valid"), ("val", "dev")],
)
def test_a_split_under_another_name_is_pointed_at(make_folder, split, name):
    root = make_folder(**TWO_CLASSES)
    (root / split).rename(root / name)
    with pytest.raises(DataError, match=rf"rename {name}/ to {split}/"):
        open_files(root, "train"), open_files(root, "val")


@pytest.mark.parametrize("name", ["valid", "test"])
def test_valid_and_test_stand_for_val_and_the_row_says_so(make_folder, name):
    root = make_folder(**TWO_CLASSES)
    before = open_index(root, "val").fingerprint
    (root / "val").rename(root / name)
    assert open_index(root, "val").fingerprint == before
    data = open_data(find_profile(str(root)), root)
    assert data.split == name and data.val.index.folder.name == name


def test_test_stands_for_val_only_where_there_is_no_other(make_folder):
    splits = {"train": 3, "valid": 2, "test": 1}
    root = make_folder(**{split: {"cat": number, "dog": 1} for split, number in splits.items()})
    assert open_index(root, "val").num_images == 3
    (root / "valid").rename(root / "val")
    data = open_data(find_profile(str(root)), root)
    assert data.split == "val" and data.val.num_images == 3


def test_a_test_archive_beside_an_image_folder_is_none_of_its_splits(make_folder):
    root = make_folder(**TWO_CLASSES)
    (root / "test.tar").write_bytes(b"x")
    assert open_files(root, "val").num_images == 2


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # NFC, as Linux has it; NFD, as macOS had it


def test_classes_that_differ_in_unicode_form_alone_are_named_as_such(make_folder):
    root = make_folder(train={COMPOSED: 1, "dog": 1}, val={DECOMPOSED: 1, "dog": 1})
    with pytest.raises(DataError) as refused:
        open_index(root, "train")
    assert ascii(COMPOSED) in str(refused.value) and ascii(DECOMPOSED) in str(refused.value)
    both = {COMPOSED: 1, DECOMPOSED: 1}
    with pytest.raises(DataError, match="two classes called"):
        open_index(make_folder("both", train=both, val=both), "train")


def test_classes_that_differ_in_case_alone_are_two_classes(make_folder):
    both = {"Dog": 1, "dog": 1}
    assert open_index(make_folder(train=both, val=both), "train").classes == ("Dog", "dog")
    with pytest.raises(DataError, match="'Dog' is in val/ only as 'Dog', beside 'dog'"):
        open_index(
            make_folder("other", train={"cat": 1, "dog": 1}, val={"cat": 1, "Dog": 1}), "val"
        )


def test_a_long_name_in_other_letters_names_runs_within_a_file_names_bytes(make_folder):
    root = make_folder("数据" * 38, train={"日": 1, "月": 1}, val={"日": 1, "月": 1})
    name = find_profile(str(root)).name
    assert len(name.encode()) <= 100 and root.name.startswith(name) and len(name) == 33


def test_a_folder_of_configurations_points_at_one(make_folder):
    root = make_folder("hub/plain", **TWO_CLASSES)
    with pytest.raises(DataError, match=f"use {root}, which holds one"):
        open_files(root.parent, "train")


def test_a_cache_that_cannot_be_written_is_named(make_folder, cache):
    root = make_folder(**TWO_CLASSES)
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match="XDG_CACHE_HOME=<a folder you may write to>"):
        open_index(root, "train")


def test_is_image_folder(make_folder, tmp_path):
    assert is_image_folder(make_folder(**TWO_CLASSES))
    assert not is_image_folder(tmp_path)


def test_another_process_gets_the_files_not_the_arrays(make_folder):
    found = open_index(make_folder(**TWO_CLASSES), "train")
    sent = pickle.dumps(found)
    there = pickle.loads(sent)
    assert len(sent) < 1000 and isinstance(there.labels, np.memmap)
    assert there.path(3) == found.path(3) and np.array_equal(there.sizes, found.sizes)


def test_1_3_million_files_cost_less_than_200_mib(tmp_path):
    num_images, width = 1_300_000, len("n0000123/n0000123_0001234567.JPEG")
    digits = np.arange(num_images)[:, None] // 10 ** np.arange(9, -1, -1) % 10 + ord("0")
    names = np.tile(np.frombuffer(b"n0000123/n0000123_0001234567.JPEG", np.uint8), (num_images, 1))
    names[:, 18:28] = digits
    arrays = {
        "paths": names.reshape(-1),
        "offsets": np.arange(num_images + 1) * width,
        "labels": np.arange(num_images, dtype=np.int32) // 1300,
        "sizes": np.full(num_images, 110_000),
    }
    record = tmp_path / "train.json"
    store_index(arrays, {"fingerprint": "f" * 64}, record)
    last = names[-1].tobytes().decode()
    del digits, names, arrays

    before_mib = _resident_mib()
    tracemalloc.start()
    opened = Index(Path("/photos"), tmp_path / f"train-{'f' * 16}", ("a",), "f" * 64)
    assert opened.path(num_images - 1) == Path("/photos") / last
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    touched = sum(
        int(values.sum())
        for values in (opened._paths, opened._offsets, opened.labels, opened.sizes)
    )

    assert touched > 0
    assert peak_bytes < 2**20
    assert _resident_mib() - before_mib < 200


def _resident_mib() -> float:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_arrays_are_images_whose_names_labels_and_sizes_count(make_folder):
    root = make_folder(**TWO_CLASSES)
    before = open_index(root, "train").fingerprint
    np.save(root / "train/dog/9.npy", np.zeros((4, 5, 6), np.uint8))
    found = open_index(root, "train")
    assert found.path(5) == root / "train/dog/9.npy" and found.fingerprint != before
    assert found.sizes[5] == (root / "train/dog/9.npy").stat().st_size


def test_a_cache_from_before_arrays_were_listed_is_not_believed(make_folder, settle, monkeypatch):
    root = make_folder(**TWO_CLASSES)
    np.save(root / "train/dog/9.npy", np.zeros((4, 5, 6), np.uint8))
    settle(root)
    with monkeypatch.context() as before:
        before.setattr(image_folder, "EXTENSIONS", (".jpg",))
        before.setattr(index, "_LAYOUT", 1)
        assert open_index(root, "train").num_images == 5
    assert open_index(root, "train").num_images == 6
