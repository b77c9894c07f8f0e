"""The way of small arrays to the images' device."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from trainer.base.devices import sum_dtype


def on(device: torch.device, array: np.ndarray) -> Tensor:
    """The array as a tensor on a device; a GPU copies it in its own time.

    From ordinary memory such a copy would hold up this process until it is done, which shows where
    there are many. That of an array with gaps would go by way of it.
    """
    tensor = torch.from_numpy(array)
    if tensor.dtype == torch.float64:
        tensor = tensor.to(sum_dtype(device))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def colour_on(device: torch.device, colour: tuple[int, ...]) -> Tensor:
    """One value in 0..255 per channel, [1, C, 1, 1] uint8, copied once per device: to be read
    only.
    """
    return torch.tensor(colour, dtype=torch.uint8, device=device).view(1, -1, 1, 1)
