"""Decoupled SGD against its formula in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trainer.components.optimizers import DecoupledSgd, Sgd
from trainer.components.param_groups import param_groups


def gradient(step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.875, False), (0.875, True)])
def test_weights_shrink_by_the_rates_share_of_its_peak(momentum, nesterov):
    page = DecoupledSgd(
        momentum=momentum, nesterov=nesterov, weight_decay=0.1, no_decay=("biases",)
    )
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), lr=2.0)
    expected = {
        name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()
    }
    speed = dict.fromkeys(expected, 0.0)
    for step, rate in enumerate((0.0, 1.0, 2.0, 1.5, 0.25)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, weight in model.named_parameters():
            weight.grad = gradient(step, weight.shape)
            slope = weight.grad.double().numpy()
            shrunk = expected[name] * (1 - (0.1 if name == "weight" else 0.0) * rate / 2.0)
            speed[name] = momentum * speed[name] + slope
            expected[name] = shrunk - rate * (
                slope + momentum * speed[name] if nesterov else speed[name]
            )
        optimizer.step()
    for name, weight in model.named_parameters():
        np.testing.assert_allclose(weight.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_knows_its_peak():
    page = DecoupledSgd(momentum=0.9, weight_decay=0.1)

    def steps(model, optimizer, numbers):
        for number in numbers:
            for group in optimizer.param_groups:
                group["lr"] = 1.0 / (1 + number)
            model.weight.grad = gradient(number, model.weight.shape)
            optimizer.step()

    straight = nn.Linear(5, 4, bias=False)
    halted = copy.deepcopy(straight)
    steps(straight, page.build(param_groups(straight, page), 1.0), range(6))
    saved = page.build(param_groups(halted, page), 1.0)
    steps(halted, saved, range(3))
    resumed = page.build(param_groups(halted, page), 1.0)
    resumed.load_state_dict(saved.state_dict())
    steps(halted, resumed, range(3, 6))
    assert torch.equal(halted.weight, straight.weight)


@pytest.mark.parametrize("kind", [Sgd, DecoupledSgd])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_the_scaler_finds_infinite_changes_nothing(kind, momentum):
    """The first one too, which is when fp16's scale is most often too large; the decay included."""
    page = kind(momentum=momentum, weight_decay=0.1)
    scaled, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(scaled.state_dict())
    optimizer, without = (
        page.build(param_groups(model, page), lr=1.0) for model in (scaled, plain)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        for weight in plain.parameters():
            weight.grad = gradient(step, weight.shape)
        without.step()
        for is_infinite in (True, False):
            scale = scaler.scale(torch.tensor(1.0))
            for weight in scaled.parameters():
                weight.grad = gradient(step, weight.shape) * (torch.inf if is_infinite else scale)
            before = [weight.detach().clone() for weight in scaled.parameters()]
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, scaled.parameters())) == is_infinite
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
