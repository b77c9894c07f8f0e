"""Which convolutions of timm's models are exchanged or dilated, and that the dilated models are
timm's own.
"""

import pytest
import timm
import torch

from trainer.models.edit.replacement import SurgeryError
from trainer.models.parts.convolution_layers import DeformableConv2d, SelfCalibratedConv2d
from trainer.models.parts.convolutions import Deformable, Dilated, SelfCalibrated

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
    swap = part.apply(model.train(), 128)
    assert (len(swap.places), swap.places[0], swap.places[-1]) == (count, first, last)
    assert swap.before == (("Conv2d", count),)
    kind = DeformableConv2d if part.name == "deformable" else SelfCalibratedConv2d
    assert [name for name, module in model.named_modules() if isinstance(module, kind)] == list(
        swap.places
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
    [(Deformable(stages=1), "convnext_atto"), (SelfCalibrated(stages=4, pooling=4), "convnext_tiny"),
     (SelfCalibrated(stages=4, pooling=4), "resnet18"), (SelfCalibrated(stages=4, pooling=4), "res2net50_26w_4s"),
     (Dilated(stages=4), "resnet18"), (Dilated(stages=4), "convnext_atto")],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_what_makes_no_sense_is_refused(part, name):
    model = timm.create_model(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(SurgeryError, match=r"^model.convolution: [^\n]+$"):
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
    swap = Dilated(stages=stages).apply(model, 64)
    images = torch.randn(1, 3, 64, 64)
    wanted = theirs.forward_features(images)
    torch.testing.assert_close(model.forward_features(images), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape[2] == 2 * 2**stages
    assert swap.note.endswith(f" by {2**stages}") and len(swap.places) > 2 * stages


def test_convnext_with_channels_last_norms_is_dilated_too():
    torch.manual_seed(0)
    theirs = timm.create_model(
        "convnext_tiny", depths=(1, 1, 1, 2), num_classes=3, output_stride=16
    ).eval()
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 2), num_classes=3).eval()
    model.load_state_dict(theirs.state_dict())
    swap = Dilated(stages=1).apply(model, 64)
    assert swap.places == (
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
