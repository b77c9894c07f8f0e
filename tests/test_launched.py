"""Several processes that the command, or torchrun, really starts: what they make together, and what becomes of it where one
is lost."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forked
from plans import small_set
from test_resume import ending
from trainer import meeting

pytestmark = pytest.mark.drill  # each start of the program takes seconds: `make drill`
ROOT = Path(__file__).parent.parent
FLAGS = ["--recipe", "A1", "--model", "test_resnet", "--device", "cpu", "--workers", "0", "--checkpoint-s", "0"]
SET = small_set("batch.images=128 batch.norm_images=32")  # 2 epochs of 11 steps


def words(folder: Path, *more: str) -> list[str]:
    """Those of a training command in a folder, after `python`."""
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return ["-m", "trainer", "train", *FLAGS, "--set", SET, *places, *more]


@contextlib.contextmanager
def started(*command: str):
    """Python at work with these words; killed where it still runs at the end of the block."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


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
    """For a moment."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_two_agents_of_torchrun_make_the_run_of_two_processes(undisturbed, tmp_path):
    """As on two machines: each agent starts one rank, and they find each other at one address."""
    address = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=one"]
    agent = ("-m", "torch.distributed.run", *address, *words(tmp_path))
    with started(*agent) as one, started(*agent) as other:
        ended = [process.communicate(timeout=300) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), ended
    said = "".join(out for out, _ in ended).splitlines()
    assert [line.split()[1] for line in said if line.startswith("rank ")] == ["0", "1"]
    assert sum(line.startswith("top-1") for line in said) == 1  # one rank speaks
    assert left_by(tmp_path) == undisturbed


def until(process: subprocess.Popen, found: str) -> list[str]:
    """The lines of a process up to one that begins so."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(found):
            return said
    raise AssertionError((said, process.stderr.read()))


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process of a rank, as soon as its launcher has started it: before it has imported anything."""
    until_s = time.monotonic() + 100
    while time.monotonic() < until_s:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if f"\nPPid:\t{launcher.pid}\n" in (folder / "status").read_text() and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                    return int(folder.name)
        time.sleep(0.02)
    raise AssertionError((f"no rank {rank}", launcher.poll()))


def test_two_processes_stop_together_and_go_on_by_the_same_command(undisturbed, tmp_path):
    with started(*words(tmp_path, "--procs", "2")) as process:
        said = until(process, "epoch    1  val top-1")
        process.send_signal(signal.SIGTERM)
        rest, error = process.communicate(timeout=100)
    assert process.returncode == 75, (said, rest, error)
    assert "stopped by SIGTERM after step" in rest and error == ""
    assert [line.split()[1] for line in said if line.startswith("rank ")] == ["0", "1"]
    assert any("128 images per step = 2 ranks x 2 micro-batches x 32 images" in line for line in said)
    with started(*words(tmp_path, "--procs", "2")) as process:
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on after step" in said, (said, error)
    assert left_by(tmp_path) == undisturbed
    assert undisturbed["world_size"] == 2 and undisturbed["steps"] == 22 and undisturbed["changes"] == []
    scores = [line for line in said.splitlines() if "top-1" in line]
    assert len(scores) == len(set(scores)) and sum(line.startswith("top-1") for line in scores) == 1  # one rank speaks


def listens(process: int, is_so: str, number: int = signal.SIGTERM) -> bool:
    """Is a signal caught (SigCgt) by a process, or does it wait for it (ShdPnd)?"""
    mask = Path(f"/proc/{process}/status").read_text().partition(f"{is_so}:\t")[2].split()[0]
    return bool(int(mask, 16) >> number - 1 & 1)


def test_a_signal_that_a_rank_cannot_hear_yet_is_a_stop_all_the_same(tmp_path):
    """It ends that rank, and the other waits for one that never comes."""
    with started(*words(tmp_path, "--procs", "2")) as process:
        deaf = rank_of(process, 0)
        os.kill(deaf, signal.SIGSTOP)
        other, until_s = rank_of(process, 1), time.monotonic() + 100
        while not listens(other, "SigCgt") and time.monotonic() < until_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while not listens(deaf, "ShdPnd") and time.monotonic() < until_s:
            time.sleep(0.02)
        assert listens(other, "SigCgt") and not listens(deaf, "SigCgt")
        os.kill(deaf, signal.SIGCONT)
        said, error = process.communicate(timeout=40)
    assert process.returncode == 75 and error == "", (said, error)
    assert "before all ranks had come; the same command goes on" in said and not list(tmp_path.rglob("*.pt"))


def as_rank(rank: int, port: int, come_s: float) -> None:
    """This process is one of two, started as torchrun of an older day does: rank 0 keeps the meeting point."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting.COME_S = come_s


