"""Claims: never two in one folder, none left by what was killed, none stolen from the living."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.base.signals import Stopped
from trainer.runs import lock as claims
from trainer.runs.lock import LockedError, LockLost, acquire, owner_of, try_acquire
from trainer.runs.run_folder import own_folder

HOLD = """
import sys, time
from trainer.runs.lock import try_acquire
own = try_acquire(sys.argv[1])
print(own is not None, flush=True)
sys.stdin.readline()
own.release()
print("released", flush=True)
sys.stdin.readline()
"""
# reads a number, adds one, writes it: increments are lost unless one at a time does it
COUNT = """
import sys, time
from pathlib import Path
from trainer.runs.lock import try_acquire
folder, number = Path(sys.argv[1]), Path(sys.argv[1]) / "number"
for _ in range(40):
    while (own := try_acquire(folder)) is None:
        time.sleep(0.0005)
    with own:
        value = int(number.read_text())
        time.sleep(0.0002)
        number.write_text(str(value + 1))
"""


def other(script: str, folder: Path) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=root, **pipes)


@pytest.fixture
def holder(tmp_path):
    with other(HOLD, tmp_path) as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_claim_is_one_processs_until_it_is_released(tmp_path, holder):
    assert try_acquire(tmp_path) is None
    assert owner_of(tmp_path).pid == holder.pid
    with pytest.raises(LockedError, match=rf"process {holder.pid} on .* wait for it to end"):
        acquire(tmp_path)
    print(file=holder.stdin, flush=True)
    assert holder.stdout.readline() == "released\n"
    assert owner_of(tmp_path) is None
    with acquire(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner_of(tmp_path) is None
    with try_acquire(tmp_path) as own:
        assert [path.name for path in tmp_path.iterdir()] == [
            own.path.name
        ]  # the dead one's file is gone


def test_a_stopped_process_keeps_its_claim_however_old(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    (file,) = tmp_path.iterdir()
    os.utime(file, (0, 0))
    assert try_acquire(tmp_path) is None and owner_of(tmp_path) is not None


def test_the_same_process_is_refused_too(tmp_path):
    with try_acquire(tmp_path) as own:
        assert try_acquire(tmp_path) is None
        assert owner_of(tmp_path).pid == os.getpid()
        assert own.path.exists()
        # to look around must not drop the lock: another process still sees it
        with other(
            "import sys; from trainer.runs.lock import try_acquire;"
            " print(try_acquire(sys.argv[1]))",
            tmp_path,
        ) as process:
            assert process.stdout.read() == "None\n"


def test_of_many_that_want_a_folder_one_at_a_time_has_it(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [other(COUNT, tmp_path) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert (tmp_path / "number").read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


@pytest.mark.parametrize(("age_s", "is_live"), [(5, True), (59, True), (61, False), (3600, False)])
def test_another_machines_claim_lives_by_its_heartbeat(tmp_path, monkeypatch, age_s, is_live):
    with monkeypatch.context() as patched:
        patched.setattr(claims, "machine_id", lambda: "000000000000")
        elsewhere = try_acquire(tmp_path)
    then_s = time.time() - age_s
    os.utime(elsewhere.path, (then_s, then_s))
    assert (owner_of(tmp_path) is not None) == is_live
    own = try_acquire(tmp_path)
    assert (own is None) == is_live
    assert elsewhere.path.exists() == is_live
    if own:
        own.release()
    elsewhere.release()


@pytest.mark.parametrize("is_touched", [False, True])
def test_what_another_machine_held_is_had_once_it_shows_no_life(
    tmp_path, monkeypatch, capsys, is_touched
):
    """A machine that is gone leaves a claim that is fresh for a minute: the same command elsewhere
    waits for it.
    """
    with monkeypatch.context() as patched:
        patched.setattr(claims, "machine_id", lambda: "000000000000")
        elsewhere = try_acquire(tmp_path)
    if is_touched:
        monkeypatch.setattr(
            time,
            "sleep",
            lambda seconds: os.utime(elsewhere.path, (time.time() + 1, time.time() + 1)),
        )
        with pytest.raises(LockedError, match="is running here"):
            acquire(tmp_path)
        assert elsewhere.path.exists()
    else:
        with acquire(tmp_path, stale_s=0.3, look_s=0.02):
            assert not elsewhere.path.exists()
    assert "worked here; waiting up to" in capsys.readouterr().err
    elsewhere.release()


@pytest.mark.parametrize("is_alive", [False, True])
def test_a_lock_dated_in_the_future_is_stale_a_minute_after_it_is_found(
    tmp_path, monkeypatch, is_alive
):
    """Its machine's clock was ahead: it lives by being touched, like any other."""
    with monkeypatch.context() as patched:
        patched.setattr(claims, "machine_id", lambda: "000000000000")
        elsewhere = try_acquire(tmp_path)
    future_s = time.time() + 7 * 24 * 3600
    os.utime(elsewhere.path, (future_s, future_s))
    assert try_acquire(tmp_path) is None and owner_of(tmp_path) is not None
    assert abs(elsewhere.path.stat().st_mtime - time.time()) < 30
    then_s = time.time() - 61
    os.utime(elsewhere.path, (then_s, then_s))  # as it is a minute later
    if is_alive:
        os.utime(elsewhere.path, (future_s, future_s))  # by the clock that is ahead
    assert (owner_of(tmp_path) is not None) == is_alive
    own = try_acquire(tmp_path)
    assert (own is None) == is_alive
    if own:
        own.release()
    elsewhere.release()


