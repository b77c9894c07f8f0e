"""Evolving attention: its size by hand, its arithmetic by loops."""

import pytest
import timm
import torch
from torch.nn import functional as F

from trainer.models.build import num_parameters
from trainer.models.zoo.ea_resnet import EvolvingConv, _doubled


def test_it_is_a_resnet_50_whose_3x3_convolutions_are_others():
    """No count of it is published: this is the sum of what its description says."""
    with torch.device("meta"):
        found = num_parameters(timm.create_model("ea_resnet50"))
        expected = num_parameters(timm.create_model("resnet50"))
    for channels, blocks, side, evolving in ((128, 4, 14, 3), (256, 6, 14, 6), (512, 3, 7, 2)):
        key, value, heads = channels // 4, channels // 8, 8
        expected -= blocks * 9 * channels * value  # given over to attention
        projected = 2 * key + value
        expected += blocks * (channels * projected + projected + value * value + value)
        expected += blocks * 2 * (2 * side - 1) * key // heads
        expected += evolving * (9 * heads * heads + heads)
    assert found == expected


def made(layer):
    generator = torch.Generator().manual_seed(1)
    layer = layer.double()
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3
    return layer


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("stride", "is_pooled"), [(1, False), (2, False), (1, True)])
def test_attention_is_the_formula(stride, is_pooled, is_first):
    side, channels, heads = 4, 64, 8
    px = side * stride * (2 if is_pooled else 1)
    layer = made(EvolvingConv(channels, side, stride, is_pooled, is_first))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, px, px, generator=generator, dtype=torch.float64)
    before = torch.randn(1, heads, side**2, side**2, generator=generator, dtype=torch.float64)
    out, logits = layer(x, None if is_first else before)

    seen = x[0]
    if px > side:  # a 3x3 mean at every second pixel, of what lies inside
        pooled = torch.zeros(channels, side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                pooled[:, i, j] = seen[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean(dim=(1, 2))
        seen = pooled
    flat = seen.flatten(1).T  # [pixels, channels]
    kqv = flat @ layer.kqv.weight[:, :, 0, 0].T + layer.kqv.bias
    k, q, v = kqv.split((channels // 4, channels // 4, channels // 8), dim=1)
    dim, value_dim = channels // 4 // heads, channels // 8 // heads
    expected, values = torch.zeros_like(logits[0]), torch.zeros(side**2, channels // 8).double()
    for head in range(heads):
        own_q, own_k = (each[:, head * dim : (head + 1) * dim] for each in (q, k))
        for one in range(side**2):
            for other in range(side**2):
                down = other // side - one // side + side - 1
                right = other % side - one % side + side - 1
                position = layer.rows[down] + layer.columns[right]
                expected[head, one, other] = dim**-0.5 * own_q[one] @ (own_k[other] + position)
    if not is_first:
        mixed = (0.5 * expected + 0.5 * before[0])[None]
        expected = F.conv2d(mixed, layer.evolve.weight, layer.evolve.bias, padding=1)[0].clamp(
            min=0
        )
    torch.testing.assert_close(logits[0], expected)
    for head in range(heads):
        own = slice(head * value_dim, (head + 1) * value_dim)
        values[:, own] = expected[head].softmax(dim=1) @ v[:, own]
    values = (values @ layer.out.weight[:, :, 0, 0].T + layer.out.bias).T.reshape(-1, side, side)
    number = channels - channels // 8
    torch.testing.assert_close(out[:, :number], F.conv2d(x, layer.conv.weight, None, stride, 1))
    attended = out[0, number:]
    if is_pooled:  # pixels where the pooled ones are, means of two between
        torch.testing.assert_close(attended[:, ::2, ::2], values)
        torch.testing.assert_close(
            attended[:, ::2, 1:-1:2], (values[:, :, 1:] + values[:, :, :-1]) / 2
        )
    else:
        torch.testing.assert_close(attended, values)


def test_between_two_values_is_their_mean_and_the_last_stands_twice():
    assert _doubled(torch.tensor([1.0, 3.0, 7.0])).tolist() == [1, 2, 3, 5, 7, 7]


def test_logits_are_carried_through_two_stages_and_begin_anew_in_the_last():
    model = timm.create_model("ea_resnet50", img_size=64, num_classes=3)
    blocks = [block for number in (2, 3, 4) for block in model.get_submodule(f"layer{number}")]
    assert [place for place, block in enumerate(blocks) if block.conv2.evolve is None] == [0, 10]
    sides = []
    for block in blocks:
        block.conv2.register_forward_hook(lambda _, __, made: sides.append(made[1].shape[-1]))
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert sides == [16] * 10 + [4] * 3


def test_its_images_have_one_size():
    with pytest.raises(ValueError, match="img_size=32"):
        timm.create_model("ea_resnet50", img_size=32)(torch.zeros(1, 3, 64, 64))
