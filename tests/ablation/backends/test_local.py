"""Forks: each with its GPU and its exit code, none left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.sweeps import wait_until
from trainer.ablation.backends.local import LocalCells, streamed
from trainer.ablation.threads import choose_threads


def all_ended(cells: LocalCells) -> dict:
    found = {}
    while cells.num_running:
        found |= dict(cells.ended(10))
    return found


def ending(what) -> int:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return what


def test_what_ended_comes_with_its_exit_code():
    cells = LocalCells(ending, num_slots=3)
    for what in (0, 75, "kill"):
        cells.start(what)
    assert cells.num_running == 3
    assert all_ended(cells) == {0: 0, 75: 75, "kill": -signal.SIGKILL}
    assert cells.ended(0) == []


def test_each_slot_has_its_gpu_in_turn(tmp_path):
    def note(what) -> int:
        (tmp_path / what).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return 0

    cells = LocalCells(note, num_slots=3, gpus=("4", "GPU-7"))
    for what in "abc":
        cells.start(what)
    all_ended(cells)
    cells.start("d")  # the first slot is free again
    all_ended(cells)
    assert [(tmp_path / what).read_text() for what in "abcd"] == ["4", "GPU-7", "4", "4"]


def test_stop_reaches_every_process_whatever_this_one_does_with_the_signal(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cells = LocalCells(lambda _: time.sleep(60) or 0, num_slots=2)
        cells.start("a"), cells.start("b")
        ended = {}
        while cells.num_running:
            cells.stop()
            ended |= dict(cells.ended(0.1))
        assert set(ended.values()) == {-signal.SIGTERM}
    finally:
        signal.signal(signal.SIGTERM, before)


def test_close_leaves_no_process_behind():
    cells = LocalCells(lambda _: time.sleep(60) or 0, num_slots=1)
    cells.start("a")
    ((_, process),) = cells._running.values()
    cells.close()
    assert process.exitcode == -signal.SIGTERM


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from trainer.ablation.backends.local import LocalCells

def work(path):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    Path(path).write_text(str(os.getpid()))
    while not stopped:
        time.sleep(0.01)
    Path(path + ".saved").touch()
    return 75

cells = LocalCells(work, 1)
cells.start(sys.argv[1])
cells.ended(60)
"""


def test_a_process_whose_parent_was_killed_saves_and_ends(tmp_path):
    path = tmp_path / "child"
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(path)], cwd=Path(__file__).parents[3]
    )
    wait_until(lambda: path.exists() and path.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: Path(f"{path}.saved").exists())


def test_results_come_one_by_one_and_stop_where_the_process_dies():
    def numbers(last):
        yield from range(last)
        os.kill(os.getpid(), signal.SIGKILL)

    assert list(streamed(numbers, 3)) == [0, 1, 2]
    first = streamed(lambda: iter(range(10**9)))
    assert next(first) == 0
    first.close()  # ends the process, and does not wait for all of it


@pytest.mark.parametrize(("jobs", "num_threads"), [(1, 8), (3, 2), (16, 1)])
def test_the_first_call_chooses_the_threads_for_all_later_ones(tmp_path, jobs, num_threads):
    assert choose_threads(tmp_path, "ablations/losses.yaml", jobs, num_cores=8) == num_threads
    assert choose_threads(tmp_path, "losses", 2, num_cores=8) == num_threads
    assert choose_threads(tmp_path, "norms", 2, num_cores=8) == 4
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [
        "losses.json",
        "norms.json",
    ]
