"""Our normalization layers against plain loops in float64, written from the papers."""

import io
from copy import deepcopy

import pytest
import torch
from torch import nn

from trainer.models.edit.layer_kinds import ChannelsLast  # fmt: skip
from trainer.models.parts.norm_layers import (
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    GhostBatchNorm2d,
    SplitBatchNorm2d,
)

EPS, RATE = 1e-5, 0.1
LAYERS = {
    "ghost": lambda: GhostBatchNorm2d(6, 4, eps=EPS, momentum=RATE),
    "split": lambda: SplitBatchNorm2d(6, 2, eps=EPS, momentum=RATE),
    "estimated": lambda: EstimatedBatchNorm2d(6, eps=EPS, momentum=RATE),
    "bcn_batch": lambda: BatchChannelNorm2d(6, 3, EPS, RATE, "batch"),
    "bcn_estimated": lambda: BatchChannelNorm2d(6, 3, EPS, RATE, "estimated"),
    "channels_last": lambda: ChannelsLast(nn.GroupNorm(3, 6)),
}


def images(num, seed=0, px=3, channels=6):
    return (
        torch.randn(
            num,
            channels,
            px,
            px,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        * 2
        + 1
    )


def given(name, num=8):
    return images(num).permute(0, 2, 3, 1) if name == "channels_last" else images(num)


def drawn(layer, seed=1):
    """The layer in float64, no gamma and beta left at its start."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return layer


# Plain loops


def over_groups(x, num_groups, gamma, beta):
    """Every image by itself: each group of channels by its mean and variance, then one gamma and
    beta for the group.
    """
    size = x.shape[1] // num_groups
    made = []
    for image in x:
        parts = []
        for group in range(num_groups):
            part = image[group * size : (group + 1) * size]
            mean = part.sum() / part.numel()
            variance = ((part - mean) ** 2).sum() / part.numel()
            parts.append(gamma[group] * (part - mean) / (variance + EPS) ** 0.5 + beta[group])
        made.append(torch.cat(parts))
    return torch.stack(made)


def by_channel(x, means, variances, gamma, beta):
    parts = [
        gamma[c] * (x[:, c] - means[c]) / (variances[c] + EPS) ** 0.5 + beta[c]
        for c in range(x.shape[1])
    ]
    return torch.stack(parts, 1)


def moments(x):
    """Mean and biased variance of each channel over images and pixels, with gradients."""
    means = [x[:, c].sum() / x[:, c].numel() for c in range(x.shape[1])]
    return means, [((x[:, c] - means[c]) ** 2).sum() / x[:, c].numel() for c in range(x.shape[1])]


class PlainBcn:
    """Batch channel normalization of Qiao et al. 2019, with batch statistics or with estimated
    ones.

    The estimates move once a step, by all its images. The variance is around the mean from before
    its move in the authors' code, around the moved one in the paper's algorithm.
    """

    def __init__(self, layer, statistics, is_around_moved=False):
        self.is_around_moved = is_around_moved
        self.inner = [layer.batch.weight.detach().clone(), layer.batch.bias.detach().clone()]
        self.outer = [layer.weight.detach().clone(), layer.bias.detach().clone()]
        self.weights = [each.requires_grad_() for each in (*self.inner, *self.outer)]
        self.statistics, self.num_groups = statistics, layer.groups
        self.mean, self.variance = [0.0] * 6, [1.0] * 6

    def step(self, parts):
        """What comes out for each micro-batch of a step."""
        made = []
        for x in parts:
            means, variances = (
                moments(x) if self.statistics == "batch" else (self.mean, self.variance)
            )
            made.append(
                over_groups(
                    by_channel(x, means, variances, *self.inner), self.num_groups, *self.outer
                )
            )
        all_parts = torch.cat(parts).detach()
        for c in range(6):
            if self.statistics == "estimated":
                values = all_parts[:, c].flatten().tolist()
                before = self.mean[c]
                self.mean[c] += RATE * (sum(values) / len(values) - before)
                center = self.mean[c] if self.is_around_moved else before
                square = sum((value - center) ** 2 for value in values) / len(values)
                self.variance[c] += RATE * (square - self.variance[c])
            else:  # one micro-batch only
                n = all_parts[:, c].numel()
                means, variances = moments(all_parts)
                self.mean[c] += RATE * (float(means[c]) - self.mean[c])
                self.variance[c] += RATE * (float(variances[c]) * n / (n - 1) - self.variance[c])
        return made


@pytest.mark.parametrize(
    ("statistics", "sizes", "is_around_moved"),
    [
        ("batch", [8], False),
        ("estimated", [8], False),
        ("estimated", [2] * 4, False),
        ("estimated", [5, 2, 1], False),
        ("estimated", [8], True),
        ("estimated", [5, 2, 1], True),
    ],
)
def test_batch_channel_norm_is_a_plain_loop_over_several_steps(statistics, sizes, is_around_moved):
    layer = drawn(BatchChannelNorm2d(6, 3, EPS, RATE, statistics, is_around_moved))
    plain = PlainBcn(layer, statistics, is_around_moved)
    for step in range(4):
        layer.zero_grad()
        x, y = images(8, step).requires_grad_(), images(8, step).requires_grad_()
        made = torch.cat([layer(part) for part in x.split(sizes)])
        expected = torch.cat(plain.step(list(y.split(sizes))))
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-10)
        pull = images(8, 100 + step)
        (made * pull).sum().backward()
        gradients = torch.autograd.grad((expected * pull).sum(), [y, *plain.weights])
        ours = [
            x.grad,
            layer.batch.weight.grad,
            layer.batch.bias.grad,
            layer.weight.grad,
            layer.bias.grad,
        ]
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        if statistics == "estimated":
            layer.batch.finish_step()
        torch.testing.assert_close(
            layer.batch.running_mean,
            torch.tensor(plain.mean, dtype=torch.float64),
            rtol=0,
            atol=1e-12,
        )
        torch.testing.assert_close(
            layer.batch.running_var,
            torch.tensor(plain.variance, dtype=torch.float64),
            rtol=0,
            atol=1e-12,
        )
    with torch.no_grad():
        evaluated = layer.eval()(images(3, 9))
        inner = by_channel(images(3, 9), plain.mean, plain.variance, *plain.inner)
        torch.testing.assert_close(
            evaluated, over_groups(inner, 3, *plain.outer), rtol=0, atol=1e-10
        )


def test_the_authors_and_the_papers_estimates_differ_by_the_means_move():
    x = images(16)
    layers = [EstimatedBatchNorm2d(6, EPS, RATE, is_around) for is_around in (False, True)]
    for layer in layers:
        layer.double()(x)
        layer.finish_step()
    authors, papers = (layer.running_var for layer in layers)
    # From mean 0 and variance 1: 1 + r (E[x^2] - 1), and r (2 r - r^2) E[x]^2 less.
    torch.testing.assert_close(authors, 1 + RATE * (x.square().mean((0, 2, 3)) - 1))
    apart = RATE * (2 * RATE - RATE**2) * x.mean((0, 2, 3)).square()
    torch.testing.assert_close(authors - papers, apart)
    assert torch.equal(layers[0].running_mean, layers[1].running_mean)


def test_estimates_settle_on_mean_and_variance_of_what_is_seen():
    layer = EstimatedBatchNorm2d(6, EPS, RATE).double()
    x = images(16)
    for _ in range(300):
        layer(x)
        layer.finish_step()
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        layer.running_var, x.var((0, 2, 3), correction=0), rtol=0, atol=1e-10
    )


def test_estimates_of_a_large_mean_keep_their_variance():
    """A float32 sum of squares around zero would lose a variance of 1 at a mean of 10,000."""
    layer = EstimatedBatchNorm2d(6, EPS, 1.0)
    x = images(64).float() * 0.5 + 10_000
    for _ in range(2):
        layer(x)
        layer.finish_step()
    torch.testing.assert_close(
        layer.running_var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("num", "sizes"), [(8, [4, 4]), (10, [4, 4, 2]), (9, [4, 5]), (3, [3]), (5, [5]), (1, [1])]
)
def test_ghost_batch_norm_is_a_plain_loop_over_virtual_batches(num, sizes):
    layer = drawn(GhostBatchNorm2d(6, 4, eps=EPS, momentum=RATE))
    x, y = images(num).requires_grad_(), images(num).requires_grad_()
    parts = y.split(sizes)
    expected = torch.cat(
        [by_channel(part, *moments(part), layer.weight, layer.bias) for part in parts]
    )
    made = layer(x)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-10)
    pull = images(num, 5)
    (made * pull).sum().backward()
    torch.testing.assert_close(
        x.grad, torch.autograd.grad((expected * pull).sum(), y)[0], rtol=0, atol=1e-10
    )
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(layer.running_mean, RATE * mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 1 - RATE + RATE * variance, rtol=0, atol=1e-12)
    assert layer.num_batches_tracked == 1


def test_ghost_batch_norm_evaluates_as_batch_norm():
    layer, plain = drawn(GhostBatchNorm2d(6, 4, eps=EPS, momentum=RATE)), nn.BatchNorm2d(6).double()
    layer(images(8))
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(images(5, 1)), plain.eval()(images(5, 1)))


def test_channels_last_is_the_norm_over_permuted_axes():
    norm = drawn(nn.BatchNorm2d(6))
    plain, x = deepcopy(norm), images(4)
    assert torch.equal(ChannelsLast(norm)(x.permute(0, 2, 3, 1)), plain(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name):
    layer = drawn(LAYERS[name]())
    assert torch.autograd.gradcheck(
        lambda x, *weights: layer(x), (given(name).requires_grad_(), *layer.parameters())
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_copied_and_its_state_goes_round(name):
    layer, x = drawn(LAYERS[name]()), given(name)
    layer(x).sum().backward()
    copied = deepcopy(layer)  # in the middle of a step, as a user may
    for module in layer.modules():
        if isinstance(module, EstimatedBatchNorm2d):
            module.finish_step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = LAYERS[name]().double()
    again.load_state_dict(torch.load(file))
    for module in copied.modules():
        if isinstance(module, EstimatedBatchNorm2d):
            module.finish_step()
    expected = layer.eval()(x)
    assert torch.equal(again.eval()(x), expected) and torch.equal(copied.eval()(x), expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_gives_nearly_the_same(name, training):
    layer = drawn(LAYERS[name]()).float().train(training)
    x = given(name).float()
    expected = deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer(x.bfloat16())
    torch.testing.assert_close(made.float(), expected, rtol=0.03, atol=0.06)
    assert all(
        tensor.dtype == torch.float32
        for tensor in layer.state_dict().values()
        if tensor.is_floating_point()
    )
