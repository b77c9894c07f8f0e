"""One operation for each image of a micro-batch, the images grouped by kind of operation."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ingredients.pixels.color import color
from trainer.ingredients.pixels.filters import sharpness
from trainer.ingredients.pixels.geometry import INTERPOLATIONS, MATRICES, affine
from trainer.ingredients.pixels.lookup import TABLES, look_up

BLENDS = {"color": color, "sharpness": sharpness}
# A drawn operation is a place in here. The first one, "identity", changes nothing.
OPERATIONS = ("identity", *TABLES, *MATRICES, *BLENDS)
_CACHED_PX = 1 << 17


def operate(
    images: Tensor, operation: Tensor, argument: Tensor, interpolation: Tensor, fill: tuple[int, ...]
) -> Tensor:
    """Each image after its own operation: [B, C, H, W] uint8 to the same.

    operation: [B] int64, places in OPERATIONS. argument: [B] float64, in the operation's own unit.
    interpolation: [B] int64, places in INTERPOLATIONS, read by the operations that move pixels.
    fill: one value in 0..255 per channel, where pixels are missing.
    These three tensors lie on the CPU, so that grouping never waits for the images' device.
    """
    done, order = [], []
    for kind, members in _groups(operation.tolist(), interpolation.tolist()).items():
        for rows in torch.tensor(members).split(_images_at_once(images)):
            chosen = images.index_select(0, rows.to(images.device))
            done.append(_changed(chosen, kind, operation[rows], argument[rows], fill))
        order += members
    # Joined and reordered: writing each group to its rows would be the slowest step of all on a CPU.
    return torch.cat(done).index_select(0, torch.tensor(order).argsort().to(images.device))


def _images_at_once(images: Tensor) -> int:
    """How many images one call takes: on a CPU few enough for the intermediate results to stay in its cache."""
    return max(1, _CACHED_PX // images[0, 0].numel()) if images.device.type == "cpu" else len(images)


def _groups(operation: list[int], interpolation: list[int]) -> dict[tuple[str, ...], list[int]]:
    """The images that one call can serve, by kind: ("identity",), ("look_up",), (a blend's name,) or (interpolation, axes)."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for image, (place, filter_place) in enumerate(zip(operation, interpolation, strict=True)):
        name = OPERATIONS[place]
        if name in MATRICES:
            kind = (INTERPOLATIONS[filter_place], MATRICES[name][1])
        else:
            kind = ("look_up",) if name in TABLES else (name,)
        groups.setdefault(kind, []).append(image)
    return groups


def _changed(
    images: Tensor, kind: tuple[str, ...], operation: Tensor, argument: Tensor, fill: tuple[int, ...]
) -> Tensor:
    """Images of one kind after their operations: [N, C, H, W] uint8 to the same."""
    match kind:
        case (interpolation, axes):
            return affine(images, _matrices(operation, argument, *images.shape[2:]), interpolation, axes, fill)
        case ("identity",):
            return images
        case ("look_up",):
            return look_up(images, _tables(images, operation, argument))
        case (blend,):
            return BLENDS[blend](images, argument)


def _tables(images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    """The table of each image and channel: [N, C, 256] uint8."""
    tables = images.new_empty(*images.shape[:2], 256)
    for name, rows in _by_name(operation):
        there = rows.to(images.device)
        tables[there] = TABLES[name](images.index_select(0, there), argument[rows])
    return tables


def _matrices(operation: Tensor, argument: Tensor, height: int, width: int) -> Tensor:
    """The matrix of each image: [N, 6] float64."""
    matrices = argument.new_empty(len(argument), 6)
    for name, rows in _by_name(operation):
        matrices[rows] = MATRICES[name][0](argument[rows], height, width)
    return matrices


def _by_name(operation: Tensor) -> list[tuple[str, Tensor]]:
    """Each operation's name and the rows [n] int64 that have it."""
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(operation.tolist()):
        rows.setdefault(place, []).append(row)
    return [(OPERATIONS[place], torch.tensor(members)) for place, members in rows.items()]
