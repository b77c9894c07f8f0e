"""Norms come into their places on every family of models, or are refused with one line that says
what to do.
"""

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from trainer.models.edit.replacement import ReplacementError, find_layers
from trainer.models.parts import norms

GROUPS = norms.GroupNorm(groups=8, eps=1e-5)


def made(model, part=GROUPS, image_px=64):
    torch.manual_seed(0)
    model = timm.create_model(model, num_classes=10)
    return model, part.apply(model, image_px)


def refused(model, part, image_px=64):
    with pytest.raises(ReplacementError) as caught:
        made(model, part, image_px)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "num_norms"),
    [
        ("resnet18", 20), ("resnet50", 53), ("resnet50d", 55), ("resnext50_32x4d", 53),
        ("resnetv2_50", 49), ("skresnet18", 28), ("legacy_seresnet18", 20), ("regnety_002", 44),
        ("convnext_atto", 16), ("convnext_tiny", 22), ("convnextv2_atto", 16),
    ],
)  # fmt: skip
def test_every_norm_over_feature_maps_is_replaced(model, num_norms):
    changed, replacement = made(model)
    assert (
        len(replacement.places) == num_norms
        and sum(count for _, count in replacement.before) == num_norms
    )
    left = [
        name
        for name, module in changed.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
    ]
    assert set(left) == set(find_layers(changed).vector_norms)
    assert sum(isinstance(module, nn.GroupNorm) for module in changed.modules()) == num_norms
    assert changed.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_what_was_replaced_and_what_was_left_is_said():
    _, replacement = made("convnext_tiny")
    shown = str(replacement)
    assert shown.startswith("norm: stem.1, stages.0.blocks.0.norm … stages.3.blocks.2.norm: ")
    assert "4 LayerNorm2d and 18 LayerNorm -> GroupNorm" in shown
    assert "head.norm" in replacement.note
    _, replacement = made("skresnet18")
    assert "layer1.0.conv1.attn.bn … layer4.1.conv1.attn.bn (8)" in replacement.note


def test_groups_that_do_not_divide_are_refused_with_the_nearest_that_do():
    part = norms.GroupNorm(groups=32, eps=1e-5)
    message = refused("convnext_atto", part)
    assert message.startswith("model.norm.groups 32: stem.1 has 40 channels; use 20 or 40")
    assert message.endswith("ConvNeXt (40, 80, 160, 320)")
    made("convnext_atto", norms.GroupNorm(groups=20, eps=1e-5))
    message = refused("convnext_atto", norms.GroupNorm(channels_per_group=16, eps=1e-5))
    assert message.startswith(
        "model.norm.channels_per_group 16: stem.1 has 40 channels; use 10 or 20"
    )
    bcn = norms.BatchChannelNorm(groups=32, eps=1e-5, momentum=0.1, statistics="batch")
    assert "stem.1 has 40 channels; use 20 or 40" in refused("convnext_atto", bcn)
    assert "conv1.1 has 16 channels; use 16" in refused(
        "test_resnet", norms.EvoNormS0(groups=32, eps=1e-5)
    )


@pytest.mark.parametrize("fields", [{}, {"groups": 8, "channels_per_group": 8}])
def test_group_norm_needs_one_of_its_two_fields(fields):
    with pytest.raises(ValidationError, match="groups or channels_per_group"):
        norms.GroupNorm(eps=1e-5, **fields)


@pytest.mark.parametrize(
    ("model", "part", "shown"),
    [
        (
            "resnet18",
            norms.BatchNorm(momentum=0.1, eps=1e-5, affine=True),
            ("all 20", "ResNet", "already", "BatchNorm2d"),
        ),
        (
            "convnext_atto",
            norms.LayerNorm2d(eps=1e-6),
            ("all 16", "ConvNeXt", "already", "LayerNorm2d"),
        ),
        (
            "resnetv2_50d_frn",
            norms.FilterResponseNorm(eps=1e-5),
            ("already", "FilterResponseNormTlu2d"),
        ),
    ],
)
def test_norms_that_are_there_already_are_refused(model, part, shown):
    message = refused(model, part)
    assert all(words in message for words in shown)


def test_norms_of_other_numbers_are_no_such_norms():
    _, replacement = made("resnet18", norms.BatchNorm(momentum=0.2, eps=1e-5, affine=True))
    assert replacement.after == "BatchNorm2d"
    made("resnet18", norms.BatchNorm(momentum=0.1, eps=1e-5, affine=False))
    made("resnetv2_50d_frn", norms.FilterResponseNorm(eps=1e-6))


def test_a_model_that_takes_no_image_of_the_sizes_tried_is_refused():
    message = refused("vit_tiny_patch16_224", GROUPS)
    assert message.startswith("model: ") and "VisionTransformer" in message and "128 px" in message


def test_a_model_without_norms_is_refused():
    assert refused("nf_resnet26", GROUPS).startswith(
        "model.norm: NormFreeNet has no norm over feature maps; it has"
    )


@pytest.mark.parametrize(
    "part", [norms.InstanceNorm(eps=1e-5, affine=True), norms.FilterResponseNorm(eps=1e-6)]
)
def test_a_statistic_of_a_single_value_is_refused(part):
    message = refused("resnet18", part, image_px=32)
    assert message.startswith("model.norm: layer4.0.bn1 ") and part.name in message
    assert "1x1" in message and "32 px" in message and "image.train_px" in message
    made("resnet18", part, image_px=64)


@pytest.mark.parametrize(
    "part", [norms.FilterResponseNorm(eps=1e-6), norms.EvoNormS0(groups=2, eps=1e-5)]
)
@pytest.mark.parametrize("model", ["res2net50_26w_4s", "legacy_seresnet18"])
def test_an_activation_that_is_also_used_without_a_norm_is_not_taken_away(model, part):
    """Their blocks call one ReLU behind norms and behind the addition."""
    message = refused(model, part)
    assert f"{part.name} brings its own activation, but layer1.0.relu (ReLU)" in message
    assert "group_norm" in message and "model=resnet50" in message


def test_evo_norm_is_refused_where_no_activation_follows_a_norm():
    message = refused("test_convnext", norms.EvoNormS0(groups=8, eps=1e-5))
    assert message.startswith("model.norm: ")
    assert "ConvNeXt" in message and "evo_norm_s0" in message


def test_an_activation_that_cannot_be_told_from_its_norm_is_not_lost():
    message = refused("resnetv2_50d_frn", GROUPS)
    assert "is a FilterResponseNormTlu2d, whose activation" in message
    _, replacement = made("resnetv2_50d_frn", norms.EvoNormS0(groups=8, eps=1e-5))
    assert replacement.note == "51 replace norm and activation"
