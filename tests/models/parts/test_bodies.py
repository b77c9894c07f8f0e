"""A rebuilt body against timm's own ResNets, closed forms, and the facts of its fields."""

import copy

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from trainer.models.edit.replacement import ReplacementError, find_layers
from trainer.models.parts.bodies import (
    BlockForm,
    NormedPool,
    StagedBlock,
    StagedBody,
    make_stages,
    with_channels,
)

PLAIN = {
    "depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "block": "bottleneck", "kernel_px": 3,
    "activations": "all", "norms": "all", "downsampling": "in_block",
}  # fmt: skip
CONVNEXT = StagedBody.example | {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32)}
FORMS = {
    "bottleneck": PLAIN,
    "depthwise": PLAIN | {"block": "depthwise"},
    "inverted": PLAIN | {"block": "inverted"},
    "moved up": PLAIN | {"block": "inverted_moved_up", "kernel_px": 7},
    "one activation": PLAIN | {"block": "inverted", "activations": "one"},
    "one norm": PLAIN | {"block": "depthwise", "norms": "one"},
    "separate": PLAIN | {"downsampling": "separate"},
    "ConvNeXt": CONVNEXT,
}


def rebuilt(fields, model=None, seed=0, **options):
    """A body in a timm model, or in a small ResNet of bottlenecks."""
    torch.manual_seed(seed)
    if model:
        made = timm.create_model(model, num_classes=5, **options)
    else:
        made = ResNet(Bottleneck, (2, 1, 1, 1), num_classes=5, channels=(8, 8, 8, 8), **options)
    replacement = StagedBody(**fields).apply(made, 64)
    return made, replacement


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def images(num=2, px=64):
    return torch.randn(num, 3, px, px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", ["resnet26", "resnet26d"])
@pytest.mark.parametrize("is_training", [False, True])
def test_bottlenecks_are_timms_of_those_depths_and_widths(model, is_training):
    ours, _ = rebuilt(PLAIN | {"widths": (64, 16, 24, 32)}, model)
    like_d = (
        {"stem_width": 32, "stem_type": "deep", "avg_down": True} if model.endswith("d") else {}
    )
    theirs = ResNet(Bottleneck, (1, 1, 2, 1), channels=(64, 16, 24, 32), num_classes=5, **like_d)
    theirs.load_state_dict(ours.state_dict())
    ours.train(is_training), theirs.train(is_training)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_every_form_trains_and_reads_its_own_weights(fields):
    model, _ = rebuilt(fields)
    logits = model(images())
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    other, _ = rebuilt(fields, seed=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        other.eval()(images()), copy.deepcopy(model).eval()(images()), rtol=0, atol=0
    )


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_first_weights_follow_torchs_seed(fields):
    one, again, other = (
        dict(rebuilt(fields, seed=seed)[0].named_parameters()) for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    weights = [name for name in one if one[name].ndim > 1]
    assert weights and not any(torch.equal(one[name], other[name]) for name in weights)


def shapes(block):
    return [
        (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
        for conv in (block.conv1, block.conv2, block.conv3)
    ]


def test_the_first_block_of_a_stage_has_the_papers_shapes():
    """Figure 3, with widths 16 -> 24 and a stride of 2."""
    wanted = {
        "bottleneck": [(64, 24, 1, 1, 1), (24, 24, 5, 2, 1), (24, 96, 1, 1, 1)],
        "depthwise": [(64, 24, 1, 1, 1), (24, 24, 5, 2, 24), (24, 96, 1, 1, 1)],
        "inverted": [(16, 96, 1, 1, 1), (96, 96, 5, 2, 96), (96, 24, 1, 1, 1)],
        "inverted_moved_up": [(16, 16, 5, 2, 16), (16, 96, 1, 1, 1), (96, 24, 1, 1, 1)],
    }
    for kind, expected in wanted.items():
        model, _ = rebuilt(PLAIN | {"block": kind, "kernel_px": 5})
        assert shapes(model.layer3[0]) == expected, kind
        shortcut = model.layer3[0].downsample[0]
        assert (shortcut.kernel_size, shortcut.stride) == ((1, 1), (2, 2))
        assert model.layer3[1].downsample is None


@pytest.mark.parametrize("kind", ["bottleneck", "depthwise", "inverted", "inverted_moved_up"])
def test_one_activation_and_one_norm_a_block(kind):
    model, replacement = rebuilt(PLAIN | {"block": kind, "activations": "one", "norms": "one"})
    found = find_layers(model)
    spatial = 1 if kind == "inverted_moved_up" else 2
    assert list(found.activations) == [f"{name}.act2" for name in replacement.places]
    in_branches = [place.name for place in found.norms if "downsample" not in place.name]
    assert in_branches == ["bn1", *(f"{name}.bn{spatial}" for name in replacement.places)]
    shortcuts = [block.downsample for block in blocks_of(model) if block.downsample is not None]
    assert shortcuts and all(isinstance(norm, nn.BatchNorm2d) for _, norm in shortcuts)
    branches = [
        conv for block in blocks_of(model) for conv in (block.conv1, block.conv2, block.conv3)
    ]
    assert all(conv.bias is not None and not conv.bias.any() for conv in [model.conv1, *branches])


def test_all_norms_leave_no_bias():
    model, _ = rebuilt(PLAIN | {"block": "inverted"})
    found = find_layers(model)
    assert len(found.activations) == 1 + 3 * 5 and all(place.norm for place in found.convolutions)
    assert all(place.module.bias is None for place in found.convolutions)


def test_separate_downsampling_halves_before_the_blocks():
    model, replacement = rebuilt(CONVNEXT)
    sides = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(
            lambda module, given, made: sides.append((given[0].shape[-1], made.shape[-1]))
        )
    model(images())
    assert sides == [(16, 16), (16, 8), (8, 4), (4, 2)]
    assert all(block.downsample is None and block.stride == 1 for block in blocks_of(model))
    norm, conv = model.layer2.downsample
    assert isinstance(norm, nn.BatchNorm2d) and (conv.kernel_size, conv.stride) == ((2, 2), (2, 2))
    assert find_layers(model).vector_norms == ("global_pool.norm",)
    assert "a layer norm after the pooling" in replacement.note


def test_drop_path_grows_from_zero_to_the_models_rate():
    model, _ = rebuilt(PLAIN, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks_of(model)]
    assert rates == pytest.approx([0.2 * place / 4 for place in range(5)])
    assert all(block.drop_path is None for block in blocks_of(rebuilt(PLAIN)[0]))


@pytest.mark.parametrize("is_zero", [True, False])
def test_branches_start_at_zero_where_the_models_did(is_zero):
    model, _ = rebuilt(PLAIN, zero_init_last=is_zero)
    assert all(bool(block.bn3.weight.any()) is not is_zero for block in blocks_of(model))


def test_the_swap_says_what_became_of_the_model():
    model, replacement = rebuilt(PLAIN, "resnet50")
    assert (
        str(replacement) == "body: layer1.0, layer2.0 … layer4.0: 16 Bottleneck -> 5 bottleneck "
        "(stem 64 -> 8 channels)"
    )
    assert model.num_features == model.head_hidden_size == model.fc.in_features == 128
    assert [info["num_chs"] for info in model.feature_info] == [8, 32, 64, 96, 128]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("convnext_atto", "ConvNeXt "),
        ("resnetv2_50", "ResNetV2 "),
        ("resnet18", "the blocks are BasicBlock"),
        ("resnext50_32x4d", "the blocks have 32 groups"),
        ("seresnet50", "the blocks have SEModule"),
        ("resnetaa50", "the blocks have AvgPool2d"),
        ("resnet50_gn", "the stem has GroupNorm"),
    ],
)
def test_other_models_are_refused_in_one_line(model, found):
    with torch.device("meta"):
        made = timm.create_model(model)
    with pytest.raises(ReplacementError) as refusal:
        StagedBody(**PLAIN).apply(made, 64)
    assert str(refusal.value).startswith(f"model.body: {found}") and "model=resnet50" in str(
        refusal.value
    )
    assert "\n" not in str(refusal.value)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValidationError, match="4 is even"):
        StagedBody(**(PLAIN | {"kernel_px": 4}))