def test_what_a_lock_file_holds_cannot_write_to_the_terminal(tmp_path, monkeypatch, capsys):
    owner = {"host": "\x1b[2Jnode" + "x" * 2000, "machine": "0", "pid": 7, "started_utc": "\x07"}
    (tmp_path / "claim.x").write_text(json.dumps(owner))
    with acquire(tmp_path, stale_s=0.3, look_s=0.02):
        pass
    line = capsys.readouterr().err
    assert "node" in line and line.rstrip("\n").isprintable() and len(line) < 600


@pytest.mark.parametrize("owner", [{"host": 3}, {"pid": "7"}, {"has_lock": 1}, {"machine": None}])
def test_a_lock_file_of_other_types_is_an_unknown_machines(tmp_path, owner):
    whole = {"host": "node", "machine": claims.machine_id(), "pid": 7, "started_utc": "now"}
    (tmp_path / "claim.x").write_text(json.dumps(whole | owner))
    assert owner_of(tmp_path).pid == 0


def test_what_is_no_regular_file_is_no_lock(tmp_path):
    (tmp_path / "claim.folder").mkdir()
    os.mkfifo(tmp_path / "claim.pipe")
    assert owner_of(tmp_path) is None
    with acquire(tmp_path) as own:
        assert own.path.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"claim.folder", "claim.pipe"}


def test_the_wait_for_another_machines_lock_hears_a_stop_signal(tmp_path, monkeypatch):
    (tmp_path / "claim.x").write_text("{}")

    def stopped():
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        own_folder(tmp_path, stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.x"]


def test_where_files_cannot_be_locked_the_heartbeat_tells(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(37, "no locks available")

    for name in ("fcntl", "flock"):
        monkeypatch.setattr(fcntl, name, refused)
    own = try_acquire(tmp_path)
    assert try_acquire(tmp_path) is None and own.path.exists()
    os.utime(own.path, (0, 0))
    with try_acquire(tmp_path):
        assert not own.path.exists()
    own.release()


def test_the_heart_touches_what_is_held(tmp_path):
    with try_acquire(tmp_path) as own:
        os.utime(own.path, (0, 0))
        own.beat()
        assert time.time() - own.path.stat().st_mtime < 60


def test_a_lock_is_put_back_where_its_folder_was_removed(tmp_path):
    folder = tmp_path / "run"
    with try_acquire(folder) as own:
        shutil.rmtree(folder)
        own.beat()  # there is nothing to put it into
        folder.mkdir()
        own.check()  # before a step, or before anything is written
        assert owner_of(folder).pid == os.getpid()
        with other(
            "import sys; from trainer.runs.lock import try_acquire;"
            " print(try_acquire(sys.argv[1]))",
            folder,
        ) as process:
            assert process.stdout.read() == "None\n"
        os.rename(folder, tmp_path / "away")
        folder.mkdir()
        own.beat()  # by the heartbeat, before anything is written
        assert owner_of(folder).pid == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_removed_folder_that_is_anothers_by_now_is_lost(tmp_path):
    folder = tmp_path / "run"
    with try_acquire(folder) as own:
        own.check()
        shutil.rmtree(folder)
        with other(HOLD, folder) as process:
            assert process.stdout.readline() == "True\n"
            with pytest.raises(LockLost, match="taken over by another process"):
                own.check()
            process.kill()
        with pytest.raises(LockLost):  # for good
            own.check()


def test_a_lock_file_that_is_gone_alone_was_taken_over(tmp_path):
    with try_acquire(tmp_path) as own:
        own.path.unlink()
        own.beat()
        with pytest.raises(LockLost):
            own.check()


def test_a_lock_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    for _ in range(3):
        try_acquire(tmp_path).release()
    assert set(threading.enumerate()) == before


def test_a_claim_ends_on_a_disk_that_takes_nothing_any_more(tmp_path, monkeypatch):
    own = try_acquire(tmp_path)
    with monkeypatch.context() as patch:

        def refused(*_, **__):
            raise OSError(30, "Read-only file system")

        patch.setattr(Path, "unlink", refused)
        own.release()
    assert own.path.exists() and owner_of(tmp_path) is None  # without the lock its file is no claim


def test_a_fork_holds_none_of_its_parents_locks(tmp_path):
    """Nor may it keep one alive: the kernel's lock belongs to the open file, which a fork shares."""
    own = try_acquire(tmp_path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            own.release()  # of no effect here
            os.write(writer, b"1" if try_acquire(tmp_path) is None and own.path.exists() else b"0")
            signal.pause()  # until the parent has looked, and kills it
        finally:
            os._exit(0)
    try:
        os.close(writer)
        assert os.read(reader, 1) == b"1"
        assert owner_of(tmp_path).pid == os.getpid()
        own.release()
        with try_acquire(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
