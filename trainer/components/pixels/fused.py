"""On a GPU: whole micro-batches by two kernels a round of operations, and one for the model's
input.

The tensor operations beside it do the same in hundreds of launches, and are what a CPU does. What
the host has drawn goes to the device as one array a call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.components.augmentation import InKernel
from trainer.components.mixing import Mix, MixOfEach, UnitMixes
from trainer.components.pixels import rows
from trainer.components.pixels.geometry import INTERPOLATIONS
from trainer.components.pixels.lookup import FIXED, MEASURED
from trainer.components.pixels.matrices import MATRICES
from trainer.components.transfer import colour_on, on

_NEAREST, _BICUBIC = (INTERPOLATIONS.index(name) for name in ("nearest", "bicubic"))
_FIXED_POINT = 65536.0  # PIL reads nearest pixels in steps of 2**-16 px
_TABLES_FOR = dict(zip(("contrast", "autocontrast", "equalize"), rows.MEASURED, strict=True))
_BLENDS = {"color": rows.COLOR, "sharpness": rows.SHARPNESS}
_OPERATED_PX, _MEASURED_PX, _NUM_VALUES = 1024, 2048, 2048  # of one program


@functools.cache
def _kernels() -> Any:
    """The kernels' module. Triton is not everywhere, and costs a second of importing."""
    from trainer.components.pixels import kernels

    return kernels


def launch(name: str, grid: tuple[int, int], *given: Any, **constants: Any) -> None:
    """A kernel on the device of its first argument; no multiplication and addition become one."""
    with torch.cuda.device_of(given[0]):
        getattr(_kernels(), name)[grid](*given, **constants, enable_fp_fusion=False)


class _Packed(NamedTuple):
    """Rounds of operations as the kernels read them.

    numbers: [R, B, OPERATION_LENGTH] float64. measured: [M, TABLE_LENGTH] float64, one round's
    after the other's. tables: [T, 256] uint8, first those known, then room for C of each measured.
    """

    numbers: np.ndarray
    measured: np.ndarray
    tables: np.ndarray


