"""airbench's recipes train as their source does: its network, loss, rates and steps, written here in
float64 from the paper and the script's own numbers, on the same inputs.
"""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from support.plans import small_plan
from support.ranked import in_float64
from trainer.base.settings import make_settings
from trainer.components.param_groups import param_groups
from trainer.data.dataset import open_data
from trainer.data.patches import planned_over
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of
from trainer.runs.plan_lines import decay_line
from trainer.runs.verify_curves import expected_lines

SETTINGS = make_settings("cpu", workers="0")


def normed(x, weights, name, statistics):
    """BatchNorm without a weight; statistics: of the evaluation, None in training."""
    if statistics is None:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = (statistics[f"{name}.running_{kind}"].double() for kind in ("mean", "var"))
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-12).sqrt()
    return x + weights[f"{name}.bias"][:, None, None]


def forward(weights, x, scale, statistics=None):
    x = functional.gelu(functional.conv2d(x, weights["whiten.weight"], weights["whiten.bias"]))
    for i in range(3):
        place = f"groups.{i}"
        x = functional.conv2d(x, weights[f"{place}.conv1.weight"], padding="same")
        x = functional.max_pool2d(x, 2)
        x = first = functional.gelu(normed(x, weights, f"{place}.norm1", statistics))
        for j in (2, 3):
            if f"{place}.conv{j}.weight" in weights:
                x = functional.conv2d(x, weights[f"{place}.conv{j}.weight"], padding="same")
                x = normed(x, weights, f"{place}.norm{j}", statistics)
                x = functional.gelu(x + first if j == 3 else x)
    x = functional.max_pool2d(x, 3).flatten(1)
    return x @ weights["head.weight"].T * scale


