"""Which convolutions of timm's models are standardized, and what is left, and why."""

import copy

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.standardize import (
    ScaledStandardizedConv2d,
    ScaledWeightStandardization,
    StandardizedConv2d,
    WeightStandardization,
)

SAME = {"variance": "unbiased", "eps": 1e-5, "eps_place": "outside"}


def standardization(of="followed_by_norm", depthwise=False):
    return WeightStandardization(of=of, depthwise=depthwise, **SAME)


# What the models have: resnet18 has 20 convolutions, each before a norm; convnext_atto 40, of them
# 12 depthwise before a norm, a stem before a norm, and 24 pointwise and 3 downsampling ones before
# none.
FOUND = {
    ("resnet18", "followed_by_norm", False): (20, "conv1", "layer4.1.conv2", ""),
    ("resnet18", "all", True): (20, "conv1", "layer4.1.conv2", ""),
    ("resnet50d", "followed_by_norm", False): (55, "conv1.0", "layer4.2.conv3", ""),
    ("resnetv2_50", "followed_by_norm", False): (
        32, "stages.0.blocks.0.conv1", "stages.3.blocks.2.conv2",
        "kept: 21 without a norm directly after",
    ),
    ("resnetv2_50", "all", False): (53, "stem.conv", "stages.3.blocks.2.conv3", ""),
    ("convnext_atto", "followed_by_norm", False): (
        1, "stem.0", "stem.0", "kept: 12 depthwise, 27 without a norm directly after",
    ),
    ("convnext_atto", "all", False): (
        28, "stem.0", "stages.3.blocks.1.mlp.fc2", "kept: 12 depthwise",
    ),
    ("convnext_atto", "followed_by_norm", True): (
        13, "stem.0", "stages.3.blocks.1.conv_dw", "kept: 27 without a norm directly after",
    ),
    ("convnext_tiny", "all", True): (
        22, "stem.0", "stages.3.blocks.2.conv_dw", "kept: 36 Linear, no convolutions",
    ),
    ("convnext_tiny", "all", False): (
        4, "stem.0", "stages.3.downsample.1", "kept: 18 depthwise, 36 Linear, no convolutions",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "of", "depthwise"), FOUND)
def test_the_right_convolutions_are_replaced(name, of, depthwise):
    count, first, last, note = FOUND[name, of, depthwise]
    model = timm.create_model(name)
    parameters = dict(model.named_parameters())
    replacement = standardization(of, depthwise).apply(model, 64)
    assert (
        len(replacement.places),
        replacement.places[0],
        replacement.places[-1],
        replacement.note,
    ) == (
        count,
        first,
        last,
        note,
    )
    assert replacement.before == (("Conv2d", count),) and replacement.after == "StandardizedConv2d"
    there = [
        name for name, module in model.named_modules() if isinstance(module, StandardizedConv2d)
    ]
    assert set(there) == set(replacement.places)
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[key] is parameters[key] for key in now)


def test_convolutions_that_start_at_zero_are_left_alone():
    """ResNetV2 has no last gamma: zero_init_last makes the last convolution of a branch zero."""
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_18", zero_init_last=True)
    at_zero = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not module.weight.any()
    ]
    replacement = standardization("all").apply(model, 64)
    assert at_zero and not set(at_zero) & set(replacement.places)
    assert f"{len(at_zero)} zero-initialized" in replacement.note


def test_the_model_uses_standardized_weights():
    """Against the same model whose weights were standardized by hand, once."""
    torch.manual_seed(0)
    model, other = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for conv in [module for module in other.modules() if isinstance(module, nn.Conv2d)]:
            weight = conv.weight.double()
            std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=1)
            conv.weight.copy_((weight - mean) / (std + 1e-5))
    standardization().apply(model, 32)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter_under_bf16_autocast():
    for name, part in (
        ("test_resnet", standardization()),
        ("test_convnext", standardization("all", True)),
    ):
        model = timm.create_model(name)
        part.apply(model, 32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(2, 3, 32, 32)).float().square().mean()
        loss.backward()
        assert all(
            weight.grad is not None and weight.grad.isfinite().all()
            for weight in model.parameters()
        )


