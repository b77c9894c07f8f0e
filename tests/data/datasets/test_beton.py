"""Reading a .beton: what it holds, and what is refused before a pointer of it is followed."""

import json
import pickle

import numpy as np
import pytest

from trainer.base.errors import DataError, UserError
from trainer.data.dataset import open_data
from trainer.data.datasets import beton
from trainer.data.datasets.beton import beton_file, chosen_loader, has_betons, open_beton
from trainer.data.datasets.builtin import FolderSet, open_beton_set
from trainer.data.decode import BadImage
from trainer.data.ffcv.beton_writer import Storage, write_beton
from trainer.data.index import open_index
from trainer.data.profile import find_profile


@pytest.fixture
def photos(make_folder):
    """An image folder of 10 + 4 noisy JPEGs with its .beton files beside it."""
    root = make_folder(train={"cat": 6, "dog": 4}, val={"cat": 2, "dog": 2})
    for split in ("train", "val"):
        write_beton(FolderSet(open_index(root, split)), root, split, find_profile(str(root)))
    return root


def test_it_is_the_same_set_as_the_folder_it_was_written_from(photos):
    folder, found = FolderSet(open_index(photos, "train")), open_beton(photos, "train", 3)
    assert (found.fingerprint, found.classes, found.num_images) == (
        folder.fingerprint,
        folder.classes,
        10,
    )
    assert found.labels.tolist() == folder.labels.tolist()
    for i in range(10):
        assert found.read(i).tobytes() == folder.read(i).tobytes()
    again = pickle.loads(pickle.dumps(found))
    assert again.read(3).tobytes() == folder.read(3).tobytes()
    assert [sides.tolist() for sides in found.sides(np.arange(10))] == [
        sides.tolist() for sides in found.source_sides(np.arange(10))
    ]


def test_a_damaged_image_is_bad(photos):
    found = open_beton(photos, "train", 3)
    place = int(found.samples["image"]["data_ptr"][4]) + 300
    with open(found.path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 255]))
    with pytest.raises(BadImage, match="image 4 is damaged"):
        open_beton(photos, "train", 3).read(4)


@pytest.mark.parametrize(
    "how", ["no json", "cut", "pointer", "other pair", "layout", "label", "json"]
)
def test_a_file_that_is_not_whole_is_refused_before_it_is_read(photos, how):
    path = beton_file(photos, "train")
    facts = json.loads(path.with_suffix(".json").read_text())
    if how == "no json":
        path.with_suffix(".json").unlink()
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    if how in ("pointer", "label", "other pair"):
        samples = np.memmap(path, beton.SAMPLE, "r+", beton.SAMPLES_START, (10,))
        if how == "pointer":
            samples["image"]["data_ptr"][2] = 1 << 60
        samples["label"][1] = 1 if how == "other pair" else 7
        samples.flush()
        if how != "other pair":
            facts["samples_sha256"] = beton.samples_digest(np.asarray(samples))
    facts["layout"] = 99 if how == "layout" else 1
    if how != "no json":
        path.with_suffix(".json").write_text("{" if how == "json" else json.dumps(facts))
    with pytest.raises(DataError, match="`make data` again"):
        open_beton(photos, "train", 3)


def test_other_channels_and_other_images_beside_it_are_refused(photos):
    with pytest.raises(DataError, match="3 channels, where the profile has 1"):
        open_beton(photos, "train", 1)
    (photos / "train" / "cat" / "5.jpg").unlink()
    profile = find_profile(str(photos)).model_copy(update={"num_train": 10})
    with pytest.raises(DataError, match="other images"):
        open_beton_set(profile, photos, "train")


def test_the_beton_files_alone_are_a_data_set_for_any_loader(photos, tmp_path):
    profile, whole = find_profile(str(photos)), open_data(find_profile(str(photos)), photos)
    assert not hasattr(whole.train, "facts")
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in photos.glob("*.*"):
        file.rename(alone / file.name)
    opened = open_data(profile, alone)
    assert opened.fingerprint == whole.fingerprint
    assert opened.val.read(3).tobytes() == whole.val.read(3).tobytes()


def test_who_reads(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(beton.importlib.util, "find_spec", lambda name: object())
    assert has_betons(photos) and not has_betons(tmp_path / "none") and not has_betons(None)
    assert [chosen_loader("auto", folder) for folder in (photos, tmp_path, None)] == [
        "ffcv",
        "torch",
        "torch",
    ]
    assert chosen_loader("pil", photos) == "pil" and chosen_loader("ffcv", photos) == "ffcv"
    with pytest.raises(UserError, match=r"holds no train.beton and val.beton"):
        chosen_loader("ffcv", tmp_path)
    monkeypatch.setattr(beton.importlib.util, "find_spec", lambda name: None)
    assert chosen_loader("auto", photos) == "torch"
    with pytest.raises(UserError, match="make setup ffcv=1"):
        chosen_loader("ffcv", photos)


@pytest.mark.parametrize(
    ("storage", "how"),
    [
        (Storage(max_side_px=24), "(max_side=24)"),
        (Storage(24, 1.0, 80), "(max_side=24 jpeg_share=1 quality=80)"),
        (None, "cannot be read"),
    ],
)
def test_auto_reads_the_same_images_whether_ffcv_is_installed_or_not(
    make_folder, monkeypatch, storage, how
):
    """Files of another kind beside their source: only who asks for them gets them."""
    root = make_folder(train={"cat": 3, "dog": 3}, val={"cat": 1, "dog": 1})
    profile = find_profile(str(root))
    for split in ("train", "val"):
        write_beton(FolderSet(open_index(root, split)), root, split, profile, storage or Storage())
    if storage is None:
        beton_file(root, "val").with_suffix(".json").write_text("{")
    said, opened = [], []
    for is_installed in (True, False):
        monkeypatch.setattr(
            beton.importlib.util,
            "find_spec",
            lambda name, found=is_installed: object() if found else None,
        )
        loader = chosen_loader("auto", root, said.append)
        opened.append(open_data(profile, root, in_beton=loader == "ffcv"))
        assert loader == "torch"
    assert opened[0].fingerprint == opened[1].fingerprint
    (line,) = said
    assert how in line and "using torch" in line and "use loader=ffcv" in line
    monkeypatch.setattr(beton.importlib.util, "find_spec", lambda name: object())
    assert chosen_loader("ffcv", root, said.append) == "ffcv" and len(said) == 1
