"""One answer to an image from several views of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional


def viewed(
    answer: Callable[[Tensor], Tensor],
    images: Tensor,
    is_mirrored: bool,
    translate_px: int | None = None,
) -> Tensor:
    """Float32 logits [B, K] of normalized images [B, C, H, W]: the mean of their views.

    is_mirrored: of an image and its mirror image. translate_px: half of the weight is on two more
    views, moved so many pixels up and to the left, and down and to the right; what comes in is the
    image, mirrored at its outermost pixels.

    Source: Jordan 2024, arXiv:2404.00498.
    """
    logits = answer(images).float()
    if is_mirrored:
        logits = (logits + answer(images.flip(3)).float()) / 2
    if translate_px is None:
        return logits
    height, width = images.shape[2:]
    padded = functional.pad(images, (translate_px,) * 4, mode="reflect")
    corners = padded[:, :, :height, :width], padded[:, :, -height:, -width:]
    moved = [viewed(answer, corner, is_mirrored) for corner in corners]
    return logits / 2 + (moved[0] + moved[1]) / 4
