"""Several processes that the command, or torchrun, really starts: what they make together, and what
becomes of it where one is lost.
"""

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

from support import forked
from support.endings import ending, is_stopped
from support.plans import small_set
from trainer.distributed import rendezvous
from trainer.runs.lock import owner_of

pytestmark = pytest.mark.drill  # each start of the program takes seconds: `make drill`
ROOT = Path(__file__).parents[2]
FLAGS = [
    "--recipe",
    "A1",
    "--model",
    "test_resnet",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--checkpoint-s",
    "0",
]
SET = small_set("batch.images=128 batch.norm_images=32")  # 2 epochs of 11 steps


def words(folder: Path, *more: str) -> list[str]:
    """Those of a training command in a folder, after `python`."""
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return ["-m", "trainer", "train", *FLAGS, "--set", SET, *places, *more]


@contextlib.contextmanager
def started(*command: str, **environment: str):
    """Python at work with these words; killed where it still runs at the end of the block."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, **pipes
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def left_by(folder: Path) -> dict:
    """The one row of a folder without its times, and the curves."""
    (path,) = (folder / "results" / "rows").glob("*.json")
    (metrics,) = (folder / "runs").glob("*/metrics.jsonl")
    row = json.loads(path.read_text())
    kept = (
        "run",
        "status",
        "steps",
        "world_size",
        "weights_sha256",
        "top1_pct",
        "loss_nats",
        "changes",
    )
    return {name: row[name] for name in kept} | {"metrics": metrics.read_bytes()}


def free_port() -> int:
    """For a moment."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def as_rank(rank: int, port: int, come_s: float) -> None:
    """This process is one of two, started without a launcher: rank 0 keeps the rendezvous."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rendezvous.COME_S = come_s


def ends_of(
    words: list[str], come=(0, 1), come_s: float = 20, timeout_s: float = 40
) -> list[tuple[int, str]]:
    """(exit code, all that was printed) of the program on two ranks, in processes that are forked;
    come: only these come.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        prepare = [functools.partial(as_rank, rank, port, come_s) for rank in come]
        running = [stack.enter_context(forked.started(words, prepare=one)) for one in prepare]
        for process in running:
            process.join(timeout_s)
        return [(process.exitcode, process.printed.read_text()) for process in running]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = ends_of(words(folder)[2:], timeout_s=300)
    assert [code for code, _ in ended] == [0, 0], ended
    return left_by(folder)


def test_two_agents_of_torchrun_make_the_run_of_two_processes(undisturbed, tmp_path):
    """As on two machines: each agent starts one rank, and they find each other at one address. The
    run of procs=2, bit for bit, as is the one that test_two_processes_stop_together makes.
    """
    address = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=one",
    ]
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


def pausing(folder: Path, rank: int) -> dict[str, str]:
    """The environment of a launcher whose rank stops (SIGSTOP) before it has imported anything."""
    text = (
        f"import os, signal\nif os.environ.get('RANK') == '{rank}':\n    os.kill(os.getpid(),"
        " signal.SIGSTOP)\n"
    )
    (folder / "sitecustomize.py").write_text(text)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    }


