"""The stages and blocks of timm's models, against the modules that timm itself names."""

import pytest
import timm
import timm.layers.cbam
import torch
from torch import nn

from trainer.models.edit.replacement import ReplacementError, replace_module
from trainer.models.edit.stages import blocks, stages
from trainer.models.parts.blur import BlurConv2d
from trainer.models.parts.convolutions import (
    DeformableConv2d,
    SelfCalibratedConv2d,
)

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
STAGES = ["stages.0", "stages.1", "stages.2", "stages.3"]
MODELS = {
    "resnet18": (LAYERS, "{}.{}", [2, 2, 2, 2]),
    "resnet50d": (LAYERS, "{}.{}", [3, 4, 6, 3]),
    "resnext50_32x4d": (LAYERS, "{}.{}", [3, 4, 6, 3]),
    "seresnet50": (LAYERS, "{}.{}", [3, 4, 6, 3]),
    "legacy_seresnet18": (LAYERS, "{}.{}", [2, 2, 2, 2]),
    "res2net50_26w_4s": (LAYERS, "{}.{}", [3, 4, 6, 3]),
    "resnest14d": (LAYERS, "{}.{}", [1, 1, 1, 1]),
    "skresnet18": (LAYERS, "{}.{}", [2, 2, 2, 2]),
    "test_resnet": (LAYERS, "{}.{}", [1, 1, 1, 1]),
    "resnetv2_50": (STAGES, "{}.blocks.{}", [3, 4, 6, 3]),
    "convnext_atto": (STAGES, "{}.blocks.{}", [2, 2, 6, 2]),
    "convnext_tiny": (STAGES, "{}.blocks.{}", [3, 3, 9, 3]),
    "convnextv2_atto": (STAGES, "{}.blocks.{}", [2, 2, 6, 2]),
}


@pytest.mark.parametrize("name", MODELS)
def test_stages_and_blocks_are_those_of_the_model(name):
    names, pattern, depths = MODELS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert stages(model) == names
    assert blocks(model) == [
        [pattern.format(stage, block) for block in range(depth)]
        for stage, depth in zip(names, depths, strict=True)
    ]


def test_regnet_names_its_blocks_itself():
    with torch.device("meta"):
        model = timm.create_model("regnety_002")
    assert stages(model) == ["s1", "s2", "s3", "s4"]
    assert blocks(model) == [
        ["s1.b1"],
        ["s2.b1"],
        [f"s3.b{n}" for n in range(1, 5)],
        [f"s4.b{n}" for n in range(1, 8)],
    ]


def test_attention_at_the_end_of_a_stage_is_no_block():
    model = timm.create_model("test_resnet")
    model.layer2.append(timm.layers.cbam.CbamModule(model.layer2[-1].conv2.out_channels))
    replace_module(model, "layer3", nn.Sequential(model.layer3[0], nn.Identity()))
    assert stages(model) == LAYERS
    assert blocks(model) == [[f"{layer}.0"] for layer in LAYERS]


def blurred(conv, is_before=True):
    return BlurConv2d(conv, 3, "zeros", is_before)


@pytest.mark.parametrize(
    "changed",
    [
        DeformableConv2d.around,
        blurred,
        lambda conv: blurred(DeformableConv2d.around(conv)),
        lambda conv: SelfCalibratedConv2d(
            conv.in_channels, conv.out_channels, conv.stride, conv.dilation, conv.groups, 2
        ),
        lambda conv: nn.Sequential(
            DeformableConv2d.around(conv), nn.BatchNorm2d(conv.out_channels)
        ),
    ],
    ids=["deformable", "blurred", "blurred_deformable", "self_calibrated", "in_a_series"],
)
@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "skresnet18", "res2net50_26w_4s"])
def test_a_convolution_is_no_block_whatever_it_holds(name, changed):
    with torch.device("meta"):
        model = timm.create_model(name)
        before = stages(model), blocks(model)
        found = [
            each
            for each, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
        ]
        for each in found:
            conv = model.get_submodule(each)
            if conv.in_channels > 3 and each.startswith("layer"):
                replace_module(model, each, changed(conv))
    assert (stages(model), blocks(model)) == before


def test_a_model_without_blocks_is_refused():
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    with pytest.raises(ReplacementError, match="VGG has no stages"):
        stages(model)
