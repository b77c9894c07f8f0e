"""A data profile for images of one's own: what was counted and measured, and an adaptation by a
rule of thumb.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.base.errors import UserError
from trainer.base.settings import check_writable
from trainer.data.check import DataReport
from trainer.data.profile import majority_of_counts
from trainer.recipe import tree
from trainer.recipe.profiles import Adapt, Profile

_ADAPTED_BELOW = 100_000  # training images; a larger set takes a recipe as it stands
_LEAST_BATCH, _LARGEST_BATCH = 16, 128
_STEPS_PER_EPOCH = 10  # at least, where the smallest batch allows it
_NUM_STEPS = 1_500  # of a run, as far as _EPOCHS allow
_EPOCHS = (30, 100)
_WARMUP_SHARE = 0.05
_PHOTO_PX = 160  # from this median short side on, images are scaled down and cropped
_STRIDE_PX = 32  # of the models: sizes are multiples of it


class NoImages(UserError):
    """There is nothing to measure."""


def own_profile(name: str, train: DataReport, val: DataReport) -> Profile:
    """The profile of images that check_data has read; name: as find_profile makes it of a folder.

    mean, std: of the training images that decode, each image counting the same whatever its size.

    Raises NoImages where none of them does.
    """
    pixels = train.pixels
    if pixels is None or not (known := pixels.sizes.any(axis=1)).any():
        raise NoImages(f"{name}: no training image decodes", "mend the files that are listed")
    mean, square = pixels.moments[known].mean(axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-8))  # of images of one colour: above 0
    sizes = pixels.sizes[known]
    is_one_size = bool((sizes == sizes[0, 0]).all())
    counts = [np.array(list(report.class_counts.values())) for report in (train, val)]
    return Profile(
        name=name,
        num_classes=len(train.class_counts),
        num_train=train.num_images,
        num_val=val.num_images,
        mean=tuple(round(float(one), 4) for one in mean),
        std=tuple(round(float(one), 4) for one in std),
        channels=len(mean),
        native_px=int(sizes[0, 0]) if is_one_size else None,
        majority_pct=round(majority_of_counts(*counts), 2) or None,
        adapt=adapted_to(train.num_images, float(np.median(sizes.min(axis=1)))),
    )


def adapted_to(num_train: int, short_px: float) -> Adapt | None:
    """How a recipe is adapted to so many training images of such a median short side; None for a
    set that is large enough for the recipe as it stands.

    At least ten steps an epoch in batches of 16 to 128 or a few fewer, about 1,500 steps in 30 to
    100 epochs, a twentieth of them warm-up; photos at 128 px, small images at their own size. Ours:
    where to begin, not what is best.
    """
    if num_train >= _ADAPTED_BELOW:
        return None
    batch = _LARGEST_BATCH
    while batch > _LEAST_BATCH and num_train < _STEPS_PER_EPOCH * batch:
        batch //= 2
    batch = min(batch, num_train)
    while batch > 2 and num_train % batch == 1:  # a last step of one image has no batch statistics
        batch -= 2  # even: images are mixed in pairs
    steps_per_epoch = max(1, num_train // batch)
    least, most = _EPOCHS
    epochs = min(most, max(least, round(_NUM_STEPS / steps_per_epoch)))
    is_photos = short_px >= _PHOTO_PX
    side = 128 if is_photos else min(128, max(_STRIDE_PX, round(short_px / 32) * _STRIDE_PX))
    return Adapt(
        train_px=side,
        test_px=160 if is_photos else side,
        test_crop_share=0.9 if is_photos else 1.0,
        epochs=epochs,
        warmup_epochs=max(1, round(_WARMUP_SHARE * epochs)),
        batch_images=batch,
    )


def as_yaml(profile: Profile) -> str:
    """A profile as the file that data= takes."""
    plain = profile.model_dump(mode="json", exclude_none=True)
    if profile.channels == 3:
        del plain["channels"]
    return tree.to_yaml(plain)


def check_new(path: Path) -> None:
    """Can a profile be written here? Raises UserError where a file is there, as it may be edited,
    where nothing can be written, and for a name that data= would not take for a profile's.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"profile={path}: not a YAML file's name", "use one that ends in .yaml")
    if path.exists():
        raise UserError(f"profile={path}: is there already", "remove it, or use another name")
    check_writable("profile", path.parent)
