"""Real disks that are full, read-only or gone: small file systems in memory where the machine lets
a test mount one.

Where it does not, the kernel's own limit on the length of files stands in: its errors are as real.
"""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support import unwritable
from support.unwritable import at_steps, go, left_by
from trainer.base.exits import EXIT_DONE, EXIT_UNWRITTEN
from trainer.runs.append_only_log import KeptFile
from trainer.runs.checkpoint import load_checkpoint

MIB = 2**20
NO_MOUNT = "mounting is not allowed here"
ROOT = Path(__file__).parents[2]


def mount(folder: Path, *words: str) -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    return subprocess.run(["mount", *words, str(folder)], capture_output=True).returncode == 0


class Tmpfs:
    """40 MiB in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        self.is_mounted = mount(folder, "-t", "tmpfs", "-o", "size=40m", "tmpfs")

    def fill(self, run=None) -> None:
        with open(self.filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MIB // 16))
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0")

    def empty(self, run=None) -> None:
        self.filler.unlink()

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


class ShortFiles:
    """No file of this process may grow beyond what it has now: the kernel refuses, as a full disk
    does.
    """

    is_mounted = False

    def fill(self, run=None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))

    def empty(self, run=None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    close = empty


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path):
    """A disk that can be filled: under tmp_path / "here"."""
    (tmp_path / "here").mkdir()
    made = Tmpfs(tmp_path / "here") if request.param == "tmpfs" else ShortFiles()
    if request.param == "tmpfs" and not made.is_mounted:
        pytest.skip(NO_MOUNT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert go(folder)[0] == EXIT_DONE
    return left_by(folder)


def test_a_file_on_a_disk_that_is_really_full_loses_no_line(tmp_path, disk):
    file = KeptFile(tmp_path / "here" / "metrics.jsonl", 0, is_safe=True)
    lines = [b"%05d " % number * 1000 + b"\n" for number in range(20)]
    for number, line in enumerate(lines):
        if number == 5:
            disk.fill()
        if number == 15:
            assert file.error.errno in (errno.ENOSPC, errno.EFBIG)
            disk.empty()
        file.write(line)
    file.sync()
    assert (tmp_path / "here" / "metrics.jsonl").read_bytes() == b"".join(lines)
    file.close()


@pytest.mark.drill
@pytest.mark.parametrize("checkpoint_s", [0, 0.01], ids=["waiting", "beside"])
def test_a_run_on_a_disk_that_is_full_for_a_while_ends_as_the_undisturbed_one(
    undisturbed, tmp_path, disk, monkeypatch, checkpoint_s
):
    last = []

    def look(run) -> None:
        last.append(load_checkpoint(run.folder / "checkpoints", pytest.fail)["progress"]["step"])
        disk.empty()

    at_steps(monkeypatch, {6: disk.fill, 12: look})
    code, _, printed = go(tmp_path / "here", checkpoint_s=checkpoint_s)
    assert code == EXIT_DONE, printed
    assert (
        last[0] <= 6
        and printed.count("cannot write") == 1
        and printed.count("all is written again") == 1
    )
    assert left_by(tmp_path / "here") == undisturbed


@pytest.mark.drill
def test_a_run_whose_disk_stays_full_leaves_its_end_in_another_place(
    undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    disk = Tmpfs(tmp_path / "here")
    if not disk.is_mounted:  # the limit on lengths would hold in the other place too
        return same_where_nothing_can_be_mounted(undisturbed, tmp_path, monkeypatch)
    try:
        for module in ("run", "ending"):
            monkeypatch.setattr(f"trainer.{module}.END_S", 0.0)
        (tmp_path / "other").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
        with monkeypatch.context() as patch:
            at_steps(patch, {6: disk.fill})
            code, row, printed = go(tmp_path / "here")
        assert (code, row) == (EXIT_UNWRITTEN, None), printed
        (place,) = (tmp_path / "other").iterdir()
        assert (
            str(place) in printed.splitlines()[-1]
            and "No space left on device" in printed.splitlines()[-1]
        )
        assert (place / "metrics.jsonl").read_bytes() == undisturbed["metrics"]
        disk.empty()
        code, _, printed = go(tmp_path / "here")
        assert (
            code == EXIT_DONE
            and "resumed after step 6" in printed
            and left_by(tmp_path / "here") == undisturbed
        )
    finally:
        disk.close()


def same_where_nothing_can_be_mounted(undisturbed, tmp_path, monkeypatch):
    for module in ("run", "ending"):
        monkeypatch.setattr(f"trainer.{module}.END_S", 0.0)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        full = unwritable.FullDisk(patch, tmp_path / "here")

        def fill(run) -> None:
            full.is_full = True

        at_steps(patch, {6: fill})
        code, row, printed = go(tmp_path / "here")
    assert (code, row) == (EXIT_UNWRITTEN, None)
    (place,) = (tmp_path / "other").iterdir()
    assert (
        str(place) in printed.splitlines()[-1]
        and (place / "metrics.jsonl").read_bytes() == undisturbed["metrics"]
    )


@pytest.mark.drill
def test_a_folder_in_which_nothing_can_be_made_is_tried_until_it_can(
    undisturbed, tmp_path, monkeypatch
):
    """chattr +i, which holds for root too; where the file system has none, the errors that it would
    give.
    """

    def changes(folder: Path, flag: str) -> bool:
        return (
            bool(shutil.which("chattr"))
            and subprocess.run(["chattr", flag, str(folder)], capture_output=True).returncode == 0
        )

    folders = []
    full = (
        None
        if changes(tmp_path, "-i") and os.geteuid() == 0
        else unwritable.FullDisk(monkeypatch, tmp_path, errno.EPERM)
    )

    def forbid(run) -> None:
        folders.append(run.folder / "checkpoints")
        if full is None:
            assert changes(folders[0], "+i")
        else:
            full.is_full = True

    def allow(run=None) -> None:
        if full is None:
            assert changes(folders[0], "-i")
        else:
            full.is_full = False

    at_steps(monkeypatch, {6: forbid, 12: allow})
    try:
        code, _, printed = go(tmp_path)
    finally:
        if folders and full is None:
            changes(folders[0], "-i")
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed
    (line,) = [line for line in printed.splitlines() if "cannot write" in line]
    assert "a checkpoint (" in line and "the last one there is that of step 6" in line


@pytest.mark.drill
def test_a_read_only_disk_is_refused_at_the_start_in_one_line(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    is_mounted = mount(folder, "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs")
    if not is_mounted:  # nobody writes there, root neither
        folder = Path("/proc/self/runs")
    try:
        words = [
            "train",
            "--recipe",
            "A2",
            "--model",
            "test_resnet",
            "--device",
            "cpu",
            "--runs",
            str(folder),
            "--results",
            str(tmp_path),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr


@pytest.mark.drill
def test_a_disk_that_is_too_small_is_refused_at_the_start_in_one_line(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    size = ["-t", "tmpfs", "-o", "size=40m", "tmpfs"]
    if not mount(folder, *size):
        pytest.skip(NO_MOUNT)
    try:
        words = [
            "train",
            "--recipe",
            "A2",
            "--model",
            "resnet18",
            "--device",
            "cpu",
            "--runs",
            str(folder),
            "--results",
            str(tmp_path),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert "MiB are free" in done.stderr and "runs=" in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))
