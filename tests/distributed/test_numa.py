"""numa= binds each rank to the cores near its GPU, or says in one line why it does not."""

import dataclasses
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.numa.binding import AffinityMode, NumaOptions

from support.numa import pretend
from support.ranked import places
from trainer.base.errors import UserError
from trainer.base.settings import NUMA_BINDINGS, check_numa
from trainer.base.signals import StopRequest
from trainer.distributed import communicator, launch, numa
from trainer.distributed.numa import VARIABLE, asked_binding, binding_options, refuse_under_srun
from trainer.distributed.rendezvous import Rendezvous

GPUS = ["0000:1b:00.0", "0000:5a:00.0"]
TWO_NODES = {0: "0-31", 1: "32-63"}


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    """64 cores and two GPUs at these addresses, and numactl."""
    monkeypatch.setattr(numa, "pci_address", lambda gpu: GPUS[gpu])
    monkeypatch.setattr(numa, "own_cores", lambda: frozenset(range(64)))
    (tmp_path / "numactl").write_text("#!/bin/sh\n")
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def asked(root, binding, nodes, *of_gpus):
    """What torch is asked for on such a machine, and what is said."""
    said = []
    gpus = dict(zip(GPUS, of_gpus, strict=False))
    return binding_options(binding, 2, said.append, pretend(root, nodes, gpus)), said


def test_the_words_are_torchs():
    assert set(NUMA_BINDINGS) == {"off", *(mode.value for mode in AffinityMode)}
    with pytest.raises(UserError, match=r"numa=nodes: unknown.*node.*valid: off, node"):
        check_numa("nodes")


@pytest.mark.parametrize("binding", ["node", "socket", "exclusive", "core-complex"])
def test_ranks_are_bound_as_torchrun_would(binding, tmp_path):
    options, said = asked(tmp_path, binding, TWO_NODES, 0, 1)
    assert options == NumaOptions(affinity_mode=AffinityMode(binding)) and not said
    assert binding_options("off", 2, said.append) is None


@pytest.mark.parametrize(
    ("binding", "nodes", "of_gpus", "why"),
    [
        ("node", {0: "0-63"}, (0, 0), "one NUMA node"),
        ("socket", {0: "0-63", 1: ""}, (0, 0), "one NUMA node"),  # the other is memory
        ("node", {}, (-1, -1), "one NUMA node"),
        ("node", TWO_NODES, (0, -1), f"GPU 1 is on ({GPUS[1]}: numa_node -1)"),
        ("exclusive", TWO_NODES, (-1, 0), f"GPU 0 is on ({GPUS[0]}: numa_node -1)"),
        ("exclusive", {0: "0-63"}, (0,), f"GPU 1 is on ({GPUS[1]}: no such device)"),
    ],
)
def test_one_line_says_that_it_does_nothing(binding, nodes, of_gpus, why, tmp_path):
    options, said = asked(tmp_path, binding, nodes, *of_gpus)
    (line,) = said
    assert options is None and f"numa={binding}" in line and "nothing" in line and why in line


def test_the_cores_of_one_node_can_still_be_shared_out(tmp_path):
    """There Linux writes -1 as well."""
    options, said = asked(tmp_path, "exclusive", {0: "0-63"}, -1, -1)
    assert options.affinity_mode == "exclusive" and not said


def test_what_torch_would_fail_at_is_refused_before_a_rank_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "own_cores", lambda: frozenset(range(4, 32)))
    with pytest.raises(UserError, match=r"GPU 1 is on NUMA node 1.*\(it may use 4-31\).*numa=off"):
        asked(tmp_path, "node", TWO_NODES, 0, 1)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="numactl, which is not here; .*install.*numactl.*numa=off"):
        asked(tmp_path, "node", TWO_NODES, 0, 0)


def test_a_torch_that_cannot_bind_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "WorkerSpec", lambda role, args: None)
    with pytest.raises(UserError, match="torch .* cannot bind ranks so; use numa=off"):
        asked(tmp_path, "node", TWO_NODES, 0, 1)


def test_only_our_own_ranks_on_gpus_are_bound():
    srun = places(2)[0]
    torchrun = dataclasses.replace(srun, by="torchrun")
    assert asked_binding("node", 2, None, {}) == "node"
    assert asked_binding("off", None, None, {}) == asked_binding("off", None, srun, {}) == "off"
    for gpus, place, remedy in (
        (None, None, "gpus=2 or more"),
        (1, None, "gpus=2 or more"),
        (2, torchrun, "torchrun --numa-binding=node"),
        (2, srun, "--gpu-bind=single:1"),
    ):
        with pytest.raises(UserError, match=remedy):
            asked_binding("node", gpus, place, {})
    # our launcher has found that it would do nothing, or has done it
    assert asked_binding("node", 2, torchrun, {VARIABLE: "off"}) == "off"
    assert asked_binding("node", 2, torchrun, {VARIABLE: "node"}) == "node"
    refuse_under_srun("off")
    with pytest.raises(UserError, match="--gpu-bind=single:1"):
        refuse_under_srun("node")


def test_what_torch_itself_cannot_bind_is_the_users_to_know(monkeypatch):
    """The launcher's own attempt, with neither numactl nor the checks before it."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(launch.os, "environ", dict(os.environ))
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    options = NumaOptions(affinity_mode=AffinityMode.NODE)
    monkeypatch.setattr(launch, "binding_options", lambda *given: options)
    said = r"numa=node: torch cannot bind.*numa=off"
    with StopRequest() as stop, pytest.raises(UserError, match=said):
        launch.launch(2, ["--help"], stop, "node")


def test_no_rank_stays_where_a_later_one_could_not_be_started(monkeypatch):
    monkeypatch.setattr(launch.os, "environ", dict(os.environ))
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    started = []

    class Agent:
        def run(self):
            started.append(
                subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            )
            raise OSError("no second one")

        def get_worker_group(self):
            return SimpleNamespace(workers=[])

    monkeypatch.setattr(launch, "_agent", lambda *given: Agent())
    with StopRequest() as stop, pytest.raises(OSError, match="no second one"):
        launch.launch(2, ["--help"], stop)
    assert started[0].wait(30) == -signal.SIGTERM


def test_an_error_that_is_not_of_binding_stays_what_it_is():
    error = RuntimeError("another")
    assert numa.refused(error, "node") is error


def test_a_rank_takes_its_own_share_of_the_cores_of_its_own_machine():
    place = places(2)[0]
    rendezvous = Rendezvous(place, "cuda:0", lambda place, serves: None)
    near, far = ["a", 1, "cuda:0", "0-31"], ["a", 2, "cuda:1", "32-63"]
    for table, own in (
        ([near, near], 16),
        ([near, far], 32),
        ([near, ["b", 2, "cuda:0", "0-31"]], 32),
    ):
        rendezvous.table = table
        assert rendezvous.num_own_cores() == own


@pytest.mark.parametrize(("given", "threads"), [(None, 2), ("8", 8)])
def test_torch_has_no_more_threads_than_a_rank_has_cores(monkeypatch, given, threads):
    """But as many as the user says."""
    found = SimpleNamespace(threads=8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: found.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: vars(found).update(threads=number))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    communicator._use_threads(2)
    assert found.threads == threads
