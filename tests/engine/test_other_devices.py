"""Devices that no machine of ours has."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from support.plans import small_plan
from trainer.base import devices
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.components.transfer import on
from trainer.data import transforms
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step

_CASES = [("A2", "test_resnet"), ("convnext", "test_convnext2"), ("gn-ws", "resnet18")]


class Types(TorchDispatchMode):
    """The types of all tensors that operations give, and the operations."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.seen.setdefault(leaf.dtype, set()).add(str(function))
        return found


@pytest.fixture
def machine(monkeypatch):
    """machine(kind): settings of a machine with an accelerator of that kind."""

    def of(kind):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda **_: torch.device(kind)
        )
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 1)
        return make_settings("auto", "float32", workers="0")

    return of


@pytest.mark.parametrize("name, model", _CASES)
def test_a_step_and_an_evaluation_without_float64(monkeypatch, name, model):
    """Were the CPU a device that has none: operations that compute in it come before the images go
    there, and nothing else uses it.
    """
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"cpu"})
    settings, plan = make_settings("cpu", "float32", workers="0"), small_plan(name, model)
    data, state = open_data(plan.profile, None), TrainingState(plan, settings)
    window = data.train_stream(plan, settings, 0)
    batches = [next(window) for _ in range(plan.micro_batches(0))]
    scored = next(iter(data.val_batches(plan, settings)))
    augmented = transforms.augmented

    def before_they_go_there(*given):
        with _disable_current_modes():
            return augmented(*given)

    monkeypatch.setattr(transforms, "augmented", before_they_go_there)
    with Types() as types:
        loss = optimizer_step(state, iter(batches), 0)
        sums = state.task.evaluate(state.model.eval(), *scored)
    assert math.isfinite(loss.item()) and loss.dtype == sums.dtype == torch.float32
    assert torch.float32 in types.seen
    assert torch.float64 not in types.seen, types.seen[torch.float64]


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_auto_takes_the_accelerator_that_is_here(machine, kind):
    assert machine(kind).device == kind
    assert make_settings(kind, "bf16", workers="0").precision == "bf16"
    with pytest.raises(UserError, match=r"device=xpu:7.*0|1 Intel"):
        make_settings("xpu:7")


def test_arrays_reach_a_device_without_float64_in_single_precision(monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"cpu"})
    assert on(torch.device("cpu"), np.zeros(3)).dtype == torch.float32
    assert on(torch.device("cpu"), np.zeros(3, np.int64)).dtype == torch.int64