def test_the_state_goes_round():
    model, other = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    part = ScaledWeightStandardization(**ScaledWeightStandardization.example)
    replacement = part.apply(model, 32)
    assert replacement.after == "ScaledStandardizedConv2d"
    part.apply(other, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ScaledStandardizedConv2d):
                module.gain.uniform_(0.5, 2)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_a_second_time_there_is_nothing_left():
    model = timm.create_model("test_resnet")
    standardization().apply(model, 32)
    with pytest.raises(
        ReplacementError, match=r"model.weight_standardization: ResNet has no .* StandardizedConv2d"
    ):
        standardization().apply(model, 32)


def test_a_model_without_a_suitable_convolution_is_refused_with_the_reasons():
    model = timm.create_model("test_convnext")
    model.stem[1] = nn.Identity()
    with pytest.raises(ReplacementError, match="4 without a norm directly after, 9 depthwise"):
        standardization().apply(model, 32)


FORMS = {
    "outside": {"is_unbiased": True, "eps": 1e-5, "is_inside": False},
    "inside": {"is_unbiased": True, "eps": 1e-5, "is_inside": True},
    "bit": {"is_unbiased": False, "eps": 1e-10, "is_inside": True},
    "biased_outside": {"is_unbiased": False, "eps": 1e-2, "is_inside": False},
}
SHAPES = {
    "3x3": ((8, 6, 3), {"padding": 1}),
    "1x1": ((6, 10, 1), {"bias": False}),
    "grouped": ((8, 12, 3), {"groups": 4, "stride": 2, "padding": 1}),
    "depthwise": ((6, 6, 7), {"groups": 6, "padding": 3}),
}


def plain(shape="3x3", dtype=torch.float32):
    torch.manual_seed(0)
    given, options = SHAPES[shape]
    conv = nn.Conv2d(*given, **options).to(dtype)
    with torch.no_grad():
        conv.weight.mul_(0.2).add_(0.05)
    return conv


def by_formula(weight, is_unbiased, eps, is_inside):
    """One filter after the other, in float64."""
    made = torch.empty(weight.shape, dtype=torch.float64)
    for channel, kernel in enumerate(weight.detach().double()):
        count = kernel.numel()
        mean = kernel.sum() / count
        variance = ((kernel - mean) ** 2).sum() / (count - 1 if is_unbiased else count)
        std = (variance + eps).sqrt() if is_inside else variance.sqrt() + eps
        made[channel] = (kernel - mean) / std
    return made


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_formula(form, shape, layout):
    conv = plain(shape).to(memory_format=layout)
    made = StandardizedConv2d.around(conv, **FORMS[form]).standardized_weight()
    torch.testing.assert_close(
        made.double(), by_formula(conv.weight, **FORMS[form]), rtol=1e-5, atol=1e-5
    )
    assert made.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SHAPES)
