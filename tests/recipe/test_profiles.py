"""Profiles: facts of known sets, recipes of a user's own, image folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.base.errors import UserError
from trainer.data.datasets.builtin import open_set
from trainer.data.profile import data_folder, find_profile, majority_pct
from trainer.recipe.profiles import PROFILES, Adapt


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An image folder of two classes: 3 images for train, 2 for val."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "birds"
    for name in ("train/owl/0", "train/owl/1", "train/wren/0", "val/owl/0", "val/wren/0"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return root


def test_known_sets_are_found_by_name():
    assert [find_profile(name).name for name in PROFILES] == list(PROFILES)
    in_three = {"digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "imagenet-1k"}
    assert set(PROFILES) == in_three | {"digits-grey", "fashion-mnist-grey", "mnist-grey"}
    assert {name for name, profile in PROFILES.items() if profile.channels == 3} == in_three


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "mnist"])
def test_a_grey_set_differs_from_its_namesake_in_channels_alone(name):
    colour, grey = PROFILES[name], PROFILES[f"{name}-grey"]
    assert (grey.channels, grey.mean * 3, grey.std * 3) == (1, colour.mean, colour.std)
    same = {"num_classes", "num_train", "num_val", "native_px", "adapt"}
    assert grey.model_dump(include=same) == colour.model_dump(include=same)


def test_the_digits_mean_and_deviation_are_those_of_the_training_images():
    digits = PROFILES["digits"]
    pixels = open_set(digits, None, "train").images / 255
    assert np.allclose(digits.mean, pixels.mean(), atol=5e-5) and np.allclose(
        digits.std, pixels.std(), atol=5e-5
    )


def test_a_misspelt_name_gets_one_line_with_the_nearest():
    with pytest.raises(UserError) as refused:
        find_profile("fashion_mnist")
    text = str(refused.value)
    assert (
        "data=fashion_mnist: unknown (did you mean fashion-mnist?); valid: digits, " in text
        and "\n" not in text
    )


def test_a_folder_that_is_not_there_is_called_one(tmp_path):
    with pytest.raises(UserError, match="data=.*photos: no such folder"):
        find_profile(str(tmp_path / "photos"))


def test_an_image_folder_is_a_profile_of_its_own(folder):
    found = find_profile(str(folder))
    assert (found.name, found.num_classes, found.num_train, found.num_val) == ("birds", 2, 3, 2)
    assert (
        found.mean == PROFILES["imagenet-1k"].mean
        and found.adapt is None
        and found.native_px is None
    )


def test_a_folders_name_becomes_fit_for_file_names(folder):
    assert (
        find_profile(str(folder.rename(folder.with_name("my birds: 2nd")))).name == "my-birds-2nd"
    )


def test_a_folder_of_one_class_is_refused(folder):
    for split in ("train", "val"):
        (folder / split / "wren/0.png").unlink()
        (folder / split / "wren").rmdir()
    with pytest.raises(UserError, match="one class only; use two at least"):
        find_profile(str(folder))


OWN = """\
name: birds
num_classes: 2
num_train: 3
num_val: 2
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
adapt: {train_px: 64, crop_area: 0.35}
"""


def test_a_users_page_is_read_strictly(tmp_path):
    page = tmp_path / "birds.yaml"
    page.write_text(OWN)
    found = find_profile(str(page))
    assert (
        found.name == "birds"
        and found.adapt == Adapt(train_px=64, crop_area=0.35)
        and found.channels == 3
    )
    page.write_text(OWN.replace("train_px", "train_pix"))
    with pytest.raises(UserError, match="birds.yaml:7: .*train_px"):
        find_profile(str(page))


@pytest.mark.parametrize(
    "wrong",
    [
        ("name: birds", "name: a/b"),
        ("0.25]", "0.0]"),
        ("num_train: 3", "num_train: 0"),
        ("0.35", "1.5"),
    ],
)
def test_absurd_facts_are_refused(tmp_path, wrong):
    page = tmp_path / "birds.yaml"
    page.write_text(OWN.replace(*wrong))
    with pytest.raises(UserError, match=r"birds.yaml:\d: "):
        find_profile(str(page))


@pytest.mark.parametrize("channels", [1, 4, 64])
def test_a_users_page_may_have_other_channels(tmp_path, channels):
    page = tmp_path / "bands.yaml"
    values = f"channels: {channels}\nmean: {[0.5] * channels}\nstd: {[0.25] * channels}"
    page.write_text(OWN.replace("mean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]", values))
    found = find_profile(str(page))
    assert (
        found.channels == channels
        and found.mean == (0.5,) * channels
        and found.std == (0.25,) * channels
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ("num_classes: 2", "num_classes: 2\nchannels: 4"),
            "birds.yaml:6: .*3 numbers where channels is 4; write one per channel",
        ),
        (
            ("std: [0.25, 0.25, 0.25]", "std: [0.25]"),
            "birds.yaml:6: .*1 number where channels is 3 where it is not written",
        ),
        (("num_classes: 2", "num_classes: 2\nchannels: 65"), "birds.yaml:3: .*channels"),
        (("num_classes: 2", "num_classes: 2\nchannels: 0"), "birds.yaml:3: .*channels"),
        (("num_classes: 2", "num_classes: 2\nimages_of: birds"), "birds.yaml:3: .*images_of"),
    ],
)
def test_channels_that_do_not_fit_are_refused_with_their_line(tmp_path, wrong, message):
    page = tmp_path / "birds.yaml"
    page.write_text(OWN.replace(*wrong))
    with pytest.raises(UserError, match=message) as refused:
        find_profile(str(page))
    assert "\n" not in str(refused.value)


def test_data_folder_is_what_the_user_said(folder):
    assert data_folder(str(folder)) == folder
    assert data_folder("cifar10", folder) == folder
    assert data_folder("digits") is None
    assert data_folder("own.yaml", Path("there")) == Path("there")


@pytest.mark.parametrize("name", ["digits", "digits-grey"])
def test_a_known_sets_majority_class_is_that_of_its_labels(name):
    train, val = (open_set(PROFILES[name], None, split).labels for split in ("train", "val"))
    assert PROFILES[name].majority_pct == pytest.approx(majority_pct(train, val))
