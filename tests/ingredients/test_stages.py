"""The stages and blocks of timm's models, against the modules that timm itself names."""

import pytest
import timm
import timm.layers.cbam
import torch
from torch import nn

from trainer.ingredients.stages import blocks, stages
from trainer.ingredients.surgery import SurgeryError, put

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
        [pattern.format(stage, block) for block in range(depth)] for stage, depth in zip(names, depths, strict=True)
    ]


def test_regnet_names_its_blocks_itself():
    with torch.device("meta"):
        model = timm.create_model("regnety_002")
    assert stages(model) == ["s1", "s2", "s3", "s4"]
    assert blocks(model) == [["s1.b1"], ["s2.b1"], [f"s3.b{n}" for n in range(1, 5)], [f"s4.b{n}" for n in range(1, 8)]]


def test_attention_at_the_end_of_a_stage_is_no_block():
    model = timm.create_model("test_resnet")
    model.layer2.append(timm.layers.cbam.CbamModule(model.layer2[-1].conv2.out_channels))
    put(model, "layer3", nn.Sequential(model.layer3[0], nn.Identity()))
    assert stages(model) == LAYERS
    assert blocks(model) == [[f"{layer}.0"] for layer in LAYERS]


def test_a_model_without_blocks_is_refused():
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    with pytest.raises(SurgeryError, match="VGG has no stages"):
        stages(model)
