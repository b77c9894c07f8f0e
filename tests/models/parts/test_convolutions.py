"""Which convolutions of timm's models are exchanged or dilated, and that the dilated models are
timm's own.
"""

import copy

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.blur import Blur, BlurConv2d
from trainer.models.parts.convolutions import (
    Deformable,
    DeformableConv2d,
    Dilated,
    SelfCalibrated,
    SelfCalibratedConv2d,
)

# resnet18 has 4 convolutions of 3x3 in a stage; the bottlenecks one each: 3, 4, 6, 3.
EXCHANGED = {
    ("resnet18", Deformable(stages=2)): (8, "layer3.0.conv1", "layer4.1.conv2"),
    ("resnet50d", Deformable(stages=1)): (3, "layer4.0.conv2", "layer4.2.conv2"),
    ("resnet50d", SelfCalibrated(stages=4, pooling=4)): (16, "layer1.0.conv2", "layer4.2.conv2"),
    ("resnext50_32x4d", SelfCalibrated(stages=2, pooling=2)): (
        9,
        "layer3.0.conv2",
        "layer4.2.conv2",
    ),
    ("resnetv2_50", Deformable(stages=3)): (
        13,
        "stages.1.blocks.0.conv2",
        "stages.3.blocks.2.conv2",
    ),
    ("resnetv2_50", SelfCalibrated(stages=1, pooling=4)): (
        3,
        "stages.3.blocks.0.conv2",
        "stages.3.blocks.2.conv2",
    ),
    ("regnetx_002", SelfCalibrated(stages=1, pooling=2)): (
        7,
        "s4.b1.conv2.conv",
        "s4.b7.conv2.conv",
    ),
}


@pytest.mark.parametrize(
    ("name", "part"), EXCHANGED, ids=lambda value: getattr(value, "name", value)
)
def test_the_3x3s_of_the_last_stages_are_exchanged(name, part):
    count, first, last = EXCHANGED[name, part]
    model = timm.create_model(name, num_classes=3)
    images = torch.randn(1, 3, 128, 128)
    size = model.eval().forward_features(images).shape
    replacement = part.apply(model.train(), 128)
    assert (len(replacement.places), replacement.places[0], replacement.places[-1]) == (
        count,
        first,
        last,
    )
    assert replacement.before == (("Conv2d", count),)
    kind = DeformableConv2d if part.name == "deformable" else SelfCalibratedConv2d
    assert [name for name, module in model.named_modules() if isinstance(module, kind)] == list(
        replacement.places
    )
    assert model.eval().forward_features(images).shape == size


def test_a_deformable_model_starts_as_the_plain_one():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    Deformable(stages=4).apply(model, 64)
    torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "name"),
    [(Deformable(stages=1), "convnext_atto"),
     (SelfCalibrated(stages=4, pooling=4), "convnext_tiny"),
     (SelfCalibrated(stages=4, pooling=4), "resnet18"),
     (SelfCalibrated(stages=4, pooling=4), "res2net50_26w_4s"),
     (Dilated(stages=4), "resnet18"), (Dilated(stages=4), "convnext_atto")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_what_makes_no_sense_is_refused(part, name):
    model = timm.create_model(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ReplacementError, match=r"^model.convolution: [^\n]+$"):
        part.apply(model, 64)
    assert before == [type(module) for module in model.modules()]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "resnext50_32x4d", "resnetv2_50", "convnext_atto"]
)
def test_dilated_models_are_timms_with_an_output_stride(name, stages):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=3, output_stride=32 // 2**stages).eval()
    model = timm.create_model(name, num_classes=3).eval()
    model.load_state_dict(theirs.state_dict())
    replacement = Dilated(stages=stages).apply(model, 64)
    images = torch.randn(1, 3, 64, 64)
    wanted = theirs.forward_features(images)
    torch.testing.assert_close(model.forward_features(images), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape[2] == 2 * 2**stages
    assert replacement.note.endswith(f" by {2**stages}") and len(replacement.places) > 2 * stages


def test_padding_same_stays_the_same():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    other = copy.deepcopy(model)
    other.layer4[1].conv1.padding = "same"
    images = torch.randn(1, 3, 64, 64)
    for each in (model, other):
        Dilated(stages=1).apply(each, 64)
    torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)


def test_convnext_with_channels_last_norms_is_dilated_too():
    torch.manual_seed(0)
    theirs = timm.create_model(
        "convnext_tiny", depths=(1, 1, 1, 2), num_classes=3, output_stride=16
    ).eval()
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 2), num_classes=3).eval()
    model.load_state_dict(theirs.state_dict())
    replacement = Dilated(stages=1).apply(model, 64)
    assert replacement.places == (
        "stages.3.downsample.1",
        "stages.3.blocks.0.conv_dw",
        "stages.3.blocks.1.conv_dw",
    )
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "part", [Deformable(stages=2), Dilated(stages=1)], ids=lambda part: part.name
)
@pytest.mark.parametrize("name", ["test_resnet"])
def test_gradients_reach_every_parameter_and_the_state_goes_round(part, name):
    check(part, name)


def test_self_calibrated_gradients_reach_every_parameter_and_the_state_goes_round():
    part = SelfCalibrated(stages=4, pooling=2)
    check(part, "resnet50", layers=(1, 1, 1, 1))


def check(part, name, **options):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(timm.create_model(name, num_classes=3, **options))
        part.apply(models[-1], 64)
    model, other = models
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), other.parameters(), strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64)).float().square().sum().backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters()
    )
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(images), other.eval()(images))


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
