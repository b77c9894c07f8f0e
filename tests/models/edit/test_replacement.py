"""A model is asked what its parts are by what flows where: names and classes differ from family to
family.
"""

import pytest
import timm
import torch
from torch import nn

from trainer.models.edit.replacement import (
    Replacement,
    ReplacementError,
    counted,
    find_layers,
    has_activation,
    is_activation,
    is_attention,
    is_norm,
    nothing_to_replace,
    record_calls,
    replace_module,
)


# What each model has, counted by hand from its definition: norms over maps, over vectors, in
# attention; convolutions, those of them that feed a norm; activations, norms that feed one.
@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("resnet18", (20, 0, 0, 20, 20, 17, 9)),
        ("resnet26d", (31, 0, 0, 31, 31, 27, 19)),  # three convolutions in the stem
        (
            "seresnet50",
            (53, 0, 0, 53, 53, 49, 33),
        ),  # the 32 convolutions in attention are not the body's
        (
            "legacy_seresnet18",
            (20, 0, 0, 20, 20, 9, 17),
        ),  # both activations of a block are one module
        (
            "resnest14d",
            (19, 4, 0, 27, 23, 19, 11),
        ),  # split attention holds the 3x3 convolutions: of the body
        (
            "resnetv2_18",
            (17, 0, 0, 20, 8, 0, 0),
        ),  # norm and activation in one, before the convolutions
        (
            "convnext_atto",
            (16, 1, 0, 40, 13, 12, 0),
        ),  # norms [B, C, H, W], convolutions in the place of matrices
        ("convnext_tiny", (22, 1, 0, 22, 19, 18, 0)),  # norms [B, H, W, C]
    ],
)
def test_every_part_is_found(model, counts):
    found = find_layers(timm.create_model(model, num_classes=2))
    fed = sum(place.norm is not None for place in found.convolutions)
    activated = sum(place.activation is not None for place in found.norms)
    lists = (found.norms, found.vector_norms, found.attention_norms, found.convolutions)
    assert (*map(len, lists), fed, len(found.activations), activated) == counts


def test_who_feeds_whom_in_a_residual_block():
    found = find_layers(timm.create_model("resnet18", num_classes=2))
    norms = {place.name: place for place in found.norms}
    assert norms["layer1.0.bn1"].activation == "layer1.0.act1"
    assert norms["layer1.0.bn2"].activation is None, (
        "the sum with the shortcut comes between, in place"
    )
    assert {place.name: place.norm for place in found.convolutions}[
        "layer2.0.downsample.0"
    ] == "layer2.0.downsample.1"
    assert [place.name for place in found.norms][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]


def test_channels_last_norms_and_depthwise_convolutions_of_a_convnext():
    found = find_layers(timm.create_model("convnext_tiny", num_classes=2))
    last = [place.name for place in found.norms if place.is_channels_last]
    assert len(last) == 18 and all(".blocks." in name for name in last)
    assert found.vector_norms == ("head.norm",)
    assert sum(place.is_depthwise for place in found.convolutions) == 18
    feeds = {place.name: place.norm for place in found.convolutions}
    assert feeds["stages.0.blocks.0.conv_dw"] == "stages.0.blocks.0.norm", "through a permuted view"


def test_asking_changes_nothing():
    model = timm.create_model("test_resnet", num_classes=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    find_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_stem_of_very_large_patches_is_asked_with_a_larger_image():
    model = timm.create_model("test_convnext", num_classes=2)
    model.stem[0] = nn.Conv2d(3, model.stem[0].out_channels, 64, stride=64)
    assert len(find_layers(model).norms) > 1


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (is_norm, nn.SyncBatchNorm(2)),
        (is_norm, timm.layers.EvoNorm2dS0(32)),
        (is_norm, timm.layers.LayerNorm2d(2)),
        (is_attention, timm.layers.EcaModule(8)),
        (is_activation, nn.SiLU()),
        (is_activation, timm.layers.HardSwish()),
        (has_activation, timm.layers.BatchNormAct2d(2)),
    ],
)
def test_what_counts_as_what(kind, module):
    assert kind(module)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (is_norm, nn.Conv2d(1, 1, 1)),
        (is_activation, nn.Sigmoid()),
        (is_activation, nn.MultiheadAttention(2, 1)),
        (has_activation, timm.layers.BatchNormAct2d(2, apply_act=False)),
        (has_activation, nn.BatchNorm2d(2)),
    ],
)
def test_what_does_not(kind, module):
    assert not kind(module)


def test_a_swap_is_one_line():
    replacement = Replacement(
        "norm",
        (("BatchNorm2d", 3),),
        "GroupNorm",
        ("bn1", "layer1.0.bn1", "layer4.1.bn2"),
        "head.norm stays",
    )
    assert (
        str(replacement)
        == "norm: bn1, layer1.0.bn1 … layer4.1.bn2: 3 BatchNorm2d -> GroupNorm (head.norm stays)"
    )
    assert (
        str(Replacement("stem", (("Conv2d", 1),), "3x3", ("conv1",)))
        == "stem: conv1: 1 Conv2d -> 3x3"
    )


def test_nothing_found_says_what_there_is():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    error = nothing_to_replace("norm", "norm over feature maps", model)
    assert isinstance(error, ReplacementError)
    assert str(error) == (
        "model.norm: Sequential has no norm over feature maps; it has 2 Conv2d; "
        "leave model.norm out"
    )


def test_modules_are_put_and_counted():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU())
    replace_module(model, "0.1", nn.GELU())
    assert counted(module for module in model.modules() if is_activation(module)) == (
        ("ReLU", 2),
        ("GELU", 1),
    )


def test_a_model_that_refuses_small_images_is_asked_again_with_a_large_one():
    """What was recorded of the first image is forgotten."""
    model = timm.create_model("test_resnet", num_classes=2)
    model.layer4.append(nn.AvgPool2d(8))
    records = record_calls(
        model, {"conv1.0", "layer1"}, lambda name, module, given, made: (name, made.shape[-1])
    )
    assert records == [("conv1.0", 512), ("layer1", 256)]
    assert len(find_layers(model).norms) == len(
        [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    )
