"""Group norm on a GPU, of half precision in half precision.

Maps are [B, C, H, W] channels_last: in memory [B, P, C] with P = H * W places. A program takes
BLOCK_P places and BLOCK_C channels at a time. Needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_P, _BLOCK_C = 32, 64
_LAUNCH = {"enable_fp_fusion": True}  # Triton's default is about to change
_WANTED_PROGRAMS = 1024  # several for each multiprocessor


class HalfGroupNorm(torch.autograd.Function):
    """x [B, C, H, W] bf16 or fp16 to the same type, weight and bias [C] float32 or None.

    Forward: x is read twice and written once; backward: x and its gradient are read twice, one is
    written. Source: Wu and He 2018, arXiv:1803.08494.
    """

    @staticmethod
    def forward(ctx, x: Tensor, groups: int, weight, bias, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        b, c, num_places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        partial, grid = _partial(x, b, c, num_places)
        _moments[grid](x, partial, num_places, c, partial.shape[1], _BLOCK_P, _BLOCK_C, **_LAUNCH)
        # for each image and channel: the group's mean and 1 / deviation, and y = x * a + b
        table = x.new_empty(b, 4, c, dtype=torch.float32)
        _finish_moments[b, groups](
            x, partial, weight, bias, table, num_places, c, c // groups, partial.shape[1], eps,
            weight is not None, bias is not None, triton.next_power_of_2(c // groups), **_LAUNCH,
        )  # fmt: skip
        y = torch.empty_like(x)
        _scale[_tiles(b, num_places, c)](x, table, y, num_places, c, _BLOCK_P, _BLOCK_C, **_LAUNCH)
        ctx.save_for_backward(x, table, weight)
        ctx.groups, ctx.has_bias = groups, bias is not None
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, table, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        b, c, num_places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        partial, grid = _partial(x, b, c, num_places)
        _gradient_sums[grid](
            x, grad, table, partial, num_places, c, partial.shape[1], _BLOCK_P, _BLOCK_C, **_LAUNCH
        )
        # for each image and channel: gradients of weight and bias
        sums = x.new_empty(2, b, c, dtype=torch.float32)
        means = x.new_empty(b, 2, c, dtype=torch.float32)
        _finish_gradient_sums[b, ctx.groups](
            partial, weight, table, sums, means, num_places, c, c // ctx.groups, partial.shape[1],
            b, weight is not None, triton.next_power_of_2(c // ctx.groups), **_LAUNCH,
        )  # fmt: skip
        made = torch.empty_like(x)
        _gradient[_tiles(b, num_places, c)](
            x, grad, table, means, made, num_places, c, _BLOCK_P, _BLOCK_C, **_LAUNCH
        )
        grad_weight, grad_bias = sums.sum(1)
        return (
            made, None, grad_weight if weight is not None else None,
            grad_bias if ctx.has_bias else None, None,
        )  # fmt: skip


def _partial(x: Tensor, b: int, c: int, num_places: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Room for two sums over a share of the places, [B, S, 2, C] float32, and the programs that
    make them. Without atomic additions: the same bits each time.
    """
    num_blocks = triton.cdiv(c, _BLOCK_C)
    most = triton.cdiv(num_places, _BLOCK_P)
    number = min(most, max(1, _WANTED_PROGRAMS // (b * num_blocks)))
    return x.new_empty(b, number, 2, c, dtype=torch.float32), (b, number, num_blocks)


def _tiles(b: int, num_places: int, c: int) -> tuple[int, int, int]:
    return b, triton.cdiv(num_places, _BLOCK_P), triton.cdiv(c, _BLOCK_C)


@triton.jit
def _moments(x, partial, num_places, c, num_shares, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of x - k and of its square, k being the first place's value, so that the square of a
    large mean cancels nothing.
    """
    image, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += image * num_places * c
    is_channel = channel < c
    first = tl.load(x + channel, is_channel, 0.0).to(tl.float32)
    one, two = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(share * BLOCK_P, num_places, num_shares * BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        here = (place < num_places)[:, None] & is_channel[None, :]
        value = tl.load(x + place[:, None] * c + channel[None, :], here, 0.0).to(tl.float32)
        value = tl.where(here, value - first[None, :], 0.0)
        one += tl.sum(value, 0)
        two += tl.sum(value * value, 0)
    partial += (image * num_shares + share) * 2 * c
    tl.store(partial + channel, one, is_channel)
    tl.store(partial + c + channel, two, is_channel)


@triton.jit
def _finish_moments(
    x, partial, weight, bias, table, num_places, c, each, num_shares, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one group of one image."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    here, channel = within < each, group * each + within
    partial += image * num_shares * 2 * c
    one, two = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for share in range(num_shares):
        one += tl.load(partial + share * 2 * c + channel, here, 0.0)
        two += tl.load(partial + share * 2 * c + c + channel, here, 0.0)
    first = tl.load(x + image * num_places * c + channel, here, 0.0).to(tl.float32)
    means = first + one / num_places
    mean = tl.sum(tl.where(here, means, 0.0), 0) / each
    away = tl.where(here, means - mean, 0.0)
    squares = tl.sum(two - one * one / num_places + num_places * away * away, 0)
    scale = 1 / tl.sqrt(squares / (each * num_places) + eps)
    a = tl.zeros([BLOCK], tl.float32) + scale
    if HAS_WEIGHT:
        a = a * tl.load(weight + channel, here, 0.0)
    b = -mean * a
    if HAS_BIAS:
        b += tl.load(bias + channel, here, 0.0)
    table += image * 4 * c + channel
    tl.store(table, tl.zeros([BLOCK], tl.float32) + mean, here)
    tl.store(table + c, tl.zeros([BLOCK], tl.float32) + scale, here)
    tl.store(table + 2 * c, a, here)
    tl.store(table + 3 * c, b, here)


@triton.jit
def _scale(x, table, y, num_places, c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = x * a + b."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < c
    here = (place < num_places)[:, None] & is_channel[None, :]
    offset = image * num_places * c + place[:, None] * c + channel[None, :]
    table += image * 4 * c + channel
    a, b = tl.load(table + 2 * c, is_channel, 0.0), tl.load(table + 3 * c, is_channel, 0.0)
    value = tl.load(x + offset, here, 0.0).to(tl.float32) * a[None, :] + b[None, :]
    tl.store(y + offset, value.to(y.dtype.element_ty), here)


@triton.jit
def _gradient_sums(
    x, grad, table, partial, num_places, c, num_shares, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums of the gradient, and of it times the normalized value."""
    image, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < c
    table += image * 4 * c + channel
    mean, scale = tl.load(table, is_channel, 0.0), tl.load(table + c, is_channel, 0.0)
    x += image * num_places * c
    grad += image * num_places * c
    one, two = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(share * BLOCK_P, num_places, num_shares * BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        here = (place < num_places)[:, None] & is_channel[None, :]
        offset = place[:, None] * c + channel[None, :]
        value = (tl.load(x + offset, here, 0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        slope = tl.load(grad + offset, here, 0.0).to(tl.float32)
        one += tl.sum(slope, 0)
        two += tl.sum(slope * value, 0)
    partial += (image * num_shares + share) * 2 * c
    tl.store(partial + channel, one, is_channel)
    tl.store(partial + c + channel, two, is_channel)


@triton.jit
def _finish_gradient_sums(
    partial, weight, table, sums, means, num_places, c, each, num_shares, num_images,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one group of one image: gradients of weight and bias, and the means that a gradient loses,
    times the scale.
    """
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    here, channel = within < each, group * each + within
    partial += image * num_shares * 2 * c
    one, two = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for share in range(num_shares):
        one += tl.load(partial + share * 2 * c + channel, here, 0.0)
        two += tl.load(partial + share * 2 * c + c + channel, here, 0.0)
    tl.store(sums + image * c + channel, two, here)
    tl.store(sums + (num_images + image) * c + channel, one, here)
    if HAS_WEIGHT:
        gamma = tl.load(weight + channel, here, 0.0)
        one, two = one * gamma, two * gamma
    scale = tl.load(table + image * 4 * c + c + channel, here, 0.0)
    number = each * num_places
    means += image * 2 * c + channel
    tl.store(means, scale * (tl.sum(one, 0) / number), here)
    tl.store(means + c, scale * scale * (tl.sum(two, 0) / number), here)


@triton.jit
def _gradient(
    x, grad, table, means, made, num_places, c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of x: grad * a, less its mean and its part along the normalized value."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < c
    here = (place < num_places)[:, None] & is_channel[None, :]
    offset = image * num_places * c + place[:, None] * c + channel[None, :]
    table += image * 4 * c + channel
    means += image * 2 * c + channel
    mean, a = tl.load(table, is_channel, 0.0), tl.load(table + 2 * c, is_channel, 0.0)
    one, two = tl.load(means, is_channel, 0.0), tl.load(means + c, is_channel, 0.0)
    away = tl.load(x + offset, here, 0.0).to(tl.float32) - mean[None, :]
    slope = tl.load(grad + offset, here, 0.0).to(tl.float32)
    value = slope * a[None, :] - one[None, :] - away * two[None, :]
    tl.store(made + offset, value.to(made.dtype.element_ty), here)
