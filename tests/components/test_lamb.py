"""LAMB against timm's class and against its formula in float64."""

import copy
import io

import numpy as np
import pytest
import torch
from timm.optim import Lamb as TimmLamb

from support.gpu_stub import host_waits
from trainer.components import lamb
from trainer.components.optimizers import Lamb as LambPage
from trainer.components.optimizers import clip_gradients

SHAPES = [(64, 32, 3, 3), (32, 16), (10,), (7, 5, 1, 1), (), (300, 1100), (16,)]
RULE = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-6}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def weights_of(device="cpu", memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
    weights[1].zero_()
    weights = [
        weight.to(memory_format=memory_format) if weight.ndim == 4 else weight for weight in weights
    ]
    return [torch.nn.Parameter(weight.to(device)) for weight in weights]


def groups_of(weights, decay=0.02):
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def set_gradients(weights, step, size):
    """The same gradients on every call; the fourth tensor's are zero, and every second entry of the
    first's.
    """
    generator = torch.Generator().manual_seed(100 + step)
    for index, weight in enumerate(weights):
        gradient = torch.randn(weight.shape, generator=generator) * size
        if index == 3:
            gradient.zero_()
        if index == 0:
            gradient[::2] = 0
        weight.grad = torch.empty_like(weight).copy_(gradient)


def run(weights, optimizer, steps, size=1e-3, clip=None):
    for step in steps:
        set_gradients(weights, step, size)
        if clip is not None:
            clip_gradients(weights, clip)
        optimizer.step()
    return weights


def own(weights, decay=0.02):
    return lamb.LambOptimizer(groups_of(weights, decay), **RULE)


def assert_same(ours, theirs, tolerance=1e-6):
    for own_weight, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own_weight, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "clip"), [(1e-6, 1.0), (1e-3, 1.0), (1.0, 1.0), (1e-3, None)])
def test_equals_timm_over_many_steps(device, size, clip):
    """With the clip idle, active, and off; zero gradients, zero weights, groups with and without
    decay.
    """
    ours, theirs = weights_of(device), weights_of(device)
    run(ours, own(ours), range(20), size, clip)
    run(theirs, TimmLamb(groups_of(theirs), max_grad_norm=clip, **RULE), range(20), size)
    assert_same(ours, theirs)


def test_equals_timm_where_the_rate_changes_and_all_decays():
    ours, theirs = weights_of(), weights_of()
    one = lamb.LambOptimizer([{"params": ours, "weight_decay": 0.01}], **RULE)
    two = TimmLamb([{"params": theirs, "weight_decay": 0.01}], max_grad_norm=None, **RULE)
    for step in range(10):
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        run(ours, one, [step])
        run(theirs, two, [step])
    assert_same(ours, theirs)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_equals_its_formula_in_float64(decay):
    weights = weights_of()
    optimizer = lamb.LambOptimizer([{"params": weights, "weight_decay": decay}], **RULE)
    expected = [weight.detach().double().numpy().copy() for weight in weights]
    first = [np.zeros_like(weight) for weight in expected]
    second = [np.zeros_like(weight) for weight in expected]
    for step in range(5):
        run(weights, optimizer, [step])
        for index, weight in enumerate(weights):
            gradient = weight.grad.double().numpy()
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            mean, square = (
                first[index] / (1 - 0.9 ** (step + 1)),
                second[index] / (1 - 0.999 ** (step + 1)),
            )
            update = mean / (np.sqrt(square) + 1e-6) + decay * expected[index]
            norms = np.linalg.norm(expected[index]), np.linalg.norm(update)
            ratio = norms[0] / norms[1] if decay and all(norms) else 1.0
            expected[index] = expected[index] - 5e-3 * ratio * update
    assert_same(weights, [torch.tensor(weight, dtype=torch.float32) for weight in expected])


def test_the_result_does_not_depend_on_how_weights_are_bundled(monkeypatch):
    whole = weights_of()
    run(whole, own(whole), range(3))
    for limit in (1, 20_000, 1 << 30):
        monkeypatch.setattr(lamb, "_CPU_BUNDLE_WEIGHTS", limit)
        cut = weights_of()
        run(cut, own(cut), range(3))
        assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_a_weight_without_gradient_stays():
    weights = weights_of()
    before = weights[0].detach().clone()
    optimizer = own(weights)
    set_gradients(weights, 0, 1e-3)
    weights[0].grad = weights[2].grad = None
    optimizer.step()
    assert torch.equal(weights[0], before) and weights[0] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()  # none has one
    assert torch.equal(weights[0], before)


def test_a_decay_that_cancels_adams_step_leaves_the_weight():
    """Both norms must be above zero, not the weight's alone: here w = 1 and u = -1 + 1."""
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = -torch.ones(4)
    lamb.LambOptimizer(
        [{"params": [weight], "weight_decay": 1.0}], lr=0.1, betas=(0.0, 0.0), eps=1e-30
    ).step()
    assert weight.tolist() == [1.0] * 4


def test_a_saved_state_goes_on_bit_for_bit():
    straight = weights_of()
    run(straight, own(straight), range(8))
    halted = weights_of()
    optimizer = own(halted)
    run(halted, optimizer, range(3))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    fresh = own(halted)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    run(halted, fresh, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(halted, straight, strict=True))


@pytest.mark.parametrize("start", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_changes_nothing_not_even_across_a_resume(start):
    """torch's fused kernels walk memory by address: a moment laid out otherwise than its weight
    scrambles both.
    """
    page = LambPage(betas=(0.9, 0.999), eps=1e-6, weight_decay=0.02)
    plain = weights_of()
    run(plain, page.build(groups_of(plain), 5e-3), range(6))
    before = weights_of(memory_format=start)
    saved = page.build(groups_of(before), 5e-3)
    run(before, saved, range(3))
    for end in (torch.contiguous_format, torch.channels_last):
        after = weights_of(memory_format=end)
        with torch.no_grad():
            torch._foreach_copy_(after, before)
        resumed = page.build(groups_of(after), 5e-3)
        resumed.load_state_dict(copy.deepcopy(saved.state_dict()))  # torch loads without copying
        assert_same(run(after, resumed, range(3, 6)), plain)


def test_a_step_that_the_scaler_finds_infinite_changes_nothing():
    """The others are those without a scaler: fp16's scale is a power of two."""
    scaled, plain = weights_of(), weights_of()
    optimizer, without = own(scaled), own(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        set_gradients(plain, step, 1e-3)
        without.step()
        for is_infinite in (True, False):
            set_gradients(scaled, step, 1e-3 * scaler.scale(torch.tensor(1.0)).item())
            if is_infinite:
                scaled[0].grad[0] = torch.inf
            before = [weight.detach().clone() for weight in scaled]
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, scaled)) == is_infinite
    assert_same(scaled, plain)


@pytest.mark.gpu_stub
def test_a_step_never_waits_for_the_gpu():
    weights = weights_of("cuda")
    optimizer = own(weights)
    set_gradients(weights, 0, 1.0)
    with host_waits() as waits:
        clip_gradients(weights, 1.0)
        optimizer.step()
    assert not waits


@pytest.mark.parametrize("shape", [(), (5,), (1000, 1000), (40, 30, 3, 3)])
def test_norms_equal_numpys(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    layouts = (
        [tensor, tensor.to(memory_format=torch.channels_last)] if tensor.ndim == 4 else [tensor]
    )
    expected = np.linalg.norm(tensor.double().numpy())
    assert lamb.norms(layouts).tolist() == pytest.approx([expected] * len(layouts), rel=1e-6)
