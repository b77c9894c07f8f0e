"""Processes that make items: none outlives the one that asked for them, whatever ends it; what one
does not deliver, another does, or a line says why not.
"""

import contextlib
import errno
import functools
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.forked import left_in_session
from trainer.base.signals import Stopped, StopRequest
from trainer.data import messages, workers
from trainer.data.decode import DataTrouble
from trainer.data.workers import Pool, Started, Watch, items_of

ENDING = """
import sys, torch
from trainer.data.workers import items_of, whole

class Numbers:
    def __getitem__(self, key):
        return torch.tensor(key)

items = whole(items_of(Numbers(), range(10**9), 3, "cpu"))
kept = [next(items) for _ in range(3)]
{}
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("raise ZeroDivisionError('of its own')", 1), ("sys.exit(7)", 7), ("pass", 0)],
)
def test_a_process_ends_at_once_with_its_loaders_processes(last, code):
    """They ignore what multiprocessing asks them to end with, and an error's traceback holds the
    loader.
    """
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(last)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code and done.stderr.count("ZeroDivisionError") == (code == 1)


FINISHED = """
import torch
from trainer.data.workers import items_of, whole

class Numbers:
    def __getitem__(self, key):
        return torch.tensor(key)

for epoch in range(20):  # a loader of its own for training, another for each evaluation
    training = whole(items_of(Numbers(), range(40), 1, "cpu"))
    assert [int(next(training)) for _ in range(20)] == list(range(20))
    assert [int(item) for item in whole(items_of(Numbers(), range(9), 1, "cpu"))] == list(range(9))
    assert [int(item) for item in training] == list(range(20, 40))
print("done")
"""


@pytest.mark.parametrize("number", range(3))
def test_a_finished_run_says_nothing_of_its_loaders_processes(number):
    """No "DataLoader worker is killed by signal" after the last line."""
    done = subprocess.run(
        [sys.executable, "-c", FINISHED], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


class Squares:
    """Item n: n and a [300, 100] uint8 tensor of n % 256, and what an item of each kind of message
    needs: small and large, in a tuple.
    """

    def __getitem__(self, key):
        return key, torch.full((300, 300), key % 256, dtype=torch.uint8), torch.tensor([key])


class Killing(Squares):
    """Processes that make item 5 are killed: `times` of them. folder: counts them."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def __getitem__(self, key):
        if key == 5 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