@contextlib.contextmanager
def paused(process: int):
    """A process that stops by itself; killed at the end of the block, where it is still there."""
    try:
        until_s = time.monotonic() + 100
        while not is_stopped(process) and time.monotonic() < until_s:
            time.sleep(0.02)
        assert is_stopped(process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process of a rank, once its launcher has started it."""
    until_s = time.monotonic() + 100
    while time.monotonic() < until_s:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (
                    f"\nPPid:\t{launcher.pid}\n" in (folder / "status").read_text()
                    and f"\0RANK={rank}\0" in (folder / "environ").read_text()
                ):
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
    assert any(
        "128 images per step = 2 ranks x 2 micro-batches x 32 images" in line for line in said
    )
    with started(*words(tmp_path, "--procs", "2")) as process:
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed after step" in said, (said, error)
    assert left_by(tmp_path) == undisturbed
    assert (
        undisturbed["world_size"] == 2
        and undisturbed["steps"] == 22
        and undisturbed["changes"] == []
    )
    scores = [line for line in said.splitlines() if "top-1" in line]
    assert (
        len(scores) == len(set(scores)) and sum(line.startswith("top-1") for line in scores) == 1
    )  # one rank speaks


def listens(process: int, is_so: str, number: int = signal.SIGTERM) -> bool:
    """Is a signal caught (SigCgt) by a process, or does it wait for it (ShdPnd)?"""
    mask = Path(f"/proc/{process}/status").read_text().partition(f"{is_so}:\t")[2].split()[0]
    return bool(int(mask, 16) >> number - 1 & 1)


def test_a_signal_that_a_rank_cannot_hear_yet_is_a_stop_all_the_same(tmp_path):
    """It ends that rank, and the other waits for one that never comes."""
    command = words(tmp_path, "--procs", "2")
    with started(*command, **pausing(tmp_path, 0)) as process, paused(rank_of(process, 0)) as deaf:
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
    assert not list(tmp_path.rglob("*.pt"))


def test_a_rank_that_raises_or_does_not_come_ends_the_program_as_designed_and_the_next_call_goes_on(
    tmp_path,
):
    undisturbed, here = tmp_path / "undisturbed", tmp_path / "here"
    assert [code for code, _ in ends_of(forked.words(undisturbed))] == [0, 0]
    faults = [
        *forked.words(here),
        "--inject=raise@5,oom@10,bad_image@200",
    ]  # the image is in step 13, on rank 1

    (code, others), (own, text) = ends_of(faults)
    assert (code, own) == (1, 1) and "injected: raise@5" in others and "Traceback" not in others
    assert (
        f"error: rank 1 of 2 on {os.uname().nodename} failed; the others end with it" in text
        and "as inject= has it" in text
    )

    (code, others), (own, text) = ends_of(faults)  # all of them: they agree on it
    assert (
        (code, own) == (2, 2)
        and "resumed after step 4" in others
        and (others + text).count("error: ") == 1
    ), (others, text)

    for come, named in (((0,), "error: rank 1 of 2 did not come within 2 s"), ((1,), "after 2 s")):
        ((code, text),) = ends_of(faults, come=come, come_s=2)
        assert code == 1 and named in text and "Traceback" not in text

    (code, others), (own, text) = ends_of(faults)
    assert (code, own) == (2, 2) and "resumed after step 9" in others and "error: " not in others
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "damaged, as inject=bad_image@200 has it" in line

    ended = ends_of(faults)
    assert [code for code, _ in ended] == [0, 0] and "resumed after step" in ended[0][1], ended
    assert ending(here) == ending(undisturbed)


def test_whatever_is_lost_the_end_is_clear_and_in_time_and_the_next_call_goes_on(
    undisturbed, tmp_path, monkeypatch
):
    """A rank is killed, one does not come, the launcher is killed, all in one run folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a launcher that is killed leaves its folder
    two = words(tmp_path, "--procs", "2")
    with started(*two) as process:
        rank = rank_of(process, 1)
        said = until(process, "epoch    1  val top-1")  # half of the run is done
        os.kill(rank, signal.SIGKILL)
        _, error = process.communicate(timeout=40)
    assert process.returncode == 1
    assert (
        f"rank 1 (process {rank}) was ended by SIGKILL" in error
        and "rerun the same command to resume" in error
        and "Traceback" not in error
    )
    told = f"rank   1  {os.uname().nodename}  process {rank:>7}  cpu"
    assert any(line.startswith(told) for line in said)

    with started(*two, **pausing(tmp_path, 1)) as process, paused(rank_of(process, 1)):
        line = process.stderr.readline()
        assert line.startswith("error: rank 1 of 2 did not come within 20 s to localhost:")
        _, error = process.communicate(timeout=20)  # which is 40 in all
    assert process.returncode == 1 and error == ""

    with started(*two, "--inject", "slow@20:40s") as process:
        until(process, "resumed after step 1")
        process.kill()
        _, error = process.communicate(
            timeout=40
        )  # the ranks hold its ends of the pipes as long as they live
    assert (
        "error: rank 0: the launcher, which keeps localhost:" in error
        and "rerun the same command to resume" in error
        and "Traceback" not in error
    )

    with started(*two) as process:
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed after step" in said, (said, error)
    assert left_by(tmp_path) == undisturbed


def test_ranks_whose_launcher_is_killed_save_and_let_go_of_the_run(tmp_path):
    with started(*words(tmp_path, "--procs", "2")) as process:
        until(process, "epoch    1  val top-1")
        process.kill()
        said, error = process.communicate(timeout=40)  # the ranks hold its ends of the pipes
    assert "stopped by SIGTERM" in said and "saved" in said and "Traceback" not in error
    (folder,) = (tmp_path / "runs").iterdir()
    assert owner_of(folder) is None and list(folder.glob("checkpoints/*.pt"))
