"""On a GPU a micro-batch is made ready by a few kernels, and by torch's operations without them."""

import pytest
import torch

from support.gpu_steps import started
from support.gpu_stub import host_waits, is_loaded
from trainer.components.pixels import choice, fused
from trainer.engine.train import optimizer_step


@pytest.fixture
def unchecked():
    choice.why_not.cache_clear()
    yield
    choice.why_not.cache_clear()


@pytest.mark.gpu_stub
@pytest.mark.parametrize("name", ["A1", "A2", "A3", "convnext", "pycls-dds"])
def test_inputs_are_made_by_a_few_launches(name):
    state, window = started(name)
    assert not state.notes
    batch = next(window)
    state.task.prepare(batch)  # compiles for this shape
    before = counts()
    with host_waits() as waits:
        images, _ = state.task.prepare(batch)
    assert not waits
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    if is_loaded():
        found = counts() - before
        assert found["launches"] < 20
        assert found["copies_to_device"] <= 3


def counts():
    if not is_loaded():
        return None
    from support.gpu_stub.watch import counts as of_stub  # needs the library

    return of_stub()


@pytest.mark.gpu_stub
@pytest.mark.parametrize("error", [ImportError("no triton"), RuntimeError("ptxas failed\nlong")])
def test_without_kernels_torch_does_it_with_one_note(error, monkeypatch, unchecked):
    def refuse():
        raise error

    monkeypatch.setattr(fused, "_kernels", refuse)
    state, window = started("A2")
    ((note, _),) = state.notes
    assert str(error).splitlines()[0] in note and "\n" not in note
    optimizer_step(state, window, 2)
    images, _ = state.task.prepare(next(window))
    assert images.dtype == torch.float32
