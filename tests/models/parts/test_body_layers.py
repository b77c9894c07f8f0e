"""The forms of a block and the pooling with a norm, in numbers and against torch."""

import pytest
import torch
from torch import nn

from trainer.models.parts.body_layers import (
    BlockForm,
    NormedPool,
    StagedBlock,
    make_stages,
    with_channels,
)


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
    assert [stage(torch.zeros(1, width, 8, 8)).shape for stage, width in zip(stages, (4, 4, 6, 8), strict=True)] == [
        (1, 4, 8, 8), (1, 6, 4, 4), (1, 8, 4, 4), (1, 10, 4, 4),
    ]  # fmt: skip


def test_pooling_with_a_norm_is_a_mean_and_a_layer_norm():
    pool, x = NormedPool("avg", 5), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(
        pool(x), nn.functional.layer_norm(x.mean((2, 3)), (5,), eps=1e-6), rtol=0, atol=1e-6
    )


def test_another_width_keeps_the_rest_of_a_convolution():
    made = with_channels(nn.Conv2d(3, 8, 7, 2, 3, bias=False), 12)
    assert (made.in_channels, made.out_channels, made.kernel_size, made.stride, made.padding, made.bias) == (
        3, 12, (7, 7), (2, 2), (3, 3), None,
    )  # fmt: skip
    assert made.weight.std().item() == pytest.approx(
        (2 / (12 * 49)) ** 0.5, rel=0.1
    )  # Kaiming, by what comes out
