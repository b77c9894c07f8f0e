"""The operation that looks at a pixel's neighbours.

Source: PIL's ImageFilter.SMOOTH and ImageEnhance.Sharpness, rounding included.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainer.components.pixels.color import blend


def smooth(images: Tensor) -> Tensor:
    """The mean of each pixel, counted five times, and its eight neighbours: [N, C, H, W] float32
    whole numbers.

    The outermost pixels stay as they are, as PIL leaves them.
    """
    across = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    total = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:] + 4 * images[:, :, 1:-1, 1:-1]
    smoothed = images.clone()
    # The sum is whole, so the quotient is never nearer than 1/26 to a rounding edge: float32 is
    # exact here.
    smoothed[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor()
    return smoothed


def sharpness(images: Tensor, factor: np.ndarray) -> Tensor:
    """A blend with the smoothed image: factor 1 changes nothing, 2 sharpens.

    images: [N, C, H, W] uint8. factor: [N] float64. Gives [N, C, H, W] uint8.
    """
    images = images.float()
    return blend(smooth(images), images, factor)
