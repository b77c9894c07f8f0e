"""BAM equals its paper's formulas."""

import torch
from torch.nn import functional

from trainer.models.parts.attention_layers import BottleneckAttention


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
