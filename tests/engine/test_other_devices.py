"""Devices that no machine of ours has: their tensors have a shape, a type and a device, but no
values.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine import state as state_module
from trainer.engine.state import TrainingState
from trainer.engine.step_memory import without_values
from trainer.engine.train import optimizer_step
from trainer.models.build import assemble

_CASES = [("A2", "test_resnet"), ("convnext", "test_convnext2"), ("gn-ws", "resnet18")]


class Types(TorchDispatchMode):
    """The types of all tensors that an operation gives on a device, and the operations."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen = kind, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.kind:
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
@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_step_and_an_evaluation_take_place_there(machine, monkeypatch, kind, name, model):
    """An Apple GPU has no float64: no tensor of that type is ever on it."""
    settings, plan = machine(kind), small_plan(name, model)
    data, here = open_data(plan.profile, None), make_settings("cpu", workers="0")
    window = data.train_stream(plan, here, 0)
    batches = [next(window) for _ in range(plan.micro_batches(0))]
    scored = [next(iter(data.val_batches(plan, here)))]
    assert settings.device == kind
    # with its number torch does not ask a driver for the current one
    settings = replace(settings, device=f"{kind}:0")
    assembled, replacements = assemble(plan)  # which asks what values weights have
    with FakeTensorMode(allow_non_fake_inputs=True), Types(kind) as types:
        model = without_values(assembled, settings.device)
        monkeypatch.setattr(state_module, "assemble", lambda _: (model, replacements))
        state = TrainingState(plan, settings)
        loss = optimizer_step(state, iter(batches), 0)
        task = state.task
        sums = task.evaluate(state.model.eval(), *scored[0])
    assert loss.device.type == sums.device.type == kind
    assert {weight.device.type for weight in state.model.parameters()} == {kind}
    assert torch.float32 in types.seen
    if kind == "mps":
        assert torch.float64 not in types.seen, types.seen[torch.float64]
