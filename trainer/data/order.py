"""The order of samples: pure functions of seed and epoch.

An epoch of N images has N draws. With repeats R its order is a permutation in which every image
comes R times in a row, cut off after N draws: about N / R different images (timm's
RepeatAugSampler). Step s takes draws s*B to (s+1)*B, and its micro-batch j of M every M-th of them
from the j-th on, as timm's ranks do: the repeats of one image fall into different micro-batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from trainer.base import streams
from trainer.recipe.plan import num_micro_batches_in


def epoch_order(seed: int, epoch: int, num_images: int, repeats: int) -> np.ndarray:
    """All draws of one epoch in order: ids [num_images, 3] int64 = (epoch, image, repeat)."""
    return _ids(seed, epoch, num_images, repeats, np.arange(num_images))


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
) -> np.ndarray:
    """The draws of one micro-batch: ids [b, 3] int64 = (epoch, image, repeat)."""
    epoch, first, num_draws = window(step, num_images, batch_images, steps_per_epoch)
    assert not drop_last or num_draws == batch_images, (
        "steps_per_epoch counts a step that drop_last drops"
    )
    stride = num_micro_batches_in(num_draws, batch_images, num_micro_batches)
    return _ids(
        seed, epoch, num_images, repeats, np.arange(first + micro_batch, first + num_draws, stride)
    )


def step_ids(
    seed: int, step: int, num_images: int, repeats: int, batch_images: int, steps_per_epoch: int
) -> np.ndarray:
    """All draws of one step in order: ids [b, 3] int64 = (epoch, image, repeat)."""
    epoch, first, num_draws = window(step, num_images, batch_images, steps_per_epoch)
    return _ids(seed, epoch, num_images, repeats, np.arange(first, first + num_draws))


def _ids(seed: int, epoch: int, num_images: int, repeats: int, positions: np.ndarray) -> np.ndarray:
    images = _permutation(seed, epoch, num_images)[positions // repeats]
    return np.stack([np.full_like(positions, epoch), images, positions % repeats], axis=1)


@lru_cache(maxsize=2)  # a loader looks a little ahead, over the border of two epochs
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    # uint32: half the memory, in every worker
    return streams.permutation(seed, "order", epoch, num_images).astype(np.uint32)
