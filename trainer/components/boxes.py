"""Rectangles of a drawn area and aspect: what a random crop keeps and what random erasing blots
out.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from trainer.base.component import Positive, Share

NUM_ATTEMPTS = 10  # torchvision's and timm's, in both uses


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    """The pair as it is. Raises ValueError where it falls."""
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} runs downwards; write the smaller number first")
    return pair


AreaRange = Annotated[tuple[Share, Share], AfterValidator(ascending)]
AspectRange = Annotated[tuple[Positive, Positive], AfterValidator(ascending)]


def drawn_sides(
    draws: np.ndarray, areas_px: np.ndarray, area: AreaRange, aspect: AspectRange
) -> np.ndarray:
    """The sides of every attempt at a box, in px: the area is uniform, the aspect log-uniform.

    draws: [B, 2 * NUM_ATTEMPTS] in [0, 1). areas_px: [B], the pixels of each whole image.
    Gives [2, B, NUM_ATTEMPTS] int64: the sides whose quotient first / second is the aspect.
    """
    share, tilt = draws.reshape(len(draws), NUM_ATTEMPTS, 2).transpose(2, 0, 1)
    target_px = (area[0] + (area[1] - area[0]) * share) * areas_px[:, None]
    low, high = np.log(aspect)
    ratio = np.exp(low + (high - low) * tilt)
    sides = np.sqrt(np.stack([target_px * ratio, target_px / ratio]))
    return np.rint(sides).astype(np.int64)  # half to even, as Python's round


def first_fitting(fits: np.ndarray, *sides: np.ndarray) -> tuple[np.ndarray, ...]:
    """Whether any attempt fits [B], and the sides of the first that does [B] each (of the first one
    where none does).

    fits: [B, NUM_ATTEMPTS] bool. sides: [B, NUM_ATTEMPTS] each.
    """
    chosen = fits.argmax(axis=1)[:, None]
    return np.any(fits, axis=1), *(np.take_along_axis(side, chosen, axis=1)[:, 0] for side in sides)


def drawn_start(draws: np.ndarray, rooms_px: np.ndarray) -> np.ndarray:
    """A uniform whole number in 0 .. rooms_px for each draw in [0, 1): [B] int64."""
    return np.floor(draws * (rooms_px + 1)).astype(np.int64)
