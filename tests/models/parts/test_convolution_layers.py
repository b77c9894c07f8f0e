"""Deformable, self-calibrated and blurred convolutions, against plain loops, torch and timm."""

import copy

import pytest
import torch
from timm.layers import BlurPool2d
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.parts.convolution_layers import (
    Blur,
    BlurConv2d,
    DeformableConv2d,
    SelfCalibratedConv2d,
)

OPTIONS = [
    {"padding": 1},
    {"padding": 1, "stride": 2, "bias": False},
    {"padding": 2, "dilation": 2, "groups": 2},
]


def double(module):
    return module.double(), torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)


def gradients_are_right(module, images):
    torch.manual_seed(1)
    weights = {
        name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()
    }

    def run(images, *values):
        return torch.func.functional_call(
            module, dict(zip(weights, values, strict=True)), (images,)
        )

    return torch.autograd.gradcheck(run, (images, *weights.values()), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_with_zero_offsets_the_deformable_is_the_plain_convolution(options):
    conv = nn.Conv2d(4, 6, 3, **options)
    made = DeformableConv2d.around(conv)
    images = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(made(images), conv(images), rtol=1e-5, atol=1e-5)
    assert made.weight is conv.weight


def bilinear(image, row, column):
    """One channel [H, W] between its pixels, nothing outside."""
    height, width = image.shape
    value = 0.0
    top, left = int(row // 1), int(column // 1)
    for y in (top, top + 1):
        for x in (left, left + 1):
            if 0 <= y < height and 0 <= x < width:
                value += float(image[y, x]) * (1 - abs(row - y)) * (1 - abs(column - x))
    return value


def test_the_deformable_follows_its_formula():
    torch.manual_seed(0)
    made, images = double(DeformableConv2d(4, 2, 3, stride=2, padding=1))
    nn.init.normal_(made.offsets.weight, std=0.2)
    nn.init.normal_(made.offsets.bias, std=0.3)
    told = made.offsets(images).detach()
    found = made(images).detach()
    weight = made.weight.detach()
    for b, c, y, x in [(0, 0, 0, 0), (1, 1, 1, 2), (0, 1, 2, 1)]:
        value = float(made.bias[c])
        for tap in range(9):
            down, right = told[b, 2 * tap, y, x], told[b, 2 * tap + 1, y, x]
            mask = 2 / (1 + torch.exp(-told[b, 18 + tap, y, x]))
            row, column = float(2 * y - 1 + tap // 3 + down), float(2 * x - 1 + tap % 3 + right)
            for channel in range(4):
                value += float(weight[c, channel, tap // 3, tap % 3] * mask) * bilinear(
                    images[b, channel], row, column
                )
        assert abs(value - float(found[b, c, y, x])) < 1e-8
    assert gradients_are_right(made, images)


def test_the_deformable_counts_as_two_convolutions():
    made = DeformableConv2d(4, 6, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        made(torch.randn(1, 4, 8, 8))
    assert counter.get_total_flops() == 2 * 64 * 9 * 4 * (6 + 27)


def test_deformable_and_self_calibrated_work_under_bf16_autocast_and_go_round():
    for made in (DeformableConv2d(4, 4, 3, padding=1), SelfCalibratedConv2d(4, 4, 1, 1, 1, 2)):
        with torch.autocast("cpu", torch.bfloat16):
            made(torch.randn(2, 4, 8, 8)).float().sum().backward()
        assert all(weight.grad.isfinite().all() for weight in made.parameters())
        twin = copy.deepcopy(made)
        twin.load_state_dict(made.state_dict())
        images = torch.randn(2, 4, 8, 8)
        assert torch.equal(twin.eval()(images), made.eval()(images))


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_the_self_calibrated_follows_its_formula(stride, groups):
    torch.manual_seed(0)
    made = SelfCalibratedConv2d(8, 12, stride, 1, groups, 4).double().eval()
    for norm in (made.context_norm, made.content_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    first, second = images[:, :4], images[:, 4:]
    half = max(1, groups // 2)

    def conv(given, layer, step=1):
        return functional.conv2d(given, layer.weight, stride=step, padding=1, groups=half)

    def norm(given, layer):
        mean, variance = layer.running_mean[:, None, None], layer.running_var[:, None, None]
        return (given - mean) / (variance + 1e-5).sqrt()

    pooled = torch.stack(
        [second[:, :, y : y + 4, x : x + 4].mean((2, 3)) for y in (0, 4) for x in (0, 4)], 2
    )
    context = norm(conv(pooled.view(2, 4, 2, 2), made.context), made.context_norm)
    rows = [int(place * 2 / 9) for place in range(9)]
    gate = 1 / (1 + torch.exp(-(second + context[:, :, rows][:, :, :, rows])))
    gated = conv(norm(conv(second, made.content), made.content_norm) * gate, made.gated, stride)
    torch.testing.assert_close(made(images), torch.cat([conv(first, made.plain, stride), gated], 1))
    # four convolutions of half the channels each, and two norms
    assert (
        sum(weight.numel() for weight in made.parameters())
        == 9 * (2 * 4 * 6 + 2 * 4 * 4) // half + 4 * 4
    )


def test_the_self_calibrateds_gradients_are_those_of_finite_differences():
    assert gradients_are_right(*double(SelfCalibratedConv2d(4, 4, 2, 1, 1, 2)))


@pytest.mark.parametrize("filter_px", [3, 5])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_the_blur_is_timms(filter_px, padding):
    theirs = BlurPool2d(3, filter_px, 2, pad_mode="reflect" if padding == "reflect" else "constant")
    for side in (8, 9):
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(Blur(filter_px, 2, padding)(images), theirs(images))


@pytest.mark.parametrize("filter_px", range(2, 8))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_blur_keeps_a_constant_and_the_size(filter_px, stride):
    made = Blur(filter_px, stride, "reflect")(torch.full((1, 2, 10, 11), 3.0))
    torch.testing.assert_close(made, torch.full((1, 2, -(-10 // stride), -(-11 // stride)), 3.0))


def test_the_blur_before_a_strided_convolution_is_a_plain_loop():
    torch.manual_seed(0)
    conv, images = double(nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False))
    taps = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    blurred = torch.zeros_like(images)
    for y in range(6):
        for x in range(6):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < 6 and 0 <= x + dx < 6:
                        blurred[:, :, y, x] += (
                            images[:, :, y + dy, x + dx] * taps[dy + 1][dx + 1] / 16
                        )
    wanted = conv(blurred)
    torch.testing.assert_close(
        BlurConv2d(conv, 3, "zeros", is_before=True).double()(images), wanted
    )


def test_the_blur_after_is_timms_behind_a_convolution_of_stride_1():
    conv = nn.Conv2d(4, 3, 3, stride=2, padding=1)
    images = torch.randn(2, 4, 8, 8)
    theirs = BlurPool2d(3)(functional.conv2d(images, conv.weight, conv.bias, padding=1))
    made = BlurConv2d(conv, 3, "reflect", is_before=False)
    torch.testing.assert_close(made(images), theirs)
    assert set(made.state_dict()) == {"conv.weight", "conv.bias"}
