"""Clipping, and the optimizers that torch provides."""

import copy

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from trainer.base.component import registered
from trainer.components import lamb
from trainer.components.optimizers import AdamW, Lamb, Optimizer, RmspropTf, Sgd, clip_gradients
from trainer.components.param_groups import param_groups


def sgd(*no_decay, **fields):
    return Sgd(**{"momentum": 0.9, "weight_decay": 0.02, "no_decay": no_decay, **fields})


@pytest.mark.parametrize(("size", "is_active"), [(1e-3, False), (10.0, True)])
def test_clipping_divides_by_the_excess_only(size, is_active):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.zeros(shape, requires_grad=True) for shape in [(40, 30), (8, 4, 3, 3), (9,), (), (2,)]
    ]
    for weight in weights[:-1]:
        weight.grad = torch.randn(weight.shape, generator=generator) * size
    before = [weight.grad.double().numpy().copy() for weight in weights[:-1]]
    norm = clip_gradients(weights, 1.0)
    expected = np.sqrt(sum((gradient**2).sum() for gradient in before))
    assert norm.ndim == 0 and float(norm) == pytest.approx(expected, rel=1e-6)
    assert (expected > 1) == is_active
    for weight, gradient in zip(weights, before, strict=False):
        np.testing.assert_allclose(weight.grad.numpy(), gradient / max(1.0, expected), rtol=1e-6)
    assert weights[-1].grad is None


def test_a_gradient_that_is_not_a_number_shows_in_the_norm():
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert clip_gradients([weight], 1.0).isnan()


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        (
            Lamb(betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, no_decay=("biases",)),
            lamb.LambOptimizer,
        ),
        (
            AdamW(betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, no_decay=("biases",)),
            torch.optim.AdamW,
        ),
        (sgd("biases", nesterov=True, weight_decay=0.1), torch.optim.SGD),
    ],
)
def test_built_optimizers_carry_the_pages_numbers(page, cls):
    model = nn.Linear(3, 3)
    optimizer = page.build(param_groups(model, page), 0.25)
    assert type(optimizer) is cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 and group["fused"]
        for field in {"betas", "eps", "momentum", "nesterov"} & set(type(page).model_fields):
            assert group[field] == getattr(page, field)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_its_formula(momentum, nesterov):
    page = sgd(momentum=momentum, nesterov=nesterov)
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 0.1)
    expected, speed = model.weight.detach().double().numpy().copy(), 0.0
    for step in range(5):
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy() + 0.02 * expected
        speed = momentum * speed + gradient
        expected = expected - 0.1 * (gradient + momentum * speed if nesterov else speed)
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("decoupled_decay", [False, True])
def test_rmsprop_equals_its_formula(centered, decoupled_decay):
    """TensorFlow 1: the mean square starts at one, eps is inside the root, the rate enters the
    momentum.
    """
    page = RmspropTf(
        alpha=0.9,
        eps=1e-3,
        momentum=0.8,
        weight_decay=0.05,
        centered=centered,
        decoupled_decay=decoupled_decay,
    )
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 0.1)
    expected = model.weight.detach().double().numpy().copy()
    square, mean, speed = np.ones_like(expected), np.zeros_like(expected), np.zeros_like(expected)
    for step in range(5):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy()
        if decoupled_decay:
            expected = expected * (1 - rate * 0.05)
        else:
            gradient = gradient + 0.05 * expected
        square, mean = 0.9 * square + 0.1 * gradient**2, 0.9 * mean + 0.1 * gradient
        speed = 0.8 * speed + rate * gradient / np.sqrt(
            square - (mean**2 if centered else 0) + 1e-3
        )
        expected = expected - speed
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", registered(Optimizer), ids=lambda kind: kind.__name__)
def test_every_optimizers_example_moves_weights_downhill(kind):
    page = TypeAdapter(Optimizer).validate_python(
        {"name": kind.model_fields["name"].default, **kind.example}
    )
    model = nn.Linear(3, 1)
    optimizer = page.build(param_groups(model, page), 1e-3)
    before = model(torch.ones(1, 3)).item()
    model(torch.ones(1, 3)).backward()
    page.clip(model)
    optimizer.step()
    assert model(torch.ones(1, 3)).item() < before


def test_a_page_clips_as_it_says():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for page, is_cut in (
        (sgd(), False),
        (sgd(clip_global_norm=1e-3), True),
        (sgd(clip_adaptive=1e-3), True),
    ):
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        before = model[0].weight.grad.norm()
        page.clip(model)
        assert (model[0].weight.grad.norm() < before) == is_cut


def test_adamw_equals_its_formula():
    page = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 1e-2)
    expected, mean, square = model.weight.detach().double().numpy().copy(), 0.0, 0.0
    for step in range(1, 6):
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        expected = expected * (1 - 1e-2 * 0.05) - 1e-2 * update
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page", [AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05), sgd()])
def test_a_resume_may_change_the_memory_format(page):
    def steps(model, optimizer, numbers):
        for number in numbers:
            gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(number))
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
            optimizer.step()

    straight = nn.Conv2d(4, 8, 3, bias=False)
    halted = copy.deepcopy(straight)
    steps(straight, page.build(param_groups(straight, page), 0.01), range(6))
    saved = page.build(param_groups(halted, page), 0.01)
    steps(halted, saved, range(3))
    halted = halted.to(memory_format=torch.channels_last)
    resumed = page.build(param_groups(halted, page), 0.01)
    resumed.load_state_dict(saved.state_dict())
    steps(halted, resumed, range(3, 6))
    torch.testing.assert_close(halted.weight, straight.weight, rtol=1e-6, atol=1e-6)


ADAM = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02}


@pytest.mark.parametrize(
    "page",
    [
        {"name": "lamb", **ADAM, "betas": (0.9, 1.0)},
        {"name": "lamb", **ADAM, "betas": (-0.1, 0.9)},
        {"name": "lamb", **ADAM, "betas": (0.9,)},
        {"name": "lamb", **ADAM, "eps": 0.0},
        {"name": "adamw", **ADAM, "eps": 2.0},
        {"name": "adamw", **ADAM, "weight_decay": -0.01},
        {"name": "adamw", **ADAM, "weight_decay": 20.0},
        {"name": "adamw", **ADAM, "clip_global_norm": 0.0},
        {"name": "adamw", **ADAM, "no_decay": ("bn",)},
        {"name": "adamw", **ADAM, "no_decay": ("norms", "norms")},
        {"name": "adamw", **ADAM, "momentum": 0.9},
        {"name": "sgd", "momentum": 1.0, "weight_decay": 0.0},
        {"name": "sgd", "momentum": -0.9, "weight_decay": 0.0},
        {"name": "sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0.0},
        {"name": "sgd", "weight_decay": 0.0},
        {"name": "rmsprop", "weight_decay": 0.0},
        {"name": "rmsprop_tf", "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.0},
        {"name": "rmsprop_tf", "alpha": 1.0, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        {"name": "decoupled_sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0.0},
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip_adaptive": 0.0},
        {
            "name": "sgd",
            "momentum": 0.9,
            "weight_decay": 0.0,
            "clip_adaptive": 0.01,
            "clip_global_norm": 1.0,
        },
    ],
)
def test_absurd_pages_are_refused(page):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(Optimizer).validate_python(page)
    assert all("\n" not in error["msg"] for error in refusal.value.errors())
