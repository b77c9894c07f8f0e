"""The profile of data=: a known dataset, a profile file, or a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from trainer.base.errors import UserError
from trainer.data.datasets.packed import holds_files, open_files
from trainer.recipe.load import load_yaml
from trainer.recipe.profiles import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROFILES,
    Profile,
    unknown_data,
)

_LONGEST_NAME_BYTES = 100  # of a folder, in the names of its runs


def data_folder(data: str, data_dir: Path | None = None) -> Path | None:
    """The folder of the images, if given: data_dir, or `data` itself where that is a folder."""
    if data_dir is not None:
        return Path(data_dir)
    return Path(data) if data not in PROFILES and os.path.isdir(data) else None


def find_profile(data: str, data_dir: Path | None = None) -> Profile:
    """The profile of `data`: a known name, a profile's .yaml, an image folder, or a folder of tar
    shards, parquet or `datasets` files.

    A folder's counts come from its index; it has three channels, ImageNet's mean and standard
    deviation, and no `adapt`.

    Raises UserError if `data` is none of these, ConfigError for a mistake in a profile's .yaml.
    """
    if data in PROFILES:
        return PROFILES[data]
    path = Path(data)
    if path.suffix in (".yaml", ".yml"):
        profile, _ = load_yaml(path, Profile)
        return profile
    if os.path.isdir(path):
        return _folder_profile(path)
    raise unknown_data(data)


def ignored_files(folder: Path | None) -> dict[str, int]:
    """Files of a folder of images that are not read, counted by split and extension."""
    if folder is None or not holds_files(folder):
        return {}
    return {
        f"{split} {kind}": count
        for split in ("train", "val")
        for kind, count in open_files(folder, split, check_files=False).ignored.items()
    }


def folder_majority_pct(folder: Path | None) -> float | None:
    """Top-1 of always answering the most frequent class, from a folder's index; None where nothing
    is read from files.
    """
    if folder is None or not holds_files(folder):
        return None
    train, val = (open_files(folder, split, check_files=False) for split in ("train", "val"))
    return majority_pct(train.labels, val.labels)


def majority_pct(train: np.ndarray, val: np.ndarray) -> float:
    """Top-1 on val of always answering the class that training has most of, in percent: what a
    score is to be held against where classes have unlike numbers of images. train, val: labels [N].
    """
    return 100 * float(np.mean(val == np.bincount(train).argmax()))


def _folder_profile(root: Path) -> Profile:
    # counts and classes alone: training looks at every file when it opens them
    train, val = (open_files(root, split, check_files=False) for split in ("train", "val"))
    if len(train.classes) < 2:
        raise UserError(f"{root / 'train'}: one class only; use two at least")
    name = re.sub(r"[^\w.+-]+", "-", root.resolve().name).encode()[:_LONGEST_NAME_BYTES]
    return Profile(
        name=name.decode(errors="ignore") or "root",
        num_classes=len(train.classes),
        num_train=train.num_images,
        num_val=val.num_images,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
