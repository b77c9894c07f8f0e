"""Claims: never two in one folder, none left by what was killed, none stolen from the living."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.runs import lock as claims
from trainer.runs.lock import ClaimedError, beat, claim, claimed, make_folder, owner_of

HOLD = """
import sys, time
from trainer.runs.lock import claim
own = claim(sys.argv[1])
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
from trainer.runs.lock import claim
folder, number = Path(sys.argv[1]), Path(sys.argv[1]) / "number"
for _ in range(40):
    while (own := claim(folder)) is None:
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
    assert claim(tmp_path) is None
    assert owner_of(tmp_path).pid == holder.pid
    with pytest.raises(ClaimedError, match=rf"process {holder.pid} on .* wait for its end"):
        claimed(tmp_path)
    print(file=holder.stdin, flush=True)
    assert holder.stdout.readline() == "released\n"
    assert owner_of(tmp_path) is None
    with claimed(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner_of(tmp_path) is None
    with claim(tmp_path) as own:
        assert [path.name for path in tmp_path.iterdir()] == [
            own.path.name
        ]  # the dead one's file is gone


def test_a_stopped_process_keeps_its_claim_however_old(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    (file,) = tmp_path.iterdir()
    os.utime(file, (0, 0))
    assert claim(tmp_path) is None and owner_of(tmp_path) is not None


def test_the_same_process_is_refused_too(tmp_path):
    with claim(tmp_path) as own:
        assert claim(tmp_path) is None
        assert owner_of(tmp_path).pid == os.getpid()
        assert own.path.exists()
        # to look around must not drop the lock: another process still sees it
        with other(
            "import sys; from trainer.runs.lock import claim; print(claim(sys.argv[1]))", tmp_path
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
        elsewhere = claim(tmp_path)
    claims._held.clear()
    then_s = time.time() - age_s
    os.utime(elsewhere.path, (then_s, then_s))
    assert (owner_of(tmp_path) is not None) == is_live
    own = claim(tmp_path)
    assert (own is None) == is_live
    assert elsewhere.path.exists() == is_live
    if own:
        own.release()
    os.close(elsewhere._descriptor)


@pytest.mark.parametrize("is_touched", [False, True])
def test_what_another_machine_held_is_had_once_it_shows_no_life(
    tmp_path, monkeypatch, capsys, is_touched
):
    """A machine that is gone leaves a claim that is fresh for a minute: the same command elsewhere waits for it."""
    with monkeypatch.context() as patched:
        patched.setattr(claims, "machine_id", lambda: "000000000000")
        elsewhere = claim(tmp_path)
    claims._held.clear()
    if is_touched:
        monkeypatch.setattr(
            time,
            "sleep",
            lambda seconds: os.utime(elsewhere.path, (time.time() + 1, time.time() + 1)),
        )
        with pytest.raises(ClaimedError, match="works here"):
            claimed(tmp_path)
        assert elsewhere.path.exists()
    else:
        with claimed(tmp_path, stale_s=0.3, look_s=0.02):
            assert not elsewhere.path.exists()
    assert "worked here; waiting up to" in capsys.readouterr().err
    os.close(elsewhere._descriptor)


def test_where_files_cannot_be_locked_the_heartbeat_tells(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(37, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    own = claim(tmp_path)
    claims._held.clear()  # as another process of this machine sees it
    assert claim(tmp_path) is None and own.path.exists()
    os.utime(own.path, (0, 0))
    with claim(tmp_path):
        assert not own.path.exists()
    os.close(own._descriptor)


def test_the_heart_touches_what_is_held(tmp_path):
    with claim(tmp_path) as own:
        os.utime(own.path, (0, 0))
        beat()
        assert time.time() - own.path.stat().st_mtime < 60


def test_a_claim_is_raised_again_where_its_folder_was_removed(tmp_path):
    folder = tmp_path / "run"
    with claim(folder):
        shutil.rmtree(folder)
        beat()  # there is nothing to raise it in
        make_folder(folder)
        assert owner_of(folder).pid == os.getpid()
        with other(
            "import sys; from trainer.runs.lock import claim; print(claim(sys.argv[1]))", folder
        ) as process:
            assert process.stdout.read() == "None\n"
        os.rename(folder, tmp_path / "away")
        folder.mkdir()
        beat()  # by the heart, before anything is written
        assert owner_of(folder).pid == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_process_whose_removed_folder_is_anothers_by_now_ends_at_once(tmp_path):
    script = "import shutil, sys; from trainer.runs.lock import beat, claim; claim(sys.argv[1]); shutil.rmtree(sys.argv[1]); print('removed', flush=True); sys.stdin.readline(); beat(); print('went on')"
    folder = tmp_path / "run"
    with other(script, folder) as process:
        assert process.stdout.readline() == "removed\n"
        with claim(folder):
            process.stdin.write("\n")
            process.stdin.close()
            assert process.wait(20) == 1 and process.stdout.read() == ""


def test_a_claim_ends_on_a_disk_that_takes_nothing_any_more(tmp_path, monkeypatch):
    own = claim(tmp_path)
    with monkeypatch.context() as patch:

        def refused(*_, **__):
            raise OSError(30, "Read-only file system")

        patch.setattr(Path, "unlink", refused)
        own.release()
    assert own.path.exists() and owner_of(tmp_path) is None  # without the lock its file is no claim


def test_a_process_whose_claim_was_taken_over_ends_at_once(tmp_path):
    script = "import sys; from trainer.runs.lock import beat, claim; claim(sys.argv[1]).path.unlink(); beat(); print('went on')"
    with other(script, tmp_path) as process:
        assert process.stdout.read() == ""
        assert process.wait() == 1


def test_a_fork_has_none_of_its_parents_claims(tmp_path):
    with claim(tmp_path):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if claim(tmp_path) is None and not claims._held else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert owner_of(tmp_path).pid == os.getpid()
