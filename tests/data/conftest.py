"""Small image folders, and a cache of their own for every test."""

import os

import numpy as np
import pytest
from PIL import Image

from trainer.data import image_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, so that no test sees another's index or a real download."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_folder(tmp_path):
    """Write an image folder of so many JPEGs per class: make_folder(train={"a": 3, "b": 2},
    val={"a": 1, "b": 1}).
    """

    def make(name="photos", **splits):
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for split, classes in splits.items():
            for class_name, num_images in classes.items():
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for i in range(num_images):
                    height, width = rng.integers(20, 60, 2)
                    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.jpg")
        return root

    return make


@pytest.fixture
def settle(monkeypatch):
    """Set the times of all folders below a root into the past, and take its files for old ones:
    what is too young is not believed.
    """

    def age(root):
        # no program sets a file's change time
        monkeypatch.setattr(image_folder, "_FILE_SETTLED_NS", -(10**18))
        for folder, _, _ in os.walk(root):
            os.utime(folder, (1e9, 1e9))

    return age
