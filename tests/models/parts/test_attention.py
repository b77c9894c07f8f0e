"""Attention stands where its field says, costs what its formula says, and computes what timm's
layer computes.
"""

import copy

import pytest
import timm
import torch
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from torch import nn
from torch.nn import functional

from trainer.models.build import gmacs, num_parameters
from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.attention import (
    Bam,
    BottleneckAttention,
    Cbam,
    CoordinateAttention,
    Eca,
    GlobalContext,
    SqueezeExcite,
)

ALL = [SqueezeExcite, Eca, Cbam, GlobalContext, CoordinateAttention]
# channels, blocks and side of the maps at 64 px, by stage
SHAPES = {
    "resnet18": [(64, 2, 16), (128, 2, 8), (256, 2, 4), (512, 2, 2)],
    "resnet50": [(256, 3, 16), (512, 4, 8), (1024, 6, 4), (2048, 3, 2)],
}


def se_cost(c, s):
    h = c // 16
    return 2 * c * h + h + c, 2 * c * h


def eca_cost(c, s):
    k = {64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}[
        c
    ]  # the odd number next to (log2(c) + 1) / 2
    return k, k * c


def cbam_cost(c, s):
    h = c // 16
    return 2 * c * h + 2 * 49 + 2, 2 * (
        2 * c * h
    ) + 2 * 49 * s * s  # two pooled vectors; two maps in a 7x7; its norm


def bam_cost(c, s):
    h = c // 16
    channel = (c * h + h) + (h * c + c) + 2 * c
    places = (c * h + h) + 2 * (9 * h * h + h) + (h + 1) + 2
    return channel + places, 2 * c * h + s * s * (c * h + 2 * 9 * h * h + h)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_multiply_adds_equal_hand_computed_values(name):
    plain = timm.create_model(name)
    costs = {
        SqueezeExcite(position="after_last_norm", reduction=16): se_cost,
        Eca(position="after_last_norm"): eca_cost,
        Cbam(position="after_last_norm", reduction=16, kernel=7): cbam_cost,
        Bam(reduction=16, dilation=4, num_convolutions=2): bam_cost,
    }
    parameters, adds = num_parameters(plain), gmacs(plain, 3, 64)
    for part, cost in costs.items():
        model = copy.deepcopy(plain)
        part.apply(model, 64)
        stages = SHAPES[name][:3] if isinstance(part, Bam) else SHAPES[name]
        times = [1 if isinstance(part, Bam) else blocks for _, blocks, _ in stages]
        each = [cost(channels, side) for channels, _, side in stages]
        assert num_parameters(model) - parameters == sum(
            n * p for n, (p, _) in zip(times, each, strict=True)
        ), part.name
        added = (gmacs(model, 3, 64) - adds) * 1e9
        assert added == pytest.approx(
            sum(n * a for n, (_, a) in zip(times, each, strict=True)), abs=1
        ), part.name


def test_squeeze_excite_in_a_resnet_is_timms_seresnet():
    theirs = timm.create_model("seresnet50").eval()
    ours = timm.create_model("resnet50").eval()
    SqueezeExcite(position="after_last_norm", reduction=16).apply(ours, 64)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        (
            SqueezeExcite(position="after_last_norm", reduction=4),
            lambda c: SEModule(c, rd_channels=c // 4),
        ),
        (Eca(position="after_last_norm", kernel=5), lambda c: EcaModule(kernel_size=5)),
        (
            Cbam(position="after_last_norm", reduction=4, kernel=3),
            lambda c: CbamModule(c, rd_channels=c // 4, spatial_kernel_size=3),
        ),
    ],
    ids=["se", "eca", "cbam"],
)
@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_the_layer_computes_what_timms_does(model, part, layer):
    model = timm.create_model(model)
    place = part.apply(model, 64).places[0]
    ours = model.get_submodule(place).eval()
    channels = {"ResNet": 32, "ConvNeXt": 24}[type(model).__name__]
    theirs = layer(channels).eval()
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, channels, 5, 5)
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["after_last_norm", "after_middle", "after_block"])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnetv2_18", "convnext_atto", "convnext_tiny", "regnetx_002"]
)
def test_attention_stands_where_its_position_says(name, position):
    """A gate of 1/2 for everything halves exactly what the position names."""
    model = timm.create_model(
        name, **({"ls_init_value": 1.0} if "convnext" in name else {"zero_init_last": False})
    )
    plain = copy.deepcopy(model).eval()
    replacement = SqueezeExcite(position=position, reduction=1).apply(model, 64)
    for place in replacement.places:
        nn.init.zeros_(model.get_submodule(place).fc2.weight)
        nn.init.zeros_(model.get_submodule(place).fc2.bias)
    block_name = replacement.places[1].partition(".mlp.")[0]
    for ending in (".se", ".attention", ".act1.1", ".norm2.1", ".drop_path"):
        block_name = block_name.removesuffix(ending)
    ours, theirs = model.eval().get_submodule(block_name), plain.get_submodule(block_name)
    expected = {
        "after_last_norm": halved_branch,
        "after_middle": halved_middle,
        "after_block": halved,
    }[position]
    features = torch.randn(2, input_channels(theirs), 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(features), expected(theirs, features), rtol=0, atol=1e-5)


def input_channels(block):
    first = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels


def halved(block, features):
    return block(features) / 2


def halved_branch(block, features):
    """The block with the last layer of its branch giving half."""
    block = copy.deepcopy(block)
    kind = type(block).__name__
    last = {
        "BasicBlock": "bn2",
        "PreActBasic": "conv2",
        "ConvNeXtBlock": "mlp",
        "Bottleneck": "conv3",
    }[kind]
    block.get_submodule(last).register_forward_hook(lambda module, given, made: made / 2)
    return block(features)


