"""One operation for each image of a micro-batch, the images grouped by the kind of operation."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ingredients.pixels.color import color
from trainer.ingredients.pixels.filters import sharpness
from trainer.ingredients.pixels.geometry import INTERPOLATIONS, MATRICES, affine
from trainer.ingredients.pixels.lookup import TABLES, look_up

BLENDS = {"color": color, "sharpness": sharpness}
OPERATIONS = (*TABLES, *MATRICES, *BLENDS)
"""All names; a drawn operation is a place in here. The first one, "identity", changes nothing."""


def operate(
    images: Tensor, operation: Tensor, argument: Tensor, interpolation: Tensor, fill: tuple[int, ...]
) -> Tensor:
    """Each image after its own operation: [B, C, H, W] uint8 to the same.

    operation: [B] int64, places in OPERATIONS. argument: [B] float64, in the operation's own unit.
    interpolation: [B] int64, places in INTERPOLATIONS, read by operations that move pixels.
    fill: one value in 0..255 per channel. The three tensors lie on the CPU, so that grouping never waits for a device.
    """
    result = images.clone()
    for rows, kind in _groups(operation, interpolation):
        there = rows.to(images.device)
        chosen, names, values = images[there], [OPERATIONS[place] for place in operation[rows].tolist()], argument[rows]
        if kind == "look_up":
            changed = look_up(chosen, _tables(chosen, operation[rows], values))
        elif kind in BLENDS:
            changed = BLENDS[kind](chosen, values)
        else:
            changed = affine(chosen, _matrices(operation[rows], values, *images.shape[2:]), kind, fill)
        result[there] = changed
    return result
