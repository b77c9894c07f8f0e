"""The watch over the pretended GPU says what goes wrong there, and which line led to it."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from support.gpu_steps import collectives, started
from support.gpu_stub import is_loaded
from support.ranked import on_ranks
from trainer.components.pixels import fused
from trainer.data.prefetcher import CudaCopyStream
from trainer.engine.train import optimizer_step
from trainer.tasks import classification

pytestmark = [
    pytest.mark.gpu_stub,
    pytest.mark.skipif(not is_loaded(), reason="a real GPU has no watch"),
]


@pytest.fixture
def found(monkeypatch):
    """found(): what a watch finds in two steps of A2 with what is planted by then."""

    def watched():
        from support.gpu_stub.watch import Watch  # needs the library

        watch = Watch()
        with contextlib.suppress(RuntimeError), watch:
            for step in (2, 3):
                optimizer_step(state, window, step)
        return [f"{what}: {line}" for what, line in watch.found]

    state, window = started("A2")
    watched.state = state
    return watched


def test_nothing_is_found_where_nothing_is_planted(found):
    assert found() == []


def test_a_tensor_on_the_cpu(found, monkeypatch):
    def one_hot_targets(labels, num_classes, smoothing):
        return torch.zeros(len(labels), num_classes)

    monkeypatch.setattr(classification, "one_hot_targets", one_hot_targets)
    lines = found()
    assert any(
        "RuntimeError" in line and "device" in line and "components/" in line for line in lines
    ), lines


def test_a_value_read_in_a_step(found, monkeypatch):
    loss = classification.Classification.loss

    def read(*given):
        value = loss(*given)
        assert value.item() == 0
        return value

    monkeypatch.setattr(classification.Classification, "loss", read)
    lines = found()
    assert any("Synchronize" in line and "engine/train.py" in line for line in lines), lines


def test_a_copy_of_memory_that_is_not_pinned(found, monkeypatch):
    def on(device, array):
        return torch.from_numpy(array).to(device, non_blocking=True)

    monkeypatch.setattr(fused, "on", on)
    lines = found()
    assert any("pageable" in line and "pixels/fused.py" in line for line in lines), lines


def test_a_pinned_buffer_that_is_used_again(found, monkeypatch):
    buffers = {}

    def send(stream, tensor):
        """Without asking whether the copy before has read it."""
        key = tensor.shape, tensor.dtype
        buffer = buffers.setdefault(key, torch.empty_like(tensor).pin_memory()).copy_(tensor)
        with torch.cuda.stream(stream.stream):
            return buffer.to(stream.device, non_blocking=True)

    monkeypatch.setattr(CudaCopyStream, "send", send)
    lines = found()
    assert any("overwritten" in line and "data/prefetcher.py" in line for line in lines), lines


def test_an_optimizers_state_on_the_wrong_device(found, monkeypatch):
    for state in found.state.optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"], device="cpu")
    lines = found()
    assert any("RuntimeError" in line and "components/lamb.py" in line for line in lines), lines


_WORKERS = """
import json, os, signal, time
from support.gpu_stub.watch import Watch
from trainer.data import workers
workers._work = lambda *given: time.sleep(600)  # never looks whether its parent is there
with Watch() as watch, workers.Pool([range(9)], 2, print):
    print(json.dumps(watch.processes), flush=True)
    signal.pause()
"""


def test_a_worker_that_outlives_the_run():
    from support.gpu_stub.watch import left_over  # needs the library

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _WORKERS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as run:
        workers = {int(number): line for number, line in json.loads(run.stdout.readline()).items()}
        run.kill()
        run.stdout.close()
    left = left_over(workers, within_s=0.5)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert left == workers and len(left) == 2
    assert all("data/workers.py" in line for line in left.values())


@pytest.mark.gpu_stub(devices=2)
@pytest.mark.parametrize("alone_on", [None, 1])
def test_a_collective_on_one_rank_only(alone_on):
    from support.gpu_stub.watch import unmatched  # needs the library

    of_ranks = on_ranks(collectives, 2, alone_on, device="cuda")
    assert len(of_ranks[0]) > 0
    said = unmatched(of_ranks)
    assert ("of rank 1" in said and "engine/train.py" in said) == (alone_on == 1), said
