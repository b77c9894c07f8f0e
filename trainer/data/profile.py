"""The profile of data=: a known dataset, a profile file, or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from trainer.base.commands import command, quoted
from trainer.base.errors import ConfigError, DataError, UserError
from trainer.data.datasets.beton import BetonSet, has_betons, open_beton
from trainer.data.datasets.layouts import layout_of, profile_name
from trainer.data.datasets.packed import holds_files, open_files
from trainer.data.datasets.split import TABLES, split_name
from trainer.data.index import Index
from trainer.recipe.load import load_yaml
from trainer.recipe.profiles import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROFILES,
    Profile,
    unknown_data,
)


def data_folder(data: str, data_dir: Path | None = None) -> Path | None:
    """The folder of the images, if given: data_dir, or `data` itself where that is a folder."""
    if data_dir is not None:
        return Path(data_dir)
    return Path(data) if data not in PROFILES and os.path.isdir(data) else None


def find_profile(data: str, data_dir: Path | None = None, task: str | None = None) -> Profile:
    """The profile of `data`: a known name, a profile's .yaml, an image folder, or a folder of tar
    shards, parquet, `datasets` or .beton files.

    A folder's counts come from its index; it has three channels, ImageNet's mean and standard
    deviation, and no `adapt`. A .beton has the channels, mean and deviation of the profile that it
    was written for. task: what the targets are for, where a folder has those of several.

    Raises UserError if `data` is none of these, ConfigError for a mistake in a profile's .yaml.
    """
    if data in PROFILES:
        return PROFILES[data]
    path = Path(data)
    if path.suffix in (".yaml", ".yml"):
        return _own_file(path, data_dir)
    if (layout := layout_of(path, task)) is not None:
        return layout.profile(path)
    if os.path.isdir(path):
        return _folder_profile(path)
    if path.suffix in TABLES and path.is_file():
        raise DataError(
            f"{data}: a table of images",
            f"use `{command('split', data=data)}`, then data={quoted(str(split_name(path)))}",
        )
    raise unknown_data(data)


def _own_file(path: Path, data_dir: Path | None) -> Profile:
    try:
        profile, _ = load_yaml(path, Profile)
    except ConfigError as error:
        if error.kind == "missing":
            images = data_dir or "<folder of the images>"
            made = command("check-data", data=images, profile="<new>.yaml")
            error.hint += f"; a whole profile is written by {made}"
        raise
    return profile


def check_counts(profile: Profile, folder: Path | None) -> None:
    """Are a profile's counts those of the files of a folder? Training would be refused, too.

    Raises DataError with all that differ; fix: the values that the files have.
    """
    if folder is None or layout_of(folder) or not holds_files(folder):
        return
    train, val = (open_files(folder, split, check_files=False) for split in ("train", "val"))
    found = {
        "num_train": train.num_images,
        "num_val": val.num_images,
        "num_classes": len(train.classes),
    }
    wrong = {key: value for key, value in found.items() if value != getattr(profile, key)}
    if wrong:
        said = ", ".join(f"{key}: {getattr(profile, key)}" for key in wrong)
        right = ", ".join(f"{key}: {value}" for key, value in wrong.items())
        raise DataError(
            f"{folder}: its files have {right}, where the profile {profile.name} has {said}",
            f"use data={folder}, or a profile with these counts:"
            f" {command('check-data', data=folder, profile='<new>.yaml')}",
            fix=wrong,
        )


def ignored_files(folder: Path | None) -> dict[str, int]:
    """Files of a folder of images that are not read, counted by split and extension."""
    if folder is None or layout_of(folder) or not holds_files(folder):
        return {}
    return {
        f"{split} {kind}": count
        for split in ("train", "val")
        for kind, count in open_files(folder, split, check_files=False).ignored.items()
    }


def val_stand_in(folder: Path | None) -> str:
    """The split of a folder of images that is taken for validation, where none is called so; else
    empty.
    """
    if folder is None or layout_of(folder) or not holds_files(folder):
        return ""
    return open_files(folder, "val", check_files=False).stand_in


def folder_majority_pct(folder: Path | None) -> float | None:
    """Top-1 of always answering the most frequent class, from a folder's index; None where nothing
    is read from files.
    """
    if folder is None or layout_of(folder) or not holds_files(folder):
        return None
    train, val = (open_files(folder, split, check_files=False) for split in ("train", "val"))
    return majority_pct(train.labels, val.labels)


def majority_pct(train: np.ndarray, val: np.ndarray) -> float:
    """Top-1 on val of always answering the class that training has most of, in percent: what a
    score is to be held against where classes have unlike numbers of images. train, val: labels [N].
    """
    num_classes = int(max(train.max(), val.max())) + 1
    return majority_of_counts(*(np.bincount(one, minlength=num_classes) for one in (train, val)))


def majority_of_counts(train: np.ndarray, val: np.ndarray) -> float:
    """The same, of the images per class: train, val [K]."""
    return 100 * float(val[train.argmax()] / val.sum())


def _folder_profile(root: Path) -> Profile:
    facts: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    train: Index | BetonSet
    val: Index | BetonSet
    if has_betons(root) and not holds_files(root):
        train, val = (packed := open_beton(root, "train")), open_beton(root, "val")
        facts = {name: getattr(packed.facts, name) for name in ("mean", "std", "channels")}
    else:  # counts and classes alone: training looks at every file when it opens them
        train, val = (open_files(root, split, check_files=False) for split in ("train", "val"))
    if len(train.classes) < 2:
        raise UserError(f"{root / 'train'}: one class only; use two at least")
    return Profile(
        name=profile_name(root),
        num_classes=len(train.classes),
        num_train=train.num_images,
        num_val=val.num_images,
        **facts,
    )
