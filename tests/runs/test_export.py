"""What is exported is timm's own where timm alone builds it; counts of unchanged models are timm's
and torch's.
"""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.plans import small_plan
from trainer.models.build import build_model, gmacs, num_parameters
from trainer.models.zoo import timm_name
from trainer.runs.export import export_model, is_timms, timm_facts
from trainer.tools.matrix import MODELS

NORM = "'model.norm={name: group_norm, groups: 16, eps: 1e-5}'"


def exported(folder, plan):
    model = build_model(plan)
    state = SimpleNamespace(weights=lambda: {"model": model}, scored="model")
    export_model(folder, plan, state, tuple("0123456789"))
    return model.eval()


@pytest.mark.parametrize(
    ("recipe", "model", "overrides"),
    [
        ("A2", "test_resnet", ""),
        ("convnext", "test_convnext", "model.layer_scale=1e-4"),
        ("A2", "test_resnet", "model.dropout=0.2"),
        ("A2", "deit_tiny_patch16_224", ""),
    ],
)
def test_timm_opens_what_it_builds_alone(tmp_path, recipe, model, overrides):
    plan = small_plan(recipe, model=model, overrides=overrides)
    ours = exported(tmp_path, plan)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("model", "overrides", "is_theirs"),
    [
        ("test_resnet", "", True),
        ("test_resnet", "model.zero_init_last=false", True),
        ("test_resnet", NORM, False),
        (
            "test_resnet",
            "model.layer_scale=1e-4",
            False,
        ),  # a ResNet of timm's has none: module replacement puts it in
        ("test_convnext", "model.layer_scale=1e-4", True),
    ],
)
def test_a_changed_model_does_not_bear_timms_name(model, overrides, is_theirs):
    plan = small_plan("A2", model=model, overrides=overrides)
    assert is_timms(plan) is is_theirs
    facts = timm_facts(plan, tuple("0123456789"))
    assert (facts["architecture"] == model) is is_theirs
    assert is_theirs or not timm.is_model(facts["architecture"])


def test_the_facts_come_last_so_that_where_they_are_the_weights_are_whole(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "trainer.runs.export.write_atomically",
        lambda path, content: written.append((path.name, content)),
    )
    exported(tmp_path, small_plan("A2"))
    assert [name for name, _ in written] == ["model.safetensors", "config.json"]
    assert json.loads(written[1][1])["pretrained_cfg"]["crop_pct"] == 1.0


@pytest.mark.parametrize("model", MODELS)
def test_the_counts_of_an_unchanged_model_are_timms(model):
    """Parameters as timm's model has them, multiply-adds as torch counts them on timm's model, on
    no device at all.
    """
    sizes = "image.train_px=64 image.test_px=64"
    ours = build_model(small_plan("torchvision-v1", model=model, overrides=sizes))
    with torch.device("meta"):
        name = timm_name(model)
        is_of_one_size = timm.get_pretrained_cfg(name).fixed_input_size
        size = {"img_size": 64} if is_of_one_size else {}
        theirs = timm.create_model(name, num_classes=10, **size).eval()
        images = torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        theirs(images)
    assert num_parameters(ours) == sum(weight.numel() for weight in theirs.parameters())
    assert gmacs(ours, 3, 64) == counter.get_total_flops() / 2e9