def halved_middle(block, features):
    """The block with what its last convolution is given halved; ConvNeXt: what its first linear
    layer is given.
    """
    block = copy.deepcopy(block)
    last = {"BasicBlock": "conv2", "PreActBasic": "conv2", "ConvNeXtBlock": "mlp"}.get(
        type(block).__name__, "conv3"
    )
    block.get_submodule(last).register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    return block(features)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "resnetv2_18"])
@pytest.mark.parametrize("kind", [*ALL, Bam], ids=lambda kind: kind.__name__)
def test_every_module_trains_and_copies(name, kind):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    replacement = kind(**kind.example).apply(model, 64)
    copied = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    copied.load_state_dict(model.state_dict())
    assert (
        str(sum(count for _, count in replacement.before)) in str(replacement) and replacement.note
    )
    torch.manual_seed(0)
    again = timm.create_model(name, num_classes=4)
    kind(**kind.example).apply(again, 64)
    weights = [
        weight for place in replacement.places for weight in model.get_submodule(place).parameters()
    ]
    same = [
        weight for place in replacement.places for weight in again.get_submodule(place).parameters()
    ]
    assert weights and all(
        torch.equal(first, second) for first, second in zip(weights, same, strict=True)
    )


def test_weights_are_drawn_by_the_models_own_rule():
    torch.manual_seed(0)
    convnext, resnet = timm.create_model("convnext_tiny"), timm.create_model("resnet18")
    part = SqueezeExcite(position="after_block", reduction=1)
    last = convnext.get_submodule(part.apply(convnext, 64).places[-1]).fc1
    assert last.weight.std().item() == pytest.approx(0.02, rel=0.02) and not last.bias.any()
    last = resnet.get_submodule(part.apply(resnet, 64).places[-1]).fc1
    assert last.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)


def test_a_global_context_starts_as_if_it_were_not_there():
    model = timm.create_model("test_resnet").eval()
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    GlobalContext(position="after_block", reduction=2).apply(model, 64)
    assert torch.equal(before, model.eval()(images))


def test_stages_count_from_the_last_and_bam_ends_the_first_three():
    model = timm.create_model("resnet18")
    places = Eca(position="after_last_norm", stages=1).apply(model, 64).places
    assert places == ("layer4.0.se", "layer4.1.se")
    places = Bam(**Bam.example).apply(timm.create_model("convnext_atto"), 64).places
    assert places == tuple(f"stages.{stage}.blocks.attention" for stage in range(3))


@pytest.mark.parametrize(
    "name",
    ["seresnet18", "ecaresnet50t", "skresnet18", "resnest14d", "legacy_seresnet18", "regnety_002"],
)
def test_a_model_with_attention_is_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ReplacementError, match=r"model.attention: \w+ .*\d+ \w+.*resnet50"):
        Eca(position="after_last_norm").apply(model, 64)


def test_what_cannot_be_is_refused():
    with pytest.raises(ReplacementError, match=r"reduction=128: .* 32 channels"):
        SqueezeExcite(position="after_last_norm", reduction=128).apply(
            timm.create_model("test_resnet"), 64
        )
    with pytest.raises(ReplacementError, match="after_last_norm"):
        Eca(position="after_middle").apply(timm.create_model("res2net50_26w_4s"), 64)
    with pytest.raises(ValueError, match="even"):
        Eca(position="after_block", kernel=4)
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    with pytest.raises(ReplacementError, match="has no stages"):
        Eca(position="after_block").apply(model, 64)


def normed(values, gamma, beta):
    mean, var = (
        values.mean((0, 2, 3), keepdim=True),
        values.var((0, 2, 3), unbiased=False, keepdim=True),
    )
    return (values - mean) / (var + 1e-5).sqrt() * gamma[None, :, None, None] + beta[
        None, :, None, None
    ]


def test_bam_equals_a_plain_formula():
    torch.manual_seed(0)
    module = BottleneckAttention(8, hidden=2, dilation=4, num_convolutions=2).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    w = list(weights.values())
    assert [tuple(v.shape) for v in w[:6]] == [(2, 8, 1, 1), (2,), (8, 2, 1, 1), (8,), (8,), (8,)]
    features = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    hidden = (features.mean((2, 3)) @ w[0][:, :, 0, 0].T + w[1]).clamp(min=0)
    channels = normed((hidden @ w[2][:, :, 0, 0].T + w[3])[:, :, None, None], w[4], w[5])
    places = torch.einsum("bchw,dc->bdhw", features, w[6][:, :, 0, 0]) + w[7][None, :, None, None]
    for kernel, bias in ((w[8], w[9]), (w[10], w[11])):
        padded = functional.pad(places.clamp(min=0), [4] * 4)
        taps = [
            torch.einsum(
                "bchw,dc->bdhw",
                padded[:, :, 4 * i : 4 * i + 9, 4 * j : 4 * j + 7],
                kernel[:, :, i, j],
            )
            for i in range(3)
            for j in range(3)
        ]
        places = sum(taps) + bias[None, :, None, None]
    places = (
        torch.einsum("bchw,dc->bdhw", places.clamp(min=0), w[12][:, :, 0, 0])
        + w[13][None, :, None, None]
    )
    expected = features * (1 + 1 / (1 + (-(channels + normed(places, w[14], w[15]))).exp()))
    torch.testing.assert_close(module(features), expected, rtol=0, atol=1e-10)


def test_bam_gradients_are_exact():
    torch.manual_seed(0)
    module = BottleneckAttention(4, hidden=2, dilation=2, num_convolutions=1).double()
    features = torch.randn(3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (features,))
