"""Several processes that the command, or torchrun, really starts: what they make together, and what becomes of it where one
is lost."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from plans import small_set

pytestmark = pytest.mark.drill  # each start of the program takes seconds: `make drill`
ROOT = Path(__file__).parent.parent
FLAGS = ["--recipe", "A1", "--model", "test_resnet", "--device", "cpu", "--workers", "0", "--checkpoint-s", "0"]
SET = small_set("batch.images=128 batch.norm_images=32")  # 2 epochs of 11 steps


def words(folder: Path, *more: str) -> list[str]:
    """Those of a training command in a folder, after `python`."""
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return ["-m", "trainer", "train", *FLAGS, "--set", SET, *places, *more]


def started(*command: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_by(folder: Path) -> dict:
    """The one row of a folder without its times, and the curves."""
    (path,) = (folder / "results" / "rows").glob("*.json")
    (metrics,) = (folder / "runs").glob("*/metrics.jsonl")
    row = json.loads(path.read_text())
    kept = ("run", "status", "steps", "world_size", "weights_sha256", "top1_pct", "loss_nats", "changes")
    return {name: row[name] for name in kept} | {"metrics": metrics.read_bytes()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    with started(*words(folder, "--procs", "2")) as process:
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0, (said, error)
    return left_by(folder)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_two_agents_of_torchrun_make_the_run_of_two_processes(undisturbed, tmp_path):
    """As on two machines: each agent starts one rank, and they find each other at one address."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=one"]
    agents = [started("-m", "torch.distributed.run", *meeting, *words(tmp_path)) for _ in range(2)]
    try:
        ended = [agent.communicate(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], ended
    said = "".join(out for out, _ in ended).splitlines()
    assert [line.split()[1] for line in said if line.startswith("rank ")] == ["0", "1"]
    assert sum(line.startswith("top-1") for line in said) == 1  # one rank speaks
    assert left_by(tmp_path) == undisturbed