def operate_in_turn(
    images: Tensor,
    places: np.ndarray,
    arguments: np.ndarray,
    filters: np.ndarray,
    names: Sequence[str],
    fill: tuple[int, ...],
) -> Tensor:
    """`choice.operate_in_turn` by kernels: two launches a round.

    images: [B, C, H, W] uint8. places: [B, R], each an operation's in `names`. arguments, filters:
    [B, R].
    """
    images = images.contiguous()
    num_images, num_channels, height, width = images.shape
    packed, counts = _packed(places.T, arguments.T, filters.T, names, images.shape)
    parts = [part.reshape(-1).view(np.uint8) for part in packed]
    there = on(images.device, np.concatenate(parts)).split([len(part) for part in parts])
    numbers, measured = there[0].view(torch.float64), there[1].view(torch.float64)
    num_known = len(packed.tables) - sum(counts) * num_channels
    done = 0
    for number, count in enumerate(counts):
        if count:
            launch(
                "measure_kernel", (count, num_channels), images,
                measured[done * rows.TABLE_LENGTH :],
                there[2][(num_known + done * num_channels) * 256 :], height * width,
                C=num_channels, BLOCK=_MEASURED_PX,
            )  # fmt: skip
            done += count
        result = torch.empty_like(images)
        launch(
            "operate_kernel", (num_images, -(-height * width // _OPERATED_PX)), images, result,
            numbers[number * num_images * rows.OPERATION_LENGTH :], there[2],
            colour_on(images.device, fill), height, width, C=num_channels, BLOCK=_OPERATED_PX,
        )  # fmt: skip
        images = result
    return images


def _packed(
    places: np.ndarray,
    arguments: np.ndarray,
    filters: np.ndarray,
    names: Sequence[str],
    shape: Sequence[int],
) -> tuple[_Packed, list[int]]:
    """The operations [R, B] on images of a shape [B, C, H, W], and how many tables each round
    measures.
    """
    numbers = np.zeros((*places.shape, rows.OPERATION_LENGTH))
    known: list[np.ndarray] = []
    measured, measured_at = [], []
    for place in np.unique(places).tolist():
        name, at = names[place], np.nonzero(places == place)
        argument = arguments[at]
        if name in FIXED:
            tables = np.broadcast_to(FIXED[name](argument), (len(argument), 256)).astype(np.uint8)
            first = sum(len(each) for each in known)
            numbers[at[0], at[1], :2] = _columns(rows.LOOK_UP, first + np.arange(len(tables)))
            known.append(tables)
        elif name in MEASURED:
            measured_at.append(at)
            measured.append(_columns(at[1], _TABLES_FOR[name], argument))
        elif name in MATRICES:
            matrix_of, axes = MATRICES[name]
            numbers[at] = _moves(matrix_of(argument, *shape[2:]), filters[at], axes)
        elif name in _BLENDS:
            numbers[at[0], at[1], :2] = _columns(_BLENDS[name], argument)
    num_known = sum(len(each) for each in known)
    counts, in_order = [0] * len(places), np.empty((0, rows.TABLE_LENGTH))
    if measured:
        rounds, images = np.concatenate(measured_at, 1)
        order = np.argsort(rounds, kind="stable")
        counts = np.bincount(rounds, minlength=len(places)).tolist()
        in_order = np.concatenate(measured)[order]
        firsts = num_known + shape[1] * np.arange(len(order))
        numbers[rounds[order], images[order], :3] = _columns(rows.LOOK_UP, firsts, 1)
    room = np.empty((sum(counts) * shape[1], 256), np.uint8)
    return _Packed(numbers, in_order, np.concatenate([*known, room])), counts


def _columns(*columns: Any) -> np.ndarray:
    """[n, columns] float64 of arrays [n] and numbers."""
    return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float64)


def _moves(matrices: np.ndarray, filters: np.ndarray, axes: str) -> np.ndarray:
    """Rows of operations that move pixels along axes "x", "y" or "xy": [n, OPERATION_LENGTH].

    In the order in which geometry.affine rounds.
    """
    a, b, c, d, e, f = matrices.T
    is_bicubic = filters == _BICUBIC
    across, down = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5  # of the first pixel's centre
    if filters.max() == _NEAREST:
        six = np.floor(np.stack([across, b, a, down, e, d]) * _FIXED_POINT + 0.5)
        return _columns(rows.NEAREST, is_bicubic, *six)
    if axes == "xy":
        return _columns(rows.ALONG_BOTH, is_bicubic, across - 0.5, b, a, down - 0.5, e, d)
    start, per_line = (c, b) if axes == "x" else (f, d)
    kind = rows.ALONG_X if axes == "x" else rows.ALONG_Y
    return _columns(kind, is_bicubic, start + per_line * 0.5, per_line, 0, 0, 0, 0)


def model_inputs(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    augmented: InKernel | None = None,
    mixes: UnitMixes | None = None,
) -> Tensor:
    """The model's inputs of images [B, C, H, W] uint8 in one launch: normalized, augmented, mixed,
    in its type and memory format.

    mean, std: C float32 values on the images' device, in grey levels.
    """
    images = images.contiguous()
    num_channels, height, width = images.shape[1:]
    numbers = _input_rows(len(images), augmented, mixes)
    num_results = len(images) if mixes is None else len(mixes.own_rows)
    size = num_results, num_channels, height, width
    result = torch.empty(size, dtype=dtype, device=images.device, memory_format=memory_format)
    launch(
        "inputs_kernel", (num_results, -(-num_channels * height * width // _NUM_VALUES)), images,
        result, on(images.device, numbers), mean, std, height, width, C=num_channels,
        ROW_LENGTH=numbers.shape[1], ERASED=_erased(augmented),
        MIXED=mixes is not None, CHANNELS_LAST=memory_format == torch.channels_last,
        BLOCK=_NUM_VALUES,
    )  # fmt: skip
    return result


def _erased(augmented: InKernel | None) -> int:
    if augmented is None or augmented.box is None:
        return rows.NO_BOX
    return rows.ZERO if augmented.noise_key is None else rows.NOISE


def _input_rows(num_images: int, augmented: InKernel | None, mixes: UnitMixes | None) -> np.ndarray:
    """[B, COLOUR + its channels] int32."""
    colour = None if augmented is None else augmented.colour
    length = rows.COLOUR + (0 if colour is None else colour.shape[1])
    numbers = np.zeros((num_images, length), np.int32)
    floats = numbers.view(np.float32)
    numbers[:, rows.SOURCE] = numbers[:, rows.PARTNER] = np.arange(num_images)
    if augmented is not None and augmented.box is not None:
        numbers[:, rows.BOX : rows.BOX + 4] = augmented.box
        if augmented.noise_key is not None:
            numbers[:, rows.KEY] = augmented.noise_key.astype(np.uint32).view(np.int32)
    if colour is not None:
        floats[:, rows.COLOUR :] = colour
    if mixes is None:
        return numbers
    own = mixes.own_rows
    numbers[: len(own), rows.SOURCE] = own
    for places, mix in mixes.units:
        unit = numbers[places]
        unit[:, rows.PARTNER] = mixes.mixing.partners(np.arange(num_images)[places])
        of_images = floats[places]
        if not isinstance(mix, MixOfEach):
            _put_mix(unit, of_images, mix)
            continue
        for place, one in enumerate(mix.each):
            _put_mix(unit[place : place + 1], of_images[place : place + 1], one)
    return numbers


def _put_mix(numbers: np.ndarray, floats: np.ndarray, mix: Mix) -> None:
    """One mix into the rows of images: two views of the same [n, COLOUR + its channels]."""
    if mix.box is None:
        floats[:, rows.SHARE], floats[:, rows.REST] = mix.share, 1 - mix.share
    else:
        numbers[:, rows.PASTED : rows.PASTED + 4] = mix.box
        floats[:, rows.SHARE] = 1
