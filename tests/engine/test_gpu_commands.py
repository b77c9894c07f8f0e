"""Whole commands on a GPU, whatever it computes."""

import json
import os
import sys

import pytest

from support.commands import ROOT, program, rsb
from support.numa import pretend
from trainer.base.cores import own_cores
from trainer.base.devices import pci_address
from trainer.base.numa import list_of

pytestmark = pytest.mark.gpu_stub


def words_of(folder, *words):
    """A short training, with its files in a folder."""
    short = "epochs=2 lr.warmup_epochs=1 batch.images=256 batch.norm_images=64"
    files = ["--runs", folder / "runs", "--results", folder / "results"]
    return ["train", *files, "--model", "test_resnet", "--set", short, *words]


def row_of(folder):
    return json.loads(next((folder / "results" / "rows").glob("*.json")).read_text())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_is_trained_evaluated_and_exported(workers, tmp_path):
    done = rsb(*words_of(tmp_path, "--recipe", "torchvision-v2", "--workers", workers))
    assert done.exit_code == 0, done.output
    row = row_of(tmp_path)
    assert row["device"] != "cpu" and row["precision"] == "bf16" and not row["bitwise"]
    assert row["peak_mem_mib"] > 10
    assert next((tmp_path / "runs").glob("*/model.safetensors")).stat().st_size > 1e5


@pytest.mark.gpu_stub(devices=2)
@pytest.mark.parametrize("is_captured", [False, True])
def test_two_ranks_train_one_run(is_captured, tmp_path):
    words = ["--recipe", "A2", "--gpus", "2", "--workers", "0", "--cuda-graphs", int(is_captured)]
    done = program(*words_of(tmp_path, *words))
    assert done.returncode == 0, done.stdout + done.stderr
    row = row_of(tmp_path)
    assert row["world_size"] == 2 and row["precision"] == "bf16"
    assert row["cuda_graphs"] is is_captured and not row["half_group_norm"]


# In every process that the command starts: what it opens of /sys is below a folder.
PRETENDED = """
import builtins, io, os
real = io.open
def opened(path, *given, **named):
    inside = {root!r} + str(path)
    is_pretended = str(path).startswith("/sys/") and os.path.exists(inside)
    return real(inside if is_pretended else path, *given, **named)
builtins.open = io.open = opened
"""
NUMACTL = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
from trainer.base.numa import numbers_of
os.sched_setaffinity(0, numbers_of(sys.argv[1].removeprefix("--physcpubind=")))
os.execvp(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.gpu_stub(devices=2)
@pytest.mark.parametrize("has_nodes", [True, False])
def test_ranks_are_bound_to_the_cores_near_their_gpus(has_nodes, tmp_path, monkeypatch):
    """By torch's own launcher, on a machine whose second half of cores is near the first GPU."""
    cores = sorted(own_cores())
    near = [cores[: len(cores) // 2] or cores, cores[len(cores) // 2 :]]
    nodes = {number: list_of(own) for number, own in enumerate(near)}
    nodes = nodes if has_nodes else {0: list_of(cores)}
    pretend(tmp_path, nodes, {pci_address(0): int(has_nodes), pci_address(1): 0})
    (tmp_path / "sitecustomize.py").write_text(PRETENDED.format(root=str(tmp_path)))
    (tmp_path / "numactl").write_text(NUMACTL.format(python=sys.executable, root=str(ROOT)))
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = program(*words_of(tmp_path, "--recipe", "A2", "--gpus", "2", "--numa", "node"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    used = [line.rpartition(" cores ")[2] for line in lines if line.startswith("rank ")]
    assert used == ([nodes[1], nodes[0]] if has_nodes else [nodes[0]] * 2)
    assert ("numa=node: does nothing" in done.stdout) is not has_nodes
    row, most = row_of(tmp_path), len(near[1]) if has_nodes else max(1, len(cores) // 2)
    assert row["numa"] == ("node" if has_nodes else "off")
    assert 1 <= row["num_workers"] <= most and row["num_threads"] <= most
