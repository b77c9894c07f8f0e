"""A stem has the layers of its source, and the model behind it still fits."""

import copy

import pytest
import timm
import torch
from torch import nn

from trainer.models.edit.insertion import output_shapes
from trainer.models.edit.replacement import ReplacementError
from trainer.models.edit.stages import stages
from trainer.models.parts.stems import AutoStem, CifarStem, DeepStem, ImagenetStem, PatchifyStem

STEMS = [ImagenetStem(), CifarStem(), DeepStem(width=16), PatchifyStem(patch_px=2)]
STRIDES = {"imagenet": 4, "cifar": 1, "deep": 4, "patchify": 2}
MODELS = [
    "test_resnet",
    "test_convnext",
    "convnext_atto",
    "resnetv2_18",
    "resnetv2_18d",
    "regnetx_002",
    "legacy_seresnet18",
]


@pytest.fixture(scope="module", params=MODELS)
def plain(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=4)


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: stem.name)
def test_the_first_stage_is_given_maps_of_the_stems_stride(plain, stem):
    model = copy.deepcopy(plain)
    seen = []
    replacement = stem.replace_stem(model)
    first = stages(model)[0]
    model.get_submodule(first).register_forward_pre_hook(
        lambda module, given: seen.append(given[0].shape)
    )
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert seen[0][2:] == (64 // STRIDES[stem.name],) * 2
    assert all(weight.grad is not None for weight in model.parameters())
    assert [type(m) for m in norms(model)[-3:]] == [type(m) for m in norms(plain)[-3:]]
    assert replacement.places == tuple(
        name for name, _ in model.named_children() if name in replacement.places
    )
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    kept = [name for name in plain.state_dict() if not name.startswith(replacement.places)]
    assert kept and all(
        torch.equal(plain.state_dict()[name], model.state_dict()[name])
        for name in kept
        if "running" not in name and "num_batches" not in name
    )


def norms(model):
    return [module for module in model.modules() if "Norm" in type(module).__name__]


def test_the_deep_stem_is_that_of_timms_resnet50d():
    theirs, ours = timm.create_model("resnet26d"), timm.create_model("resnet26")
    DeepStem(width=32).apply(ours, 64)
    shapes = {
        name: value.shape
        for name, value in theirs.state_dict().items()
        if name.startswith(("conv1", "bn1"))
    }
    found = {
        name: value.shape
        for name, value in ours.state_dict().items()
        if name.startswith(("conv1", "bn1"))
    }
    assert found == shapes
    with torch.device("meta"):
        large = timm.create_model("resnet50d")
    assert {
        name: value.shape for name, value in large.state_dict().items() if name in shapes
    } == shapes
    ours.load_state_dict(
        {**ours.state_dict(), **{name: theirs.state_dict()[name] for name in shapes}}
    )
    images = torch.randn(2, 3, 64, 64)
    for name in ("conv1", "bn1", "act1", "maxpool"):
        assert str(ours.get_submodule(name)) == str(theirs.get_submodule(name))
    first = [output_of(model.eval(), images) for model in (ours, theirs)]
    assert torch.equal(*first)


def output_of(model, images):
    with torch.no_grad():
        return model.maxpool(model.act1(model.bn1(model.conv1(images))))


def test_the_imagenet_stem_undoes_a_deep_one():
    model, plain = timm.create_model("resnet26d"), timm.create_model("resnet26")
    ImagenetStem().apply(model, 224)
    assert all(
        str(model.get_submodule(n)) == str(plain.get_submodule(n))
        for n in ("conv1", "bn1", "act1", "maxpool")
    )


def test_the_patchify_stem_of_four_is_convnexts_own():
    model, plain = (timm.create_model("convnext_atto", num_classes=2) for _ in range(2))
    PatchifyStem(patch_px=2).apply(model, 64)
    PatchifyStem(patch_px=4).apply(model, 64)
    assert str(model) == str(plain)
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in plain.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", ImagenetStem()), ("resnetv2_18", ImagenetStem()),
        ("convnext_atto", PatchifyStem(patch_px=4)),
        ("resnet26d", DeepStem(width=32)),
    ],
)  # fmt: skip
def test_the_stem_that_is_there_already_is_refused(name, stem):
    with pytest.raises(ReplacementError, match=r"^model.stem: .* already .*$"):
        stem.apply(timm.create_model(name, num_classes=2), 64)


def test_auto_takes_a_cifar_stem_that_is_there_already():
    model = timm.create_model("test_resnet")
    CifarStem().apply(model, 32)
    before = str(model)
    assert AutoStem().apply(model, 32).note.startswith("auto: cifar stem") and str(model) == before


def test_norms_inside_a_deep_stem_are_of_the_models_kind():
    model = timm.create_model("convnext_atto", num_classes=2)
    DeepStem(width=12).apply(model, 64)
    inner = [type(m).__name__ for m in model.stem.modules() if not list(m.children())]
    assert inner == [
        "Conv2d",
        "LayerNorm2d",
        "GELU",
        "Conv2d",
        "LayerNorm2d",
        "GELU",
        "Conv2d",
        "LayerNorm2d",
        "MaxPool2d",
    ]
    assert model.stem[0][1].eps == model.stem[1].eps and model.stem[0][1].normalized_shape == (12,)


def test_weights_are_drawn_as_timm_draws_its_own():
    torch.manual_seed(0)
    resnet, convnext = timm.create_model("test_resnet"), timm.create_model("convnext_tiny")
    DeepStem(width=128).apply(resnet, 64)
    assert resnet.conv1[3].weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    PatchifyStem(patch_px=8).apply(convnext, 64)
    conv = convnext.stem[0]
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05) and not conv.bias.any()


def test_one_channel_stays_one_channel():
    model = timm.create_model("test_resnet", in_chans=1)
    CifarStem().apply(model, 28)
    assert model.conv1.in_channels == 1 and model(torch.randn(2, 1, 28, 28)).shape == (2, 1000)


def test_auto_says_what_it_chose_and_why():
    model = timm.create_model("test_resnet")
    assert AutoStem().apply(model, 32).note.startswith("auto: cifar stem")
    assert model.conv1.stride == (1, 1) and isinstance(model.maxpool, nn.Identity)
    model = timm.create_model("test_resnet")
    before = str(model)
    replacement = AutoStem().apply(model, 96)
    assert replacement.note.startswith("auto: the model's own stem")
    assert (
        str(model) == before
        and replacement.places == ("conv1", "bn1", "act1", "maxpool")
        and "auto" in str(replacement)
    )


def test_the_first_map_of_resnetv2_is_still_found():
    model = timm.create_model("resnetv2_18")
    CifarStem().apply(model, 32)
    assert output_shapes(model, ["stem"], 32)["stem"][2:] == (32, 32)
    assert model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)[0].shape[
        2:
    ] == (32, 32)
