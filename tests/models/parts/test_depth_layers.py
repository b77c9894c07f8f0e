"""What is left out is left out as often as its papers say."""

import pytest
import torch
from torchvision.ops import drop_block2d

from trainer.models.parts.depth_layers import BatchDropPath, BlockDropout


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
