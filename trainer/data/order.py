"""The order of samples: pure functions of seed and epoch.

An epoch of N images has N draws. With repeats R its order is a permutation in which every image
comes R times in a row, cut off after N draws: about N / R different images (timm's
RepeatAugSampler). Step s takes draws s*B to (s+1)*B, and its micro-batch j of M every M-th of them
from the j-th on, as timm's ranks do: the repeats of one image fall into different micro-batches.

With a recipe's `sampling` what is permuted is not every image once but as many of each class as it
says: see `Sampled`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from trainer.base import streams
from trainer.components.sampling import Sampling
from trainer.recipe.plan import num_micro_batches_in


@dataclass(frozen=True)
class Sampled:
    """What the epochs of a run show of a training set under a recipe's `sampling`.

    labels: [N], of all images. epochs: of the run. num_each: the draws of one showing of an image,
    its repeats in every augmentation split: a second showing goes on counting repeats after them,
    so that all draws differ.
    """

    sampling: Sampling
    labels: np.ndarray = field(compare=False)
    epochs: int
    num_each: int = 1
    labels_id: int = field(init=False)  # an array has no hash; this one lives as long as this

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels_id", id(self.labels))

    def shown(self, seed: int, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """`number` showings of an epoch, class by class: the images [number] int64, and which
        showing of its image each is, from 0.

        A class of n images and k showings has each of them k // n or one more times: which ones,
        is drawn anew in every epoch.
        """
        counts = np.bincount(self.labels)
        ends = np.cumsum(self.sampling.shares(counts, epoch / self.epochs))
        start = streams.uniforms(seed, "sampling", np.array([epoch]), 1)[0, 0]
        numbers = np.diff(np.floor(number * (ends / ends[-1]) + start).astype(np.int64), prepend=0)
        images = streams.permutation(seed, "sampled_images", epoch, len(self.labels))
        images = images[np.argsort(self.labels[images], kind="stable")]
        label = np.repeat(np.arange(len(counts)), numbers)
        place = np.arange(number) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        showing, of_class = np.divmod(place, counts[label])
        return images[(np.cumsum(counts) - counts)[label] + of_class], showing


def epoch_order(
    seed: int, epoch: int, num_images: int, repeats: int, sampled: Sampled | None = None
) -> np.ndarray:
    """All draws of one epoch in order: ids [num_images, 3] int64 = (epoch, image, repeat)."""
    return _ids(seed, epoch, num_images, repeats, np.arange(num_images), sampled)


def window(
    step: int, num_images: int, batch_images: int, steps_per_epoch: int
) -> tuple[int, int, int]:
    """(epoch, first draw, number of draws) of one step; the last step of an epoch takes what is
    left.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    first = step_in_epoch * batch_images
    return epoch, first, min(batch_images, num_images - first)


def micro_batch_ids(
    seed: int,
    step: int,
    micro_batch: int,
    num_images: int,
    repeats: int,
    batch_images: int,
    num_micro_batches: int,
    steps_per_epoch: int,
    drop_last: bool,
    sampled: Sampled | None = None,
) -> np.ndarray:
    """The draws of one micro-batch: ids [b, 3] int64 = (epoch, image, repeat)."""
    epoch, first, num_draws = window(step, num_images, batch_images, steps_per_epoch)
    assert not drop_last or num_draws == batch_images, (
        "steps_per_epoch counts a step that drop_last drops"
    )
    stride = num_micro_batches_in(num_draws, batch_images, num_micro_batches)
    positions = np.arange(first + micro_batch, first + num_draws, stride)
    return _ids(seed, epoch, num_images, repeats, positions, sampled)


def step_ids(
    seed: int,
    step: int,
    num_images: int,
    repeats: int,
    batch_images: int,
    steps_per_epoch: int,
    sampled: Sampled | None = None,
) -> np.ndarray:
    """All draws of one step in order: ids [b, 3] int64 = (epoch, image, repeat)."""
    epoch, first, num_draws = window(step, num_images, batch_images, steps_per_epoch)
    return _ids(seed, epoch, num_images, repeats, np.arange(first, first + num_draws), sampled)


def _ids(
    seed: int,
    epoch: int,
    num_images: int,
    repeats: int,
    positions: np.ndarray,
    sampled: Sampled | None,
) -> np.ndarray:
    repeat = positions % repeats
    if sampled is None:
        images = _permutation(seed, epoch, num_images)[positions // repeats]
    else:
        images, showings = _sampled(sampled, seed, epoch, -(-num_images // repeats))
        images = images[positions // repeats]
        repeat += sampled.num_each * showings[positions // repeats].astype(np.int64)
    return np.stack([np.full_like(positions, epoch), images, repeat], axis=1)


@lru_cache(maxsize=2)  # a loader looks a little ahead, over the border of two epochs
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    # uint32: half the memory, in every worker
    return streams.permutation(seed, "order", epoch, num_images).astype(np.uint32)


@lru_cache(maxsize=2)
def _sampled(sampled: Sampled, seed: int, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's images in order [number], and which showing of its image each is."""
    order = streams.permutation(seed, "order", epoch, number)
    images, showings = sampled.shown(seed, epoch, number)
    return images[order].astype(np.uint32), showings[order].astype(np.uint32)
