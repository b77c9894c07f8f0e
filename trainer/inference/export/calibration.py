"""The photos that an int8 model's ranges are found on, and what int8 costs in right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.base.errors import UserError
from trainer.base.settings import Settings
from trainer.data.transforms import scored_inputs
from trainer.data.workers import Watch
from trainer.inference.classifier import Classifier
from trainer.inference.images import LabelledImages, batches_of, labelled_batches
from trainer.inference.quality import judge

MOST_IMAGES = 128


def calibration_images(paths: Sequence[Path]) -> tuple[Path, ...]:
    """At most MOST_IMAGES of them, at equal steps of their order."""
    number = min(len(paths), MOST_IMAGES)
    return tuple(paths[place * len(paths) // number] for place in range(number))


def calibration_inputs(
    classifier: Classifier, paths: Sequence[Path], settings: Settings, check: Callable[[], None]
) -> list[np.ndarray]:
    """The model's input [1, C, px, px] float32 of each image that can be read.

    Raises UserError where none can.
    """
    batches = batches_of(paths, classifier.image, 16, settings.num_workers, Watch(check))
    normal = (scored_inputs(pixels, classifier.image, settings) for _, pixels, _ in batches)
    found = [one[None] for images in normal for one in images.contiguous().numpy()]
    if paths and not found:
        raise UserError(f"images: none of {len(paths)} can be read", "use others for int8=1")
    return found


@dataclass(frozen=True)
class Rights:
    """Right answers on labelled images. others: images that were not calibrated on, and how many
    of these are right.
    """

    num_images: int
    right: int
    others: int
    right_others: int


def rights(
    classifier: Classifier,
    images: LabelledImages,
    calibrated_on: Sequence[Path],
    batch_images: int,
    settings: Settings,
    check: Callable[[], None],
) -> Rights:
    """Raises BadImage for an image that cannot be read."""
    batches = labelled_batches(
        images, classifier.image, batch_images, settings.num_workers, Watch(check)
    )
    is_right = judge(classifier, batches, settings).rank == 0
    known = {path.resolve() for path in calibrated_on}
    is_other = np.array([path.resolve() not in known for path in images.paths])
    return Rights(
        len(is_right), int(is_right.sum()), int(is_other.sum()), int(is_right[is_other].sum())
    )