def test_timms_form_equals_timms_layer(shape):
    conv = plain(shape)
    given, options = SHAPES[shape]
    theirs = StdConv2d(*given, **{"bias": True, "padding": 0, **options}, eps=1e-6)
    theirs.load_state_dict(conv.state_dict())
    ours = StandardizedConv2d.around(conv, is_unbiased=False, eps=1e-6, is_inside=True)
    check_equal(ours, theirs, given[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scaled_form_equals_timms_layer(shape):
    conv = plain(shape)
    given, options = SHAPES[shape]
    theirs = ScaledStdConv2d(*given, **{"padding": 0, **options}, gamma=1.7, eps=1e-6)
    ours = ScaledStandardizedConv2d.around(conv, gamma=1.7, eps=1e-6)
    with torch.no_grad():
        ours.gain.copy_(torch.rand_like(ours.gain) + 0.5)
    theirs.load_state_dict({**ours.state_dict(), "gain": ours.gain.detach().view(-1, 1, 1, 1)})
    check_equal(ours, theirs, given[0])
    torch.testing.assert_close(ours.gain.grad, theirs.gain.grad.flatten(), rtol=1e-4, atol=1e-5)


def check_equal(ours, theirs, channels):
    images = torch.randn(2, channels, 9, 9)
    mine, other = ours(images), theirs(images)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(mine)
    mine.backward(grad), other.backward(grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)


def test_the_scaled_form_keeps_its_filters_length():
    conv = plain("3x3")
    made = ScaledStandardizedConv2d.around(conv, gamma=1.5, eps=1e-12).standardized_weight()
    torch.testing.assert_close(
        made.square().sum(dim=(1, 2, 3)), torch.full((6,), 1.5**2), rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", [*FORMS, "scaled"])
def test_gradients_are_those_of_finite_differences(form, layout):
    conv = plain("grouped", torch.float64).to(memory_format=layout)
    if form == "scaled":
        made = ScaledStandardizedConv2d.around(conv, gamma=1.7, eps=1e-3)
        keys = ("weight", "bias", "gain")
    else:
        made, keys = (
            StandardizedConv2d.around(conv, **{**FORMS[form], "eps": 1e-3}),
            ("weight", "bias"),
        )
    images = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    weights = [getattr(made, key).detach().clone().requires_grad_() for key in keys]

    def run(images, *weights):
        return torch.func.functional_call(made, dict(zip(keys, weights, strict=True)), (images,))

    assert torch.autograd.gradcheck(run, (images, *weights))


@pytest.mark.parametrize("form", [*FORMS, "scaled"])
def test_bf16_autocast_keeps_the_statistics_in_float32(form):
    conv = plain("3x3")
    if form == "scaled":
        made = ScaledStandardizedConv2d.around(conv, gamma=1.7, eps=1e-6)
    else:
        made = StandardizedConv2d.around(conv, **FORMS[form])
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.standardized_weight()
        assert made(torch.randn(2, 8, 5, 5)).dtype == torch.bfloat16
    assert torch.equal(inside, made.standardized_weight())


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_widened_first(form):
    conv = plain("depthwise", torch.bfloat16)
    made = StandardizedConv2d.around(conv, **FORMS[form]).standardized_weight()
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, by_formula(conv.weight.float(), **FORMS[form]).float().bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_a_filter_of_equal_weights_gives_zeros_and_finite_gradients(form):
    conv = plain("1x1")
    nn.init.constant_(conv.weight, 0.25)
    made = StandardizedConv2d.around(conv, **FORMS[form])
    weight = made.standardized_weight()
    assert torch.equal(weight, torch.zeros_like(weight))
    weight.sum().backward()
    assert made.weight.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.3, 0.1, 1 / 3, -0.02])
@pytest.mark.parametrize("shape", [(6, 4, 3), (64, 64, 1), (64, 64, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_equal_weights_that_float32_rounds_give_finite_gradients_under_any_slope(
    form, shape, value
):
    conv = nn.Conv2d(*shape)
    nn.init.constant_(conv.weight, value)
    made = StandardizedConv2d.around(conv, **FORMS[form])
    slope = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0))
    (made.standardized_weight() * slope).sum().backward()
    assert made.standardized_weight().isfinite().all() and made.weight.grad.isfinite().all()


def test_parameters_keep_their_names_and_are_the_same_tensors():
    conv = plain("grouped").eval()
    made = StandardizedConv2d.around(conv, **FORMS["outside"])
    assert made.weight is conv.weight and made.bias is conv.bias and not made.training
    assert set(made.state_dict()) == {"weight", "bias"}
    twin = copy.deepcopy(made)
    twin.load_state_dict(made.state_dict())
    images = torch.randn(2, 8, 5, 5)
    assert torch.equal(twin(images), made(images))
    scaled = ScaledStandardizedConv2d.around(conv, gamma=1.0, eps=1e-6)
    assert set(scaled.state_dict()) == {"weight", "bias", "gain"}
    fresh = ScaledStandardizedConv2d(8, 12, 3, gamma=1.0, eps=1e-6)
    assert torch.equal(fresh.gain, scaled.gain) and torch.equal(fresh.gain, torch.ones(12))


def test_no_weight_is_drawn():
    conv = plain()
    before = torch.random.get_rng_state()
    StandardizedConv2d.around(conv, **FORMS["bit"])
    ScaledStandardizedConv2d.around(conv, gamma=1.0, eps=1e-6)
    assert torch.equal(before, torch.random.get_rng_state())
