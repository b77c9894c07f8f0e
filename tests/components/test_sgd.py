"""Decoupled SGD against its formula in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trainer.components.optimizers import DecoupledSgd, param_groups


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


def test_a_step_that_the_scaler_skips_leaves_the_weights_whole():
    page = DecoupledSgd(momentum=0.9, weight_decay=0.1)
    model = nn.Linear(3, 2, bias=False)
    optimizer = page.build(param_groups(model, page), 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.full((1, 3), float("inf"))).sum()).backward()
    before = model.weight.detach().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(model.weight, before)


def test_a_step_that_the_scaler_finds_infinite_leaves_out_the_decay():
    page = DecoupledSgd(momentum=0.9, weight_decay=0.1)
    model = nn.Linear(3, 2)
    optimizer = page.build(param_groups(model, page), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.tensor(1.0))
    expected = model.weight.detach().double().numpy().copy()
    for is_infinite in (True, False):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, torch.inf if is_infinite else 0.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expected = expected * (1.0 if is_infinite else 0.9)
        np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6)
