"""Rounds of operations, by the GPU's kernels where they can be used."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from trainer.components.pixels import fused
from trainer.components.pixels.operations import OPERATIONS, operate

_NUM_CHECKED, _CHECKED_PX = 2 * len(OPERATIONS), (40, 48)
_MOST_APART = 1e-5  # of values around 1


def operate_in_turn(
    images: Tensor,
    operation: Tensor,
    argument: Tensor,
    interpolation: Tensor,
    fill: tuple[int, ...],
) -> Tensor:
    """Each image after its R operations, one after the other: `operate` of [B, R] in place of
    [B].
    """
    drawn = operation, argument, interpolation
    if uses_kernels(images.device):
        places, arguments, filters = (each.numpy() for each in drawn)
        return fused.operate_in_turn(images, places, arguments, filters, OPERATIONS, fill)
    for one, its_argument, its_filter in zip(*(part.T for part in drawn), strict=True):
        images = operate(images, one, its_argument, its_filter, fill)
    return images


def uses_kernels(device: torch.device) -> bool:
    """Is one kernel used there in place of many tensor operations?"""
    return device.type == "cuda" and why_not(device) is None


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why a GPU's kernels are not used, in a few words; None where they are.

    The first call compiles them and compares them with what a CPU does, and waits for the GPU.
    """
    try:
        differ = _levels_apart(device) > 0 or _values_apart(device) > _MOST_APART
    except Exception as error:  # of a compiler, a driver: whatever it is, there is another way
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    return "they do not give this machine's CPU's numbers" if differ else None


def _checked_images() -> Tensor:
    size = _NUM_CHECKED, 3, *_CHECKED_PX
    return torch.randint(
        0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _levels_apart(device: torch.device) -> int:
    """The greatest difference over all operations, in grey levels."""
    images, places = _checked_images(), np.arange(_NUM_CHECKED)
    places, arguments, filters = places % len(OPERATIONS), 1.25 + places / 4, 1 + places % 2
    fill = 124, 116, 104
    one, its_argument, its_filter = map(torch.from_numpy, (places, arguments, filters))
    expected = operate(images, one, its_argument, its_filter, fill)
    drawn = places[:, None], arguments[:, None], filters[:, None]
    found = fused.operate_in_turn(images.to(device), *drawn, OPERATIONS, fill)
    return int((found.int() - expected.to(device).int()).abs().amax())


def _values_apart(device: torch.device) -> float:
    """The greatest difference of normalized values."""
    images, (mean, std) = _checked_images(), torch.tensor([[110.0, 120, 130], [60, 50, 55]])
    expected = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    images, mean, std = images.to(device), mean.to(device), std.to(device)
    found = fused.model_inputs(images, mean, std, torch.float32, torch.channels_last)
    return float((found - expected.to(device)).abs().amax())
