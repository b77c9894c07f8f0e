"""Opening data sets: the digits' split, idx and CIFAR files, folders, and what is said when nothing
is found.
"""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torchvision
from sklearn.datasets import load_digits

from trainer.base.errors import DataError
from trainer.data.datasets import builtin as sets
from trainer.data.datasets.builtin import ArraySet, FolderSet, open_set
from trainer.data.profile import find_profile
from trainer.recipe.profiles import PROFILES

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail, and Debian's data sets are not there."""

    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(sets, "_download_files", offline)
    monkeypatch.setattr(sets, "_DEBIAN", sets.Path("/nonexistent"))


def test_the_digits_split_is_the_published_one():
    train, val = (open_set(PROFILES["digits"], None, split) for split in ("train", "val"))
    assert train.fingerprint == "daf3f9e0c4d25bb4afd182aafa07455fcf178d42483ab97017a46a3280e37cd7"
    assert val.fingerprint == "b505574cefe371bd5c7f070646c86335ce7cd9bf1191430f5a58aca67daafb6c"


def test_the_digits_split_is_stratified_and_leaves_nothing_out():
    bunch = load_digits()
    train, val = (open_set(PROFILES["digits"], None, split) for split in ("train", "val"))
    assert (train.num_images, val.num_images) == (1437, 360)
    assert np.bincount(val.labels).tolist() == [36] * 10
    assert train.images.dtype == np.uint8 and train.images.max() == 255
    found = [
        (label, *image.ravel())
        for part in (train, val)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    greys = np.floor(bunch.images * 255 / 16 + 0.5).astype(int)
    assert sorted(found) == sorted(
        (label, *image.ravel()) for image, label in zip(greys, bunch.target, strict=True)
    )


def test_fingerprints_hold_pixels_labels_and_shape():
    images, labels = np.zeros((4, 6, 8), np.uint8), np.arange(4)
    other = images.copy()
    other[3, 5, 7] = 1
    variants = [
        (images, labels),
        (other, labels),
        (images, labels[::-1]),
        (images.reshape(4, 8, 6), labels),
    ]
    assert len({ArraySet(*variant, ("a",)).fingerprint for variant in variants}) == 4


def write_idx(folder, num_train, num_val, is_compressed):
    """Four idx files of random 28 x 28 images; gives them by split."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, prefix, num_images in (("train", "train", num_train), ("val", "t10k", num_val)):
        images = RNG.integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, num_images, dtype=np.uint8)
        written[split] = images, labels
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape)
            content = header + values.tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if is_compressed:
                path = path.with_name(path.name + ".gz")
                content = gzip.compress(content)
            path.write_bytes(content)
    return written


def small(name, num_train, num_val):
    return PROFILES[name].model_copy(update={"num_train": num_train, "num_val": num_val})


@pytest.mark.parametrize("place", ["debian", "data_dir", "as torchvision puts it"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_fashion_mnist_is_found_in_its_places(tmp_path, monkeypatch, place, split):
    monkeypatch.setattr(sets, "_DEBIAN", tmp_path / "debian")
    folder = {
        "debian": tmp_path / "debian/fashion-mnist",
        "data_dir": tmp_path / "mine",
        "as torchvision puts it": tmp_path / "mine/FashionMNIST/raw",
    }[place]
    written = write_idx(folder, 30, 20, is_compressed=place != "data_dir")
    data_dir = None if place == "debian" else tmp_path / "mine"
    found = open_set(small("fashion-mnist", 30, 20), data_dir, split)
    assert np.array_equal(found.images, written[split][0]) and np.array_equal(
        found.labels, written[split][1]
    )
    assert found.labels.dtype == np.int64
    assert found.classes == tuple(torchvision.datasets.FashionMNIST.classes)
    assert np.array_equal(np.asarray(found.read(7)), written[split][0][7])


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: gzip.compress(b"\0\0\x0b\1")]
)
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    write_idx(tmp_path, 5, 5, is_compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}: damaged .*; download the file again"):
        open_set(small("mnist", 5, 5), tmp_path, "train")


def test_missing_labels_are_named(tmp_path):
    write_idx(tmp_path, 5, 5, is_compressed=False)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="but not their labels"):
        open_set(small("mnist", 5, 5), tmp_path, "train")


def test_cifar_files_are_read_as_they_lie(tmp_path, monkeypatch):
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", [*"0123456789"]))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(
            pickle.dumps({"data": planes.reshape(6, -1), "labels": [5, 4, 3, 2, 1, 0]})
        )
    found = open_set(small("cifar10", 30, 6), tmp_path, "val")
    assert found.labels.tolist() == [5, 4, 3, 2, 1, 0] and found.labels.dtype == np.int64
    assert np.array_equal(np.asarray(found.read(4)), planes[4].transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_a_set_that_cannot_be_fetched_says_what_to_fetch_and_where_to_put_it(tmp_path, name):
    with pytest.raises(DataError) as refused:
        open_set(PROFILES[name], tmp_path, "train")
    text = str(refused.value)
    assert text.startswith(f"data={name}: ") and "(no route to host)" in text and "; " in text
    assert text.count(str(tmp_path)) == 2 and "\n" not in text


def test_imagenet_wants_a_folder(tmp_path):
    with pytest.raises(DataError, match="data_dir=<folder with train/"):
        open_set(PROFILES["imagenet-1k"], None, "train")
    with pytest.raises(DataError, match="has no train/"):
        open_set(PROFILES["imagenet-1k"], tmp_path, "train")


def test_an_own_profile_without_its_images_says_what_to_add():
    profile = small("cifar10", 20, 10).model_copy(update={"name": "flowers"})
    with pytest.raises(DataError) as refused:
        open_set(profile, None, "train")
    assert refused.value.hint.startswith("add data_dir=") and "flowers" in refused.value.found


def test_a_folder_serves_for_any_profile_that_it_fits(make_folder):
    root = make_folder(train=dict.fromkeys("abcdefghij", 2), val=dict.fromkeys("abcdefghij", 1))
    found = open_set(small("cifar10", 20, 10), root, "train")
    assert isinstance(found, FolderSet) and found.read(3).mode == "RGB"
    with pytest.raises(
        DataError,
        match="20 train images of 10 classes, where the profile cifar10 has 50000 of 10; ",
    ):
        open_set(PROFILES["cifar10"], root, "train")


def test_a_folder_called_like_a_known_set_is_still_the_folder(make_folder):
    root = make_folder(name="digits", train={"a": 2, "b": 1}, val={"a": 1, "b": 1})
    found = open_set(find_profile(str(root)), root, "train")
    assert (found.num_images, found.classes) == (3, ("a", "b"))


def test_a_grey_set_is_its_namesake_in_one_channel():
    for split in ("train", "val"):
        colour, grey = (open_set(PROFILES[name], None, split) for name in ("digits", "digits-grey"))
        assert np.array_equal(colour.images, grey.images) and np.array_equal(
            colour.labels, grey.labels
        )
        assert (colour.num_channels, grey.num_channels) == (3, 1) and grey.read(3).mode == "L"
        assert colour.fingerprint != grey.fingerprint


def test_the_grey_idx_sets_read_their_namesakes_files(tmp_path):
    written = write_idx(tmp_path, 5, 5, is_compressed=True)
    found = open_set(small("mnist-grey", 5, 5), tmp_path, "train")
    assert np.array_equal(np.asarray(found.read(2)), written["train"][0][2])


def test_a_colour_set_in_one_channel_is_its_luma():
    pixels = RNG.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    found = np.asarray(ArraySet(pixels, np.arange(3), ("a",), num_channels=1).read(2))
    assert np.abs(found - pixels[2] @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_a_bundled_set_has_no_other_channels():
    bands = PROFILES["digits"].model_copy(
        update={"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}
    )
    with pytest.raises(
        DataError, match="digits: channels: 4, where digits can be read in 1 or in 3"
    ):
        open_set(bands, None, "train")


def test_a_folder_is_seen_in_the_profiles_channels(make_folder):
    root = make_folder(train=dict.fromkeys("abcdefghij", 2), val=dict.fromkeys("abcdefghij", 1))
    colour, grey = (
        open_set(small(name, 20, 10), root, "train") for name in ("mnist", "mnist-grey")
    )
    assert (colour.read(3).mode, grey.read(3).mode) == ("RGB", "L")
    assert colour.fingerprint == colour.index.fingerprint != grey.fingerprint
