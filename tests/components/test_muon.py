"""Muon's orthogonal steps, and gradient descent beside them, are the formulas of their source."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from trainer.base.errors import PlanError
from trainer.components.muon import orthogonalized
from trainer.components.optimizers import DecoupledSgd, MuonSgd, OwnRates, Sgd
from trainer.components.param_groups import param_groups

FIELDS = {
    "momentum": 0.6, "nesterov": True, "iterations": 3, "sgd_momentum": 0.85, "sgd_nesterov": True,
    "weight_decay": 0.01,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mix = nn.Linear(8, 5, bias=False)
        self.fc = nn.Linear(5, 4)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.mix(self.conv(x).relu().mean((2, 3))))


def newton_schulz(matrix, iterations):
    """In float64, by the singular values alone: the iteration is an odd polynomial of them."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def stepped(weight, gradient, buffer, lr, decay, momentum, rule):
    """One step in float64: (weight, buffer)."""
    if rule == "sgd":
        gradient = gradient + decay * weight
    buffer = momentum * buffer + gradient
    update = gradient + momentum * buffer
    if rule == "sgd":
        return weight - lr * update, buffer
    if rule == "normalized":
        weight = weight * np.sqrt(len(weight)) / np.sqrt((weight**2).sum())
    weight = weight * (1 - lr * decay)
    update = newton_schulz(update.reshape(len(update), -1), 3).reshape(weight.shape)
    return weight - lr * update, buffer


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_the_iteration_moves_singular_values_alone(shape, iterations):
    matrix = np.random.default_rng(0).normal(size=shape)
    ours = orthogonalized(torch.from_numpy(matrix).float(), iterations)
    np.testing.assert_allclose(ours.numpy(), newton_schulz(matrix, iterations), atol=2e-5)


def test_small_gradients_are_as_good_as_large_ones():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(1e-9 * matrix, 3)
    torch.testing.assert_close(found, orthogonalized(matrix, 3), rtol=1e-4, atol=1e-5)
    assert not orthogonalized(0 * matrix, 3).any()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_are_the_sources(normalized, memory_format):
    torch.manual_seed(0)
    model = Net().to(memory_format=memory_format)
    rates = OwnRates(names=("fc.*",), lr_scale=3.0, weight_decay=0.02)
    rule = MuonSgd(**FIELDS, normalize_weights=normalized, own_rates=(rates,))
    optimizer = rule.build(param_groups(model, rule), lr=0.1)
    expected = {n: w.detach().double().numpy().copy() for n, w in model.named_parameters()}
    buffers = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        lr = 0.1 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 4).backward()
        for name, weight in model.named_parameters():
            is_muon = name in ("conv.weight", "mix.weight")
            how = ("normalized" if normalized else "muon") if is_muon else "sgd"
            scale, decay = (3.0, 0.02) if name.startswith("fc.") else (1.0, 0.01)
            expected[name], buffers[name] = stepped(
                expected[name], weight.grad.double().numpy(), buffers[name], lr * scale, decay,
                0.6 if is_muon else 0.85, how,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in model.named_parameters():
            np.testing.assert_allclose(
                weight.detach().numpy(), expected[name], rtol=1e-4, atol=2e-5, err_msg=name
            )


def test_a_saved_state_resumes_to_the_same_bits():
    torch.manual_seed(0)
    models = [Net()]
    models.append(copy.deepcopy(models[0]))
    rule = MuonSgd(**FIELDS)
    optimizers = [rule.build(param_groups(model, rule), lr=0.1) for model in models]
    images = torch.randn(6, 3, 8, 8)
    for step in range(4):
        if step == 2:  # a new one takes over
            models[1] = copy.deepcopy(models[1])
            saved = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = rule.build(param_groups(models[1], rule), lr=0.1)
            optimizers[1].load_state_dict(saved)
        for model, optimizer in zip(models, optimizers, strict=True):
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_weights_have_rates_and_decays_of_their_own_by_name():
    model = Net()
    own = (
        OwnRates(names=("conv.bias", "fc.bias"), lr_scale=64.0),
        OwnRates(names=("mi?.weight",), weight_decay=0.0),
    )
    rule = Sgd(momentum=0.9, weight_decay=0.1, no_decay_names=("fc.bias",), own_rates=own)
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {
        names[id(weight)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(model, rule)
        for weight in group["params"]
    }
    assert found == {
        "conv.weight": (1.0, 0.1), "conv.bias": (64.0, 0.1), "mix.weight": (1.0, 0.0),
        "fc.weight": (1.0, 0.1), "fc.bias": (64.0, 0.0),
    }  # fmt: skip


def test_decay_that_does_not_follow_the_rate_is_scaled_for_all():
    own = (OwnRates(names=("conv.bias",), lr_scale=2.0, weight_decay=0.02),)
    rule = DecoupledSgd(momentum=0.9, weight_decay=0.1, own_rates=own).scaled_by(0.5)
    assert (rule.weight_decay, rule.own_rates[0].weight_decay) == (0.05, 0.01)


@pytest.mark.parametrize("names", [("nothing.*",), ("conv.*", "nothing")])
def test_a_name_that_fits_nothing_is_refused(names):
    own = (OwnRates(names=names, lr_scale=2.0),)
    with pytest.raises(PlanError) as error:
        param_groups(Net(), Sgd(momentum=0.9, weight_decay=0.1, own_rates=own))
    assert error.value.path == ("optimizer", "own_rates") and error.value.hint


def test_a_weight_of_two_rates_is_refused():
    own = tuple(OwnRates(names=names, lr_scale=2.0) for names in (("conv.*",), ("*.bias",)))
    with pytest.raises(PlanError, match=r"conv\.bias") as error:
        param_groups(Net(), Sgd(momentum=0.9, weight_decay=0.1, own_rates=own))
    assert error.value.path == ("optimizer", "own_rates")


@pytest.mark.parametrize(
    "changes", [{"sgd_momentum": 0.0}, {"momentum": 0.0}, {"iterations": 0}, {"momentum": 1.0}]
)
def test_absurd_fields_are_refused(changes):
    with pytest.raises(ValidationError):
        MuonSgd(**FIELDS | changes)


def test_rates_that_say_nothing_are_refused():
    with pytest.raises(ValidationError):
        OwnRates(names=("fc.*",))
