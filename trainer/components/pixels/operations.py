"""One operation for each image of a micro-batch, the images grouped by what one call can serve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.components.pixels.by_pil import affine_by_pil
from trainer.components.pixels.color import color
from trainer.components.pixels.filters import sharpness
from trainer.components.pixels.geometry import affine
from trainer.components.pixels.lookup import FIXED, MEASURED, look_up
from trainer.components.pixels.matrices import MATRICES
from trainer.components.transfer import on

BLENDS = {"color": color, "sharpness": sharpness}
# A drawn operation is a place in here. The first one changes nothing.
OPERATIONS = ("identity", *FIXED, *MEASURED, *MATRICES, *BLENDS)
_PIL_FROM_PX = 1 << 14  # of an image: of fewer, many at once are moved faster by tensor operations
_CACHED_PX = 1 << 17


def operate(
    images: Tensor,
    operation: Tensor,
    argument: Tensor,
    interpolation: Tensor,
    fill: tuple[int, ...],
) -> Tensor:
    """Each image after its own operation: [B, C, H, W] uint8 to the same.

    operation: [B] int64, places in OPERATIONS. argument: [B] float64, in the operation's own unit.
    interpolation: [B] int64, places in INTERPOLATIONS, read by the operations that move pixels.
    fill: one value in 0..255 per channel, where pixels are missing.
    These three tensors lie on the CPU, so that grouping never waits for the images' device.
    """
    images = images.contiguous()
    places, arguments, filters = operation.numpy(), argument.numpy(), interpolation.numpy()
    done = images.clone()
    for kind, members in _groups(places).items():
        for start in range(0, len(members), at_once := _images_at_once(images, kind)):
            rows = np.array(members[start : start + at_once])
            names = [OPERATIONS[place] for place in places[rows]]
            _put(
                done,
                rows,
                _changed(_taken(images, rows), kind, names, arguments[rows], filters[rows], fill),
            )
    return done


def changed_where(
    images: Tensor, is_chosen: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]
) -> Tensor:
    """Some images [B, C, H, W] after `change` of them [N, C, H, W] and their places [N], the others
    as before. is_chosen: [B] bool.
    """
    rows = np.flatnonzero(is_chosen)
    if not len(rows):
        return images
    done = images.clone(memory_format=torch.contiguous_format)
    _put(done, rows, change(_taken(images.contiguous(), rows), rows))
    return done


def _taken(images: Tensor, rows: np.ndarray) -> Tensor:
    if (
        images.device.type == "cpu"
    ):  # by NumPy, which copies whole images where torch goes value by value
        return images[rows[0], None] if len(rows) == 1 else torch.from_numpy(images.numpy()[rows])
    return images.index_select(0, on(images.device, rows))


def _put(images: Tensor, rows: np.ndarray, changed: Tensor) -> None:
    """Write the changed ones [N, C, H, W] into their rows."""
    if images.device.type == "cpu":
        images.numpy()[rows[0] if len(rows) == 1 else rows] = changed.numpy()
    else:
        images.index_copy_(0, on(images.device, rows), changed)


def _images_at_once(images: Tensor, kind: str) -> int:
    """How many images one call takes: on a CPU few enough for the intermediate results to stay in
    its cache.
    """
    if images.device.type != "cpu" or kind == "look up":  # which has none
        return len(images)
    return max(1, _CACHED_PX // images[0, 0].numel())


def _groups(places: np.ndarray) -> dict[str, list[int]]:
    """The images to be changed by what has to be done: a look-up, a blend, or a movement along "x",
    "y" or "xy".
    """
    groups: dict[str, list[int]] = {}
    for image, place in enumerate(places.tolist()):
        name = OPERATIONS[place]
        if name == "identity":
            continue
        is_table = name in FIXED or name in MEASURED
        kind = "look up" if is_table else MATRICES[name][1] if name in MATRICES else name
        groups.setdefault(kind, []).append(image)
    return groups


def _changed(
    images: Tensor,
    kind: str,
    names: list[str],
    arguments: np.ndarray,
    filters: np.ndarray,
    fill: tuple[int, ...],
) -> Tensor:
    """Images of one kind after their operations: [N, C, H, W] uint8 to the same."""
    match kind:
        case "look up":
            return look_up(images, _tables(images, names, arguments))
        case "xy" if images.device.type == "cpu" and images[0, 0].numel() >= _PIL_FROM_PX:
            return affine_by_pil(
                images, _matrices(names, arguments, *images.shape[2:]), filters, fill
            )
        case "x" | "y" | "xy":
            return affine(
                images, _matrices(names, arguments, *images.shape[2:]), filters, kind, fill
            )
        case _:
            return BLENDS[kind](images, arguments)


def _tables(images: Tensor, names: list[str], arguments: np.ndarray) -> Tensor:
    """The table of each image and channel: [N, C, 256] uint8."""
    fixed = np.zeros((len(names), 256), dtype=np.uint8)
    rows = _rows(names)
    for name in rows.keys() & FIXED:
        fixed[rows[name]] = FIXED[name](arguments[rows[name]])
    tables = on(images.device, fixed)[:, None].repeat(1, images.shape[1], 1)
    for name in rows.keys() & MEASURED:
        there = on(images.device, rows[name])
        tables[there] = MEASURED[name](_taken(images, rows[name]), arguments[rows[name]])
    return tables


def _matrices(names: list[str], arguments: np.ndarray, height: int, width: int) -> np.ndarray:
    """The matrix of each image: [N, 6] float64."""
    matrices = np.empty((len(names), 6))
    for name, rows in _rows(names).items():
        matrices[rows] = MATRICES[name][0](arguments[rows], height, width)
    return matrices


def _rows(names: list[str]) -> dict[str, np.ndarray]:
    """Where each name stands: [n] int64 each."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(places) for name, places in rows.items()}
