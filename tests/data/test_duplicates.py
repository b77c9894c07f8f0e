"""Val images that are in train too, and JPEGs that decode only in part."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from support.commands import rsb
from support.packing import encoded
from trainer.data.check import check_data, duplicates
from trainer.data.datasets.builtin import FolderSet
from trainer.data.duplicates import NEAR_BITS, Looks, same_files, similar_pictures
from trainer.data.index import open_index
from trainer.data.jpeg import DAMAGED

PHOTO = Image.fromarray(load_sample_image("china.jpg"))
WHOLE = encoded(PHOTO, "JPEG")


def report(root, split):
    return check_data(FolderSet(open_index(root, split)), num_threads=2)


def test_the_same_file_and_nearly_the_same_picture_are_named_with_their_twins(
    make_folder, monkeypatch
):
    root = make_folder(train={"cat": 6, "dog": 6}, val={"cat": 2, "dog": 2})
    (root / "train/cat/photo.jpg").write_bytes(WHOLE)
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    flower.save(root / "train/dog/flower.png")
    (root / "val/dog/again.jpg").write_bytes(WHOLE)
    flower.resize((320, 213)).save(root / "val/cat/small.jpg", quality=60)
    for split in ("train", "val"):  # flat pictures look alike, and are not called so
        Image.new("RGB", (40, 40), (255, 255, 255)).save(root / split / "cat/white.png")
        Image.new("RGB", (40, 40), (254, 255, 255)).save(root / split / "dog/white.png")
    (root / "val/dog/white.png").unlink()
    Image.new("RGB", (41, 40), (255, 255, 255)).save(root / "val/cat/white.png")

    found = duplicates(report(root, "train"), report(root, "val"))

    assert found == {
        "the same file in train": (f"{root}/val/dog/again.jpg = {root}/train/cat/photo.jpg",),
        "nearly the same picture in train": (
            f"{root}/val/cat/small.jpg = {root}/train/dog/flower.png",
        ),
    }
    monkeypatch.chdir(root.parent)  # short paths, which a table does not fold
    done = rsb("check-data", "--data", root.name)
    assert done.exit_code == 0 and "small.jpg" in done.output and "again.jpg" in done.output


def test_near_pairs_are_those_of_all_pairs_compared_one_by_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    val = np.concatenate([rng.integers(0, 256, (20, 32), dtype=np.uint8), train[:60].copy()])
    for i in range(20, 80):  # move 0 to 29 bits, anywhere
        bits = np.unpackbits(val[i])
        bits[rng.choice(256, (i - 20) // 2, replace=False)] ^= 1
        val[i] = np.packbits(bits)
    looks = [
        Looks(np.zeros((len(one), 16), np.uint8), one, np.zeros(len(one), bool))
        for one in (val, train)
    ]
    distances = np.array([[np.unpackbits(a ^ b).sum() for b in train] for a in val])
    expected = [(i, int(row.argmin())) for i, row in enumerate(distances) if row.min() <= NEAR_BITS]
    assert similar_pictures(*looks) == expected and len(expected) == 32
    assert same_files(*looks) == []  # files that were not read are not alike


@pytest.mark.parametrize("is_progressive", [False, True])
def test_a_jpeg_of_which_half_is_missing_is_not_sound(make_folder, is_progressive):
    root = make_folder(train={"cat": 2, "dog": 2}, val={"cat": 1, "dog": 1})
    content = encoded(PHOTO, "JPEG", progressive=is_progressive)
    path = root / "train/cat/cut.jpg"
    path.write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    Image.open(io.BytesIO(path.read_bytes())).load()  # PIL fills in grey
    found = report(root, "train")
    assert found.odd == {DAMAGED: (str(path),)} and not found.is_sound
    path.write_bytes(content + b"trailing bytes of a camera")
    assert report(root, "train").is_sound
