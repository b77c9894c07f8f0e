"""Branches are left out, scaled and dropped where their fields say."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import drop_block2d

from trainer.models.edit.replacement import ReplacementError
from trainer.models.edit.stages import blocks
from trainer.models.parts.attention import SqueezeExcite
from trainer.models.parts.depth import (
    BatchDropPath,
    BlockDropout,
    DropBlock,
    LayerScale,
    StochasticDepth,
)

MODELS = ["resnet18", "test_convnext", "resnetv2_18", "regnetx_002", "convnext_tiny"]


def rates(model):
    found = []
    for block in (model.get_submodule(name) for stage in blocks(model) for name in stage):
        inside = [m.drop_prob for m in block.modules() if isinstance(m, (DropPath, BatchDropPath))]
        found.append(inside[0] if inside else 0.0)
        assert len(inside) < 2
    return found


@pytest.mark.parametrize("name", MODELS)
def test_rates_follow_their_closed_form(name):
    plain = timm.create_model(name, drop_path_rate=0.2)
    num_blocks = len(rates(plain))
    linear = [0.2 * place / (num_blocks - 1) for place in range(num_blocks)]
    assert rates(plain) == pytest.approx(linear)
    for over_depth, expected in (("linear", linear), ("constant", [0.2] * num_blocks)):
        for per, kind in (("sample", DropPath), ("batch", BatchDropPath)):
            model = copy.deepcopy(plain)
            replacement = StochasticDepth(over_depth=over_depth, per=per).apply(model, 64)
            assert rates(model) == pytest.approx(expected)
            assert all(type(model.get_submodule(place)) is kind for place in replacement.places)
            assert (
                len(replacement.places) == sum(rate > 0 for rate in expected)
                and f"per {per}" in replacement.note
            )
            assert not [
                m
                for m in model.modules()
                if isinstance(m, (DropPath, BatchDropPath)) and type(m) is not kind
            ]


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_block_is_left_out_for_an_image_or_for_all(per):
    model = timm.create_model("resnet18", drop_path_rate=0.5, zero_init_last=False)
    StochasticDepth(over_depth="constant", per=per).apply(model, 64)
    block = model.layer1[0].train()
    for norm in (block.bn1, block.bn2):
        norm.eval()
    torch.manual_seed(0)
    features = torch.rand(8, 64, 4, 4)
    counts = []
    for _ in range(40):
        same = [
            torch.equal(made, given) for made, given in zip(block(features), features, strict=True)
        ]
        counts.append(sum(same))
    if per == "batch":
        assert set(counts) == {0, 8}
    else:
        assert len(set(counts)) > 3
    assert sum(counts) / 320 == pytest.approx(0.5, abs=0.2 if per == "batch" else 0.1)


def test_samples_are_left_out_as_timm_does():
    plain = timm.create_model("test_resnet", drop_path_rate=0.4)
    model = copy.deepcopy(plain)
    StochasticDepth(over_depth="linear", per="sample").apply(model, 64)
    images, outputs = torch.randn(4, 3, 64, 64), []
    for each in (plain, model):
        torch.manual_seed(3)
        outputs.append(each(images))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "name", ["resnet18", "test_convnext", "resnetv2_18", "regnetx_002", "legacy_seresnet18"]
)
def test_drop_block_stands_in_the_last_stages(name):
    model = timm.create_model(name, num_classes=4)
    replacement = DropBlock(rate=0.2, block_px=3, stages=2).apply(model, 64)
    last = [block for stage in blocks(model)[-2:] for block in stage]
    assert len(replacement.places) == len(last)
    assert all(
        place.startswith(f"{block}.") for place, block in zip(replacement.places, last, strict=True)
    )
    assert sum(isinstance(m, BlockDropout) for m in model.modules()) == len(last)
    assert replacement.note.startswith("squares reduced to 2 px")
    given = []
    model.get_submodule(replacement.places[0]).register_forward_hook(
        lambda module, taken, made: given.append((taken[0], made))
    )
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    taken, made = given[0]
    assert taken.shape[2] == taken.shape[3] == 4 and (made == 0).sum() > (taken == 0).sum()
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_drop_block_in_a_resnet_stands_where_timms_does():
    ours, theirs = (
        timm.create_model("test_resnet"),
        timm.create_model("test_resnet", drop_block_rate=0.1),
    )
    places = DropBlock(rate=0.1, block_px=3, stages=2).apply(ours, 128).places
    assert list(places) == [
        name for name, m in theirs.named_modules() if type(m).__name__ == "DropBlock2d"
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "regnetx_002"])
def test_layer_scale_multiplies_the_branch(name):
    model = timm.create_model(name, zero_init_last=False, drop_path_rate=0.1)
    SqueezeExcite(position="after_last_norm", reduction=4).apply(model, 64)
    StochasticDepth(over_depth="constant", per="batch").apply(model, 64)
    replacement = LayerScale(start=1e-3).apply(model, 64)
    num_blocks = len(rates(model))
    assert (
        len(replacement.places) == num_blocks
        and replacement.note == ""
        and rates(model) == pytest.approx([0.1] * num_blocks)
    )
    block = model.get_submodule(blocks(model)[0][-1]).eval()
    scale = next(module for name, module in block.named_modules() if name.endswith("layer_scale"))
    assert torch.equal(scale.gamma, torch.full_like(scale.gamma, 1e-3))
    features = torch.rand(
        2,
        next(block.modules()).conv1.in_channels if hasattr(block.conv1, "in_channels") else 24,
        4,
        4,
    )
    with torch.no_grad():
        branch = {}
        for value in (0.0, 1.0, 0.5):
            nn.init.constant_(scale.gamma, value)
            # the addition that follows is in place
            handle = scale.register_forward_hook(
                lambda module, taken, made, value=value: branch.update(
                    {value: (taken[0].clone(), made.clone())}
                )
            )
            block(features)
            handle.remove()
    torch.testing.assert_close(branch[0.5][1], branch[1.0][0] * 0.5)
    assert branch[1.0][0].abs().sum() > 0 and branch[0.0][1].abs().sum() == 0
    names = [name for name, _ in block.named_children()]
    assert "drop_path" in names and [n for n, _ in block.drop_path.named_children()][-2:] == [
        "layer_scale",
        "drop_path",
    ]
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_a_zero_gamma_beside_layer_scale_is_said_and_stops_the_scales_first_gradient():
    model = timm.create_model("resnet18", num_classes=4, zero_init_last=True)
    replacement = LayerScale(start=1e-3).apply(model, 64)
    assert "8 branches" in replacement.note and "zero_init_last" in replacement.note
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert not model.get_submodule(replacement.places[0]).gamma.grad.any()
    assert model.layer1[0].bn2.weight.grad.any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ReplacementError, match=r"drop_path: 0.05"):
        StochasticDepth(over_depth="linear", per="batch").apply(
            timm.create_model("test_resnet"), 64
        )
    with pytest.raises(ReplacementError, match="residual branch"):
        model = timm.create_model("resnest14d", drop_path_rate=0.1)
        StochasticDepth(over_depth="constant", per="batch").apply(model, 64)
    with pytest.raises(ReplacementError, match=r"model.layer_scale: ConvNeXt has its own"):
        LayerScale(start=1e-6).apply(timm.create_model("test_convnext"), 64)


def test_a_batch_is_left_out_whole_at_its_rate_and_keeps_its_mean():
    torch.manual_seed(0)
    layer, ones = BatchDropPath(0.3), torch.ones(4, 2, 3, 3)
    made = [layer(ones) for _ in range(4000)]
    assert all(torch.equal(one, torch.full_like(one, one[0, 0, 0, 0].item())) for one in made)
    values = torch.stack([one[0, 0, 0, 0] for one in made])
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (values == 0).double().mean().item() == pytest.approx(0.3, abs=0.025)  # 3.4 deviations
    assert torch.equal(layer.eval()(ones), ones)
    assert layer.train()(ones.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rate", "block_px", "side"), [(0.1, 3, 8), (0.3, 5, 6), (0.2, 7, 3), (0.05, 1, 4)]
)
def test_block_dropout_equals_torchvisions(rate, block_px, side):
    features = torch.randn(3, 5, side, side)
    torch.manual_seed(1)
    expected = drop_block2d(features, rate, block_px)
    torch.manual_seed(1)
    torch.testing.assert_close(
        BlockDropout(rate, block_px)(features), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("block_px", [2, 4])
def test_squares_of_an_even_side_are_whole_and_inside(block_px):
    torch.manual_seed(0)
    made = BlockDropout(0.002, block_px)(torch.ones(64, 16, 12, 12))
    zeros = (made == 0).flatten(2).sum(-1)
    single = zeros[(zeros > 0) & (zeros <= block_px**2)]
    assert len(single) > 5 and set(single.tolist()) == {block_px**2}
    assert made.mean().item() == pytest.approx(1, abs=1e-5)


def test_the_dropped_share_is_the_rate_where_squares_do_not_meet():
    torch.manual_seed(0)
    dropped = (BlockDropout(0.01, 3)(torch.ones(200, 16, 10, 10)) == 0).double().mean().item()
    # 3200 maps of Poisson(0.11) squares of 9 places in 100, less what overlaps
    assert dropped == pytest.approx(0.01, rel=0.15)
    layer = BlockDropout(0.5, 3).eval()
    assert torch.equal(layer(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_half_precision_keeps_its_dtype_and_scale():
    torch.manual_seed(0)
    made = BlockDropout(0.1, 3)(torch.ones(16, 16, 16, 16, dtype=torch.bfloat16))
    assert made.dtype == torch.bfloat16 and made.float().mean().item() == pytest.approx(
        1, abs=0.005
    )
