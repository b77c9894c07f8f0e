"""Which convolutions of timm's models are standardized, and what is left, and why."""

import pytest
import timm
import torch
from torch import nn

from trainer.models.edit.replacement import SurgeryError
from trainer.models.parts.standardize import ScaledWeightStandardization, WeightStandardization
from trainer.models.parts.standardize_layers import ScaledStandardizedConv2d, StandardizedConv2d

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
        "left: 21 without a norm straight behind",
    ),
    ("resnetv2_50", "all", False): (53, "stem.conv", "stages.3.blocks.2.conv3", ""),
    ("convnext_atto", "followed_by_norm", False): (
        1, "stem.0", "stem.0", "left: 12 depthwise, 27 without a norm straight behind",
    ),
    ("convnext_atto", "all", False): (28, "stem.0", "stages.3.blocks.1.mlp.fc2", "left: 12 depthwise"),
    ("convnext_atto", "followed_by_norm", True): (
        13, "stem.0", "stages.3.blocks.1.conv_dw", "left: 27 without a norm straight behind",
    ),
    ("convnext_tiny", "all", True): (22, "stem.0", "stages.3.blocks.2.conv_dw", "left: 36 Linear, no convolutions"),
    ("convnext_tiny", "all", False): (
        4, "stem.0", "stages.3.downsample.1", "left: 18 depthwise, 36 Linear, no convolutions",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "of", "depthwise"), FOUND)
def test_the_right_convolutions_are_replaced(name, of, depthwise):
    count, first, last, note = FOUND[name, of, depthwise]
    model = timm.create_model(name)
    parameters = dict(model.named_parameters())
    swap = standardization(of, depthwise).apply(model, 64)
    assert (len(swap.places), swap.places[0], swap.places[-1], swap.note) == (
        count,
        first,
        last,
        note,
    )
    assert swap.before == (("Conv2d", count),) and swap.after == "StandardizedConv2d"
    there = [
        name for name, module in model.named_modules() if isinstance(module, StandardizedConv2d)
    ]
    assert set(there) == set(swap.places)
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
    swap = standardization("all").apply(model, 64)
    assert at_zero and not set(at_zero) & set(swap.places)
    assert f"{len(at_zero)} starting at zero" in swap.note


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
    swap = part.apply(model, 32)
    assert swap.after == "ScaledStandardizedConv2d"
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
        SurgeryError, match=r"model.weight_standardization: ResNet has no .* StandardizedConv2d"
    ):
        standardization().apply(model, 32)


def test_a_model_without_a_suitable_convolution_is_refused_with_the_reasons():
    model = timm.create_model("test_convnext")
    model.stem[1] = nn.Identity()
    with pytest.raises(SurgeryError, match="4 without a norm straight behind, 9 depthwise"):
        standardization().apply(model, 32)
