"""Where the blur goes in timm's models, and that the models are then timm's and ffcv's own."""

import pytest
import timm
import torch
from torch import nn

from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.blur import BlurConv2d, BlurPool

SHORTCUTS = ["layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]


def blur(place="before", padding="zeros", pool=False, min_channels=16):
    return BlurPool(filter_px=3, min_channels=min_channels, place=place, padding=padding, pool=pool)


def test_ffcvs_form_takes_every_strided_convolution_from_16_channels_on():
    model = timm.create_model("resnet18")
    replacement = blur().apply(model, 64)
    blocks = [f"layer{stage}.0.conv1" for stage in (2, 3, 4)]
    assert sorted(replacement.places) == sorted(blocks + SHORTCUTS)
    assert (
        replacement.before == (("Conv2d", 6),)
        and replacement.note == "left: 1 other strided convolutions"
    )
    assert [
        name for name, module in model.named_modules() if isinstance(module, BlurConv2d)
    ] == list(replacement.places)
    assert blur(min_channels=None).apply(timm.create_model("resnet18"), 64).places[0] == "conv1"


@pytest.mark.parametrize("px", [64, 65])
def test_the_papers_form_is_timms_resnetblur(px):
    torch.manual_seed(0)
    theirs = timm.create_model("resnetblur50", num_classes=7)
    model = timm.create_model("resnet50", num_classes=7)
    model.load_state_dict(theirs.state_dict())
    replacement = blur("after_activation", "reflect", pool=True).apply(model, px)
    assert replacement.places == ("maxpool", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2")
    assert (
        replacement.note == "left: 4 other strided convolutions"
    )  # the stem's, and those of the shortcuts
    images = torch.randn(2, 3, px, px)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "place", "count"),
    [
        ("resnet50d", "before", 3), ("resnet50d", "after", 3), ("resnet50d", "after_activation", 3),
        ("resnetv2_50", "before", 6), ("resnetv2_50", "after", 6),
        ("resnetv2_50", "after_activation", 3), ("regnetx_002", "after_activation", 4),
        ("convnext_atto", "before", 3), ("convnext_tiny", "after", 3),
        ("legacy_seresnet18", "before", 6),
    ],
)  # fmt: skip
def test_sizes_stay_and_every_model_runs(name, place, count):
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(1, 3, 96, 96)
    size = model.forward_features(images).shape
    replacement = blur(place).apply(model, 96)
    assert len(replacement.places) == count
    assert model.forward_features(images).shape == size


@pytest.mark.parametrize("kernel", [3, (3, 3)])
def test_max_pooling_of_a_legacy_stem_keeps_its_size(kernel):
    model = timm.create_model("legacy_seresnet50").eval()
    model.pool0.kernel_size = kernel
    images = torch.randn(1, 64, 32, 32)
    size = model.pool0(images).shape
    replacement = blur(pool=True).apply(model, 64)
    assert "pool0" in replacement.places and model.pool0(images).shape == size


def test_a_nonlinearity_that_a_block_uses_twice_takes_no_blur():
    with pytest.raises(ReplacementError, match=r"model.blur_pool"):
        blur("after_activation").apply(timm.create_model("legacy_seresnet18"), 64)


def test_what_is_not_there_is_refused():
    with pytest.raises(ReplacementError, match=r"model.blur_pool.pool: ConvNeXt"):
        blur(pool=True).apply(timm.create_model("test_convnext"), 64)
    with pytest.raises(
        ReplacementError, match=r"model.blur_pool: ConvNeXt has no strided convolution"
    ):
        blur("after_activation").apply(timm.create_model("test_convnext"), 64)


@pytest.mark.parametrize("place", ["before", "after", "after_activation"])
def test_the_state_goes_round_and_gradients_reach_all_under_bf16_autocast(place):
    model, other = (
        timm.create_model("test_resnet", num_classes=3),
        timm.create_model("test_resnet", num_classes=3),
    )
    for each in (model, other):
        blur(place, "reflect", pool=True).apply(each, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64)).float().square().sum().backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters()
    )
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_strides_of_another_kind_of_convolution_are_not_guessed_at():
    class Other(nn.Conv2d):
        pass

    model = timm.create_model("test_resnet")
    model.layer3[0].conv1 = Other(32, 32, 3, stride=2, padding=1, bias=False)
    with pytest.raises(ReplacementError, match=r"layer3.0.conv1 is a Other; use place: before"):
        blur("after").apply(model, 64)