def ends_of(folder: Path, *more: str, come=(0, 1), come_s: float = 20) -> list[tuple[int, str]]:
    """(exit code, all that was printed) of the program on two ranks, in processes that are forked; come: only these come."""
    port = free_port()
    prepare = {rank: functools.partial(as_rank, rank, port, come_s) for rank in come}
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(forked.started([*forked.words(folder), *more], prepare=prepare[rank])) for rank in come]
        for process in running:
            process.join(40)
        return [(process.exitcode, process.printed.read_text()) for process in running]


def test_a_rank_that_raises_or_does_not_come_ends_the_program_as_designed_and_the_next_call_goes_on(tmp_path):
    undisturbed = tmp_path / "undisturbed"
    assert [code for code, _ in ends_of(undisturbed)] == [0, 0]
    here = tmp_path / "here"
    faults = "--inject=raise@5,oom@10,bad_image@200"  # the image is in step 13, in a micro-batch of rank 1

    (code, others), (own, text) = ends_of(here, faults)
    assert (code, own) == (1, 1) and "injected: raise@5" in others and "Traceback" not in others
    assert f"error: rank 1 of 2 on {os.uname().nodename} failed; the others end with it" in text and "as inject= has it" in text

    (code, others), (own, text) = ends_of(here, faults)  # all of them: they agree on it
    assert (code, own) == (2, 2) and "going on after step 4" in others and (others + text).count("error: ") == 1, (others, text)

    for come, named in (((0,), "error: rank 1 of 2 did not come within 2 s"), ((1,), "after 2 s")):
        ((code, text),) = ends_of(here, faults, come=come, come_s=2)
        assert code == 1 and named in text and "Traceback" not in text

    (code, others), (own, text) = ends_of(here, faults)
    assert (code, own) == (2, 2) and "going on after step 9" in others and "error: " not in others
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "damaged, as inject=bad_image@200 has it" in line

    ended = ends_of(here, faults)
    assert [code for code, _ in ended] == [0, 0] and "going on after step" in ended[0][1], ended
    assert ending(here) == ending(undisturbed)


def test_whatever_is_lost_the_end_is_clear_and_in_time_and_the_next_call_goes_on(undisturbed, tmp_path, monkeypatch):
    """A rank is killed, one does not come, the launcher is killed, all in one run folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a launcher that is killed leaves its folder
    two = words(tmp_path, "--procs", "2")
    with started(*two) as process:
        rank = rank_of(process, 1)
        said = until(process, "epoch    1  val top-1")  # half of the run is done
        os.kill(rank, signal.SIGKILL)
        _, error = process.communicate(timeout=40)
    assert process.returncode == 1
    assert f"rank 1 (process {rank}) was ended by SIGKILL" in error and "the same command goes on" in error and "Traceback" not in error
    assert f"rank   1  {os.uname().nodename}  process {rank:>7}  cpu" in map(str.rstrip, said)

    with started(*two) as process:
        os.kill(rank_of(process, 1), signal.SIGSTOP)
        line = process.stderr.readline()
        assert line.startswith("error: rank 1 of 2 did not come within 20 s to localhost:")
        _, error = process.communicate(timeout=20)  # which is 40 in all
    assert process.returncode == 1 and error == ""

    with started(*two, "--inject", "slow@20:40s") as process:
        until(process, "going on after step 1")
        process.kill()
        _, error = process.communicate(timeout=40)  # the ranks hold its ends of the pipes as long as they live
    assert "error: rank 0: the launcher, which keeps localhost:" in error and "the same command goes on" in error and "Traceback" not in error

    with started(*two) as process:
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on after step" in said, (said, error)
    assert left_by(tmp_path) == undisturbed