def form(kind, activations="all", norms="all"):
    return BlockForm(kind, 3, activations, norms, nn.BatchNorm2d, nn.ReLU, pools_shortcuts=False)


def test_a_block_with_one_norm_and_one_activation_is_convnexts():
    """x + 1x1(relu(1x1(norm(depthwise(x))))), written with torch's functions."""
    torch.manual_seed(0)
    block = StagedBlock(form("inverted_moved_up", "one", "one"), 6, 6, 1, 0.0).eval()
    x = torch.randn(2, 6, 9, 9)
    features = nn.functional.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1, groups=6)
    features = (
        features / (1 + block.bn1.eps) ** 0.5
    )  # running statistics as they start: mean 0, variance 1
    for conv in (block.conv2, block.conv3):
        features = features.relu() if conv is block.conv3 else features
        features = (
            torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], features)
            + conv.bias[:, None, None]
        )
    torch.testing.assert_close(block(x), x + features, rtol=0, atol=1e-5)


def test_a_block_leaves_its_input_alone():
    block = StagedBlock(form("inverted_moved_up", "one", "one"), 6, 6, 1, 0.0)
    x = torch.randn(2, 6, 9, 9)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("drop_path", [0.5, 0.999])
def test_a_dropped_branch_leaves_the_shortcut(drop_path):
    torch.manual_seed(0)
    block = StagedBlock(form("inverted", "one", "one"), 6, 6, 1, drop_path).train()
    x = torch.randn(64, 6, 4, 4)
    is_left = (block(x) == x).flatten(1).all(1)
    assert is_left.float().mean().item() == pytest.approx(drop_path, abs=0.15)


@pytest.mark.parametrize(
    ("is_separate", "names"), [(False, {"0", "1"}), (True, {"downsample", "blocks"})]
)
def test_a_stage_with_its_own_downsampling_names_it(is_separate, names):
    stages = make_stages(form("inverted"), 4, (2, 2, 2, 2), (4, 6, 8, 10), is_separate, 0.0)
    assert {name for name, _ in stages[1].named_children()} == names
    widths = (4, 4, 6, 8)
    shapes = [stage(torch.zeros(1, n, 8, 8)).shape for stage, n in zip(stages, widths, strict=True)]
    assert shapes == [
        (1, 4, 8, 8), (1, 6, 4, 4), (1, 8, 4, 4), (1, 10, 4, 4),
    ]  # fmt: skip


def test_pooling_with_a_norm_is_a_mean_and_a_layer_norm():
    pool, x = NormedPool("avg", 5), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(
        pool(x), nn.functional.layer_norm(x.mean((2, 3)), (5,), eps=1e-6), rtol=0, atol=1e-6
    )


def test_another_width_keeps_the_rest_of_a_convolution():
    made = with_channels(nn.Conv2d(3, 8, 7, 2, 3, bias=False), 12)
    shape = made.in_channels, made.out_channels, made.kernel_size, made.stride, made.padding
    assert (*shape, made.bias) == (
        3, 12, (7, 7), (2, 2), (3, 3), None,
    )  # fmt: skip
    assert made.weight.std().item() == pytest.approx(
        (2 / (12 * 49)) ** 0.5, rel=0.1
    )  # Kaiming, by what comes out