@pytest.mark.parametrize(("name", "scale"), [("airbench94", 1 / 256), ("airbench96", 1 / 9)])
def test_the_networks_are_the_sources(name, scale):
    torch.manual_seed(0)
    model = timm.create_model(name)
    images = torch.randn(8, 3, 32, 32)
    weights = {key: weight.detach().double() for key, weight in model.named_parameters()}
    with torch.no_grad():
        found = model(images).double()
        torch.testing.assert_close(
            found, forward(weights, images.double(), scale), rtol=1e-3, atol=1e-4
        )
        statistics = model.eval().state_dict()
        torch.testing.assert_close(
            model(images).double(),
            forward(weights, images.double(), scale, statistics),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("name", ["airbench94", "airbench96"])
def test_the_networks_start_as_the_sources(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for path, module in model.named_modules():
        if ".conv" in path:
            weight = module.weight.detach()
            number = weight.shape[1]
            filters = torch.zeros(number, number, 3, 3)
            filters[range(number), range(number), 1, 1] = 1
            assert torch.equal(weight[:number], filters)
            rest = weight[number:]
            bound = 1 / math.sqrt(9 * number)  # torch's default
            assert not len(rest) or rest.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        if ".norm" in path:
            assert not module.weight.requires_grad and module.bias.requires_grad
            assert module.momentum == pytest.approx({"airbench94": 0.4, "airbench96": 0.1}[name])
    if name == "airbench94":
        assert model.head.weight.detach().std().item() == pytest.approx(1, rel=1e-4)
        assert model.whiten.bias.abs().max() > 0
    else:
        assert model.head.weight.abs().max() <= 1 / math.sqrt(512)
        assert model.whiten.bias.abs().max() == 0


def orthogonal(matrix):
    """Newton and Schulz's iteration, three times, as polynomials of the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (values.square().sum().sqrt() + 1e-7)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def muon_sgd_step(weights, gradients, buffers, done_share):
    """airbench94_muon.py: sums over 2000 images, each part at its rate, all falling to zero."""
    for name, gradient in gradients.items():
        weight = weights[name].detach()
        if weight.ndim == 4:
            buffers[name] = 0.6 * buffers.get(name, 0) + gradient
            update = gradient + 0.6 * buffers[name]
            weight = weight * len(weight) ** 0.5 / weight.norm()
            update = orthogonal(update.flatten(1)).view_as(weight)
            weights[name] = weight - 0.24 * (1 - done_share) * update
        else:
            lr = 0.67 if name == "head.weight" else 0.053
            gradient = gradient + 2e-6 * 2000 / lr * weight
            buffers[name] = 0.85 * buffers.get(name, 0) + gradient
            weights[name] = weight - lr * (1 - done_share) * (gradient + 0.85 * buffers[name])


def test_airbench94_steps_as_its_source_does():
    """In float64, on noise, each step from where ours then is: at these rates rounding grows from
    step to step, and of flat images it chooses which of equal numbers is the largest of a pool.
    """
    with in_float64():
        _compare_steps()


def _compare_steps():
    overrides = "batch.norm_images=32 batch.drop_last=true model.freeze.from_epochs=0.05"
    plan = small_plan("airbench94", "airbench94", overrides, data="digits-grey")
    data = open_data(plan.profile, None)
    plan = planned_over(plan, data.train)
    state = TrainingState(plan, SETTINGS)
    named = dict(state.model.named_parameters())
    frozen_from = math.ceil(0.05 * plan.steps_per_epoch)
    stream = data.train_stream(plan, SETTINGS, 0)
    noise = torch.Generator().manual_seed(0)
    for step in range(frozen_from + 2):
        batch = next(stream)
        shape = batch.images.shape
        drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        batch = batch._replace(images=drawn)
        images, _ = state.task.prepare(batch)
        fixed = {n for n in named if n == "whiten.weight" or (".norm" in n and "weight" in n)}
        fixed |= {"whiten.bias"} if step >= frozen_from else set()
        weights = {
            name: weight.detach().double().requires_grad_(name not in fixed)
            for name, weight in named.items()
        }
        buffers = {
            name: state.optimizer.state[weight]["momentum_buffer"].double() * 2000
            for name, weight in named.items()
            if weight in state.optimizer.state
        }
        logits = forward(weights, images.double(), 1 / 256)
        summed = functional.cross_entropy(logits, batch.labels, label_smoothing=0.2) * 2000
        summed.backward()
        gradients = {n: weight.grad for n, weight in weights.items() if weight.requires_grad}
        before = {name: weight.detach().double().clone() for name, weight in named.items()}
        muon_sgd_step(weights, gradients, buffers, step / plan.num_steps)
        loss = optimizer_step(state, iter([batch]), step)
        assert loss.item() * 2000 == pytest.approx(summed.item(), rel=1e-6)
        for name, weight in named.items():
            expected = weights[name].detach() - before[name]
            found = weight.detach().double() - before[name]
            assert (found - expected).norm() <= 1e-3 * expected.norm(), (step, name)


@pytest.mark.parametrize("name", ["airbench94", "airbench96"])
def test_a_resumed_run_has_the_same_bits(name):
    """Filters of the images, momentum, slow weights, a bias that stops, flips by turns."""
    overrides = "batch.norm_images=32 model.freeze.from_epochs=0.1"
    data = open_data(plan_of(Job(name, name, "digits")).profile, None)

    def steps(first, until, saved=None):
        plan = planned_over(small_plan(name, name, overrides), data.train)
        state = TrainingState(plan, SETTINGS)
        if saved:
            state.load_state_dict(copy.deepcopy(saved))
        loader = data.train_stream(plan, SETTINGS, first)
        for step in range(first, until):
            optimizer_step(state, loader, step)
        return state.state_dict()

    whole, halves = steps(0, 8), steps(4, 8, steps(0, 4))
    for kind in ("model", "average"):
        for key, tensor in (whole[kind] or {}).items():
            assert torch.equal(tensor, halves[kind][key]), key


def test_airbench94s_run_is_the_sources():
    plan = plan_of(Job("airbench94", "airbench94", "cifar10"))
    assert not plan.deviations and plan.num_steps == 8 * 25
    rates = [plan.lr_at(step) for step in range(200)]
    assert rates == pytest.approx([0.24 * (1 - step / 200) for step in range(200)])
    recipe = load_recipe(find_recipe("airbench94"))
    assert [each.name for each in recipe.augment] == ["resize", "flip", "pad_crop"]


def test_airbench96s_run_is_the_sources():
    """By the formulas of legacy/airbench96.py, whose rates are for sums over 1024 images."""
    plan = plan_of(Job("airbench96", "airbench96", "cifar10"))
    assert not plan.deviations and plan.num_steps == 37 * 48 == 1776
    kilostep_scale = 1024 * (1 + 1 / (1 - 0.85))
    lr, decay = 9.0 / kilostep_scale, 0.012 * 1024 / kilostep_scale
    factors = [
        0.2 + 0.8 * step / 177 if step < 177 else (1776 - step) / (1776 - 177)
        for step in range(1776)
    ]
    rates = [plan.lr_at(step) for step in range(1776)]
    assert rates == pytest.approx([1024 * lr * factor for factor in factors])
    groups = param_groups(timm.create_model("airbench96"), plan.recipe.optimizer)
    found = {
        (group["lr_scale"], group["weight_decay"] * group["lr_scale"]): len(group["params"])
        for group in groups
    }
    expected = {(1.0, decay / (1024 * lr)): 12, (64.0, decay / (1024 * lr)): 9}
    assert {(round(a, 9), round(b, 9)): n for (a, b), n in found.items()} == {
        (a, round(b, 9)): n for (a, b), n in expected.items()
    }
    average = plan.recipe.average
    for done in (5, 100, 1775, 1776):
        weight = average.weight_at(done - 1, 0, 1024, 37, 48)
        kept = 1.0 if done == 1776 else 0.95**5 * (done / 1776) ** 3
        assert weight == pytest.approx(1 - kept)
    assert average.weight_at(5, 0, 1024, 37, 48) is None
    erasing = plan.recipe.augment[-1]
    ids = np.stack([np.zeros(500), np.arange(500), np.zeros(500)], 1).astype(np.int64)
    boxes = erasing.draw(0, ids, 32)["box"]
    assert (boxes[:, 2:] == 12).all() and boxes[:, :2].max() == 20 and boxes[:, :2].min() == 0


def test_airbench96_on_other_data_keeps_its_shares_and_its_rule():
    plan = plan_of(Job("airbench96", "airbench96", "digits"))
    assert plan.recipe.lr.peak == pytest.approx(1.173913043478261 * plan.recipe.batch.images / 1024)
    assert plan.num_warmup_steps == round(177 * plan.num_steps / 1776)


def test_the_decay_of_rates_of_their_own_is_told():
    plan = plan_of(Job("airbench94", "airbench94", "cifar10"))
    model = timm.create_model("airbench94")
    head = model.get_classifier().weight.numel()
    assert f"2.98507e-06 on {head:,}" in decay_line(plan, model)


def test_an_average_that_is_the_model_is_scored_once():
    average = "average='{name: lookahead, decay: 0.5, every_steps: 2}'"
    plan = small_plan("A3", overrides=average)
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    assert list(state.weights()) == ["model"] and state.average is not None
    scores = [line for line in expected_lines(plan, 10, plan.num_steps) if "scores" in line]
    assert scores and not any("average" in line for line in scores)