class Unreadable(Squares):
    """Item 5 cannot be read as long as a file is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, key):
        if key == 5 and self.path.exists():
            raise DataTrouble(f"unreadable data ({self.path}: ESTALE)")
        return super().__getitem__(key)


def by_itself(script: str, *before: str) -> subprocess.CompletedProcess:
    """A program of its own. before: words of the command that starts it."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [here, *here.parents[:2]]))
    return subprocess.run(
        [*before, sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )


def are_squares(items, number: int = 20) -> bool:
    found = list(items)
    return [key for key, _, _ in found] == list(range(number)) and all(
        large.shape == (300, 300) and bool((large == key % 256).all()) and small.tolist() == [key]
        for key, large, small in found
    )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_items_come_whole_and_in_order(num_workers):
    assert are_squares(items_of(Squares(), range(20), num_workers, "cpu"))


def test_a_child_process_ends_at_once_with_its_loaders_processes():
    """An ablation's cell is one; an error's traceback may hold the loader in it too."""
    script = """
import multiprocessing, sys
import test_workers
kept = []
def work():
    kept.append(test_workers.items_of(test_workers.Squares(), range(10**6), 2, "cpu"))
    next(kept[0])
    kept.append(kept)
    sys.exit(7)
cell = multiprocessing.get_context("fork").Process(target=work)
cell.start()
cell.join(30)
print(cell.exitcode)
cell.kill()
"""
    assert by_itself(script).stdout == "7\n"


class Killer(Squares):
    """Items of 4 MB, more than a socket holds; a process that makes item 5 kills the one that asked
    for it, and item 9 takes for ever.
    """

    def __getitem__(self, key):
        if key == 5:
            os.kill(os.getppid(), signal.SIGKILL)
        while key == 9:
            pass
        return key, torch.zeros(2**20)


def killed(*anything, **named):
    os.kill(os.getpid(), signal.SIGKILL)


def _is_asked(keys=range(10**6), stream=None):
    items = items_of(stream or Squares(), keys, 3, "cpu")
    return items, next(items)


def _killed_with(owner, name, count=1):
    """Killed as a function is called for the count-th time, before it does anything."""
    made, calls = getattr(owner, name), iter(range(1, 100))
    setattr(owner, name, lambda *given: killed() if next(calls) == count else made(*given))


def _second_starts():
    _killed_with(workers.Pool, "_started", 2)
    _is_asked()


def _first_asked():
    _killed_with(workers, "send")
    _is_asked()


def _all_wait_to_send():
    kept = _is_asked(range(10, 10**6), Killer())
    wait_for = [worker.socket for worker in kept[0].gi_frame.f_locals["workers"].pool.workers]
    while len(multiprocessing.connection.wait(wait_for)) < 3:
        pass
    killed()


def _two_streams():
    kept = _is_asked(), _is_asked()
    killed(kept)


def _at_work_for_ever():
    kept = _is_asked([0, 1, 2, 9, 9, 9], Killer())
    killed(kept)


def _replaced(folder):
    _killed_with(workers.Pool, "_started", 4)
    list(items_of(Killing(folder, 1), range(10), 3, "cpu"))


def _ends():
    _killed_with(workers.Pool, "_end")
    _is_asked()[0].close()


def _in_a_starting_process():
    """The parent is gone before a process has set up anything."""
    made = workers._start_worker
    workers._start_worker = lambda: (os.kill(os.getppid(), signal.SIGKILL), made())
    _is_asked()


KILLS = {
    "its second process starts": _second_starts,
    "a process is starting": _in_a_starting_process,
    "the first item is asked for": _first_asked,
    "items come": lambda: killed(_is_asked()),
    "all processes wait to send": _all_wait_to_send,
    "one makes an item": lambda: list(items_of(Killer(), range(10), 3, "cpu")),
    "all are at work for ever": _at_work_for_ever,
    "two streams are open": _two_streams,
    "a dead one is replaced": None,
    "the stream ends": _ends,
}


def left_of(moment) -> int:
    """How many processes are left, 5 s after one was killed with its own ones at a moment."""
    pid = os.fork()
    if not pid:
        os.setsid()
        with contextlib.suppress(BaseException):
            moment()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "not killed"
    return left_in_session(pid)


@pytest.mark.parametrize("moment", KILLS)
def test_no_process_outlives_the_one_that_is_killed_as(moment, tmp_path):
    act = KILLS[moment] or functools.partial(_replaced, tmp_path)
    assert left_of(act) == 0


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_may_be_started_in_any_way(method):
    script = f"""
import multiprocessing
import test_workers
if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    items = test_workers.items_of(test_workers.Squares(), range(20), 2, "cpu")
    assert test_workers.are_squares(items)
"""
    done = by_itself(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_items_come_without_shared_memory_too(monkeypatch):
    def refused(name):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refused)
    assert are_squares(items_of(Squares(), range(20), 2, "cpu"))


def test_an_item_whose_memory_was_lost_is_made_here(monkeypatch):
    def lost(*given):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(messages, "_mapped", lost)
    assert are_squares(items_of(Squares(), range(20), 2, "cpu"))


def test_a_process_that_is_killed_is_replaced_and_named(tmp_path):
    said = []
    watch = Watch(say=said.append)
    assert are_squares(items_of(Killing(tmp_path, 1), range(20), 2, "cpu", watch))
    (line,) = said
    (killed,) = tmp_path.iterdir()
    assert "loader process 2 of 2" in line and killed.name in line and "SIGKILL" in line


def test_one_that_is_killed_again_over_the_same_item_ends_the_wait(tmp_path):
    with pytest.raises(DataTrouble, match="loader process 2 of 2 .* SIGKILL"):
        list(items_of(Killing(tmp_path, 2), range(20), 2, "cpu", Watch(say=lambda line: None)))
    assert len(list(tmp_path.iterdir())) == 2 and not multiprocessing.active_children()


@contextlib.contextmanager
def two_streams(said):
    """Two streams of one pool of two processes, and calls that open a pass of each."""
    with Pool([Squares(), Squares()], 2, said.append) as pool:
        yield (
            pool,
            [
                functools.partial(
                    items_of, workers=Started(pool, i), device="cpu", watch=Watch(say=said.append)
                )
                for i in range(2)
            ],
        )


def test_one_pool_serves_passes_beside_each_other():
    """As a run's evaluations, in the middle of its training."""
    said = []
    with two_streams(said) as (pool, (train, val)):
        pids = [worker.process.pid for worker in pool.workers]
        training = train(Squares(), range(20))
        seen = [next(training)]
        for _ in range(2):
            assert are_squares(val(Squares(), range(7)), 7)
            seen.append(next(training))
        left = val(Squares(), range(20))
        next(left)
        left.close()  # what still comes of it is dropped
        assert are_squares([*seen, *training])
        assert not any(worker.due or worker.arrived for worker in pool.workers)
        assert [worker.process.pid for worker in pool.workers] == pids and not said
    assert not multiprocessing.active_children()


def test_a_process_that_dies_asleep_is_replaced_each_time():
    said = []
    with two_streams(said) as (pool, (_, val)):
        for number in range(3):
            assert are_squares(val(Squares(), range(5)), 5)
            os.kill(pool.workers[0].process.pid, signal.SIGKILL)
            assert len(said) == number
        assert are_squares(val(Squares(), range(5)), 5)
    assert len(said) == 3 and all("process 1 of 2" in line and "SIGKILL" in line for line in said)


@pytest.mark.parametrize("num_started", [0, 1])
def test_processes_that_cannot_be_started_are_done_without(monkeypatch, num_started):
    begun, said = [], []
    start = multiprocessing.context.ForkProcess.start

    def starting(process):
        if len(begun) == num_started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", starting)
    assert are_squares(items_of(Squares(), range(20), 3, "cpu", Watch(say=said.append)))
    (line,) = said
    assert f"process {num_started + 1} of 3" in line and os.strerror(errno.EAGAIN) in line


@pytest.mark.parametrize("most", [32, 48, 64])
def test_few_open_files_are_enough(most):
    script = f"""
import resource
import test_workers
resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))
kept = [open("/dev/null") for _ in range(3)]
assert test_workers.are_squares(test_workers.items_of(test_workers.Squares(), range(20), 16, "cpu"))
open("/dev/null")
"""
    done = by_itself(script)
    assert done.returncode == 0, done.stderr
    assert f"ulimit -n {most} leaves room for" in done.stderr and done.stderr.count("\n") == 1


def test_the_number_of_open_files_of_this_process_stays(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    assert are_squares(items_of(Squares(), range(20), 2, "cpu"))
    assert before == (resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd")))


def test_a_wait_for_a_process_that_stands_still_hears_a_signal():
    with StopRequest() as stop:
        items = items_of(Squares(), range(10**6), 2, "cpu", Watch(check=stop.check))
        next(items)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
        before_s = time.monotonic()
        with pytest.raises(Stopped, match="SIGTERM"):
            list(items)
    assert time.monotonic() - before_s < 3 and not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch, num_workers):
    path, said = tmp_path / "away", []
    path.touch()
    monkeypatch.setattr(workers, "_RETRY_S", 0.0)
    watch = Watch(check=lambda: path.unlink(), say=said.append)
    assert are_squares(items_of(Unreadable(path), range(20), num_workers, "cpu", watch))
    assert len(said) == 1 and "ESTALE" in said[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_stays_unreadable_ends_the_wait_by_name(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "RETRY_FOR_S", 0.0)
    with pytest.raises(DataTrouble, match=f"{tmp_path}: ESTALE"):
        list(
            items_of(
                Unreadable(tmp_path), range(20), num_workers, "cpu", Watch(say=lambda line: None)
            )
        )


@pytest.mark.skipif(
    os.geteuid() != 0
    or not shutil.which("unshare")
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="mounting is not allowed here",
)
@pytest.mark.parametrize("options", ["size=64k", "size=64k,ro"])
def test_a_small_or_read_only_dev_shm_is_not_needed(options):
    script = """
import test_workers
assert test_workers.are_squares(test_workers.items_of(test_workers.Squares(), range(20), 4, "cpu"))
"""
    mounted = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$0" "$@"'
    done = by_itself(script, "unshare", "-m", "sh", "-c", mounted)
    assert (done.returncode, done.stderr) == (0, "")
