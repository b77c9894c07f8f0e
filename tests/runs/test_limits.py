"""The main job where a container gives it little, and where what it waits for never comes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.forked import images, words

ROOT = Path(__file__).parents[2]
# 90 images of 224 px are 13 MB: four processes have 100 MB under way
LARGE = (
    "epochs=4 batch.images=90 batch.norm_images=90 lr.warmup_epochs=null lr.warmup_from=null"
    " image.train_px=224"
)
CAN_MOUNT = (
    os.geteuid() == 0
    and all(map(shutil.which, ("unshare", "setpriv")))
    and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
)
READ = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
LIMITS = {
    "shm": 'mount -t tmpfs -o size=64m tmpfs /dev/shm; exec "$@"',
    "files": 'ulimit -n 64; exec "$@"',
    "read-only": f'mount --bind {ROOT} {ROOT}; mount -o remount,bind,ro {ROOT}; exec "$@"',
    "output": 'exec "$@" >/dev/full',
    # last: nothing can be mounted after it
    "nobody": f'exec env -u HOME setpriv --reuid 12345 --clear-groups {" ".join(READ)} -- "$@"',
}


def program(folder: Path, *more: str, limits: tuple[str, ...] = (), workers: int = 4):
    """The program under limits, one inside the other: its end."""
    given = [word for word in words(folder) if not word.startswith(("--workers", "--set"))]
    command = [sys.executable, "-m", "trainer", *given, f"--workers={workers}", *more]
    for name in reversed(limits):
        command = ["sh", "-c", LIMITS[name], "sh", *command]
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return subprocess.run(
        ["unshare", "-m", *command] if limits else command,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.drill
@pytest.mark.skipif(not CAN_MOUNT, reason="mounting is not allowed here")
@pytest.mark.parametrize(
    "limits", [(), *((name,) for name in LIMITS), tuple(LIMITS)], ids=lambda names: "+".join(names)
)
def test_the_job_trains_under_a_containers_limits(limits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o777)
    images().chmod(0o755)
    done = program(folder, f"--set={LARGE}", limits=limits)
    assert done.returncode == 0 and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    assert len(list((folder / "results" / "rows").iterdir())) == 1


# A loader process that asks for the end of the run and then stands still: a plugin, so that every
# rank has it.
FREEZING = """
import os, signal, time
from pathlib import Path
from trainer.data.evaluation import EvaluationStream
from trainer.data.loader import TrainStream

def freezing(made, is_frozen):
    def making(stream, *given):
        if is_frozen(*given):
            Path({marker!r}).touch()
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1000)
        return made(stream, *given)
    return making

{patch}
"""
TRAIN = "TrainStream.made = freezing(TrainStream.made, lambda step, number, ids: {})"
EVALUATION = (
    "EvaluationStream.__getitem__ = freezing(EvaluationStream.__getitem__, lambda number: True)"
)
SMALL = (
    "epochs=1 batch.images=16 batch.norm_images=4 lr.warmup_epochs=null lr.warmup_from=null"
    " image.train_px=32 image.test_px=32"
)
WAITS = {
    "the first micro-batch": (TRAIN.format("True"), SMALL, ()),
    "between two micro-batches": (TRAIN.format("(step, number) == (5, 2)"), SMALL, ()),
    "parts of a step": (TRAIN.format("step == 5"), SMALL + " repeats=3", ()),
    "evaluation": (EVALUATION, SMALL, ()),
    "one rank of two": (TRAIN.format("(step, number) == (5, 1)"), SMALL, ("--procs=2",)),
    "evaluation on one rank of two": (EVALUATION, SMALL, ("--procs=2",)),
}


@pytest.mark.drill
@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_for_data_hears_a_signal(tmp_path, wait):
    patch, overrides, more = WAITS[wait]
    marker, plugin = tmp_path / "frozen", tmp_path / "freezing.py"
    plugin.write_text(FREEZING.format(marker=str(marker), patch=patch))
    done = program(tmp_path, f"--set={overrides}", f"--plugins={plugin}", *more, workers=2)
    ended_s = time.time()
    assert done.returncode == 75 and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    assert done.stdout.splitlines()[-1].count("stopped by SIGTERM") == 1, done.stdout
    if wait not in ("one rank of two",):  # that one says so on the terminal alone
        (log,) = (tmp_path / "runs").glob("*/log.txt")
        assert "stopped by SIGTERM" in log.read_text()
        ended_s = log.stat().st_mtime  # Python's own end comes on top
    assert ended_s - marker.stat().st_mtime < (5 if not more else 10)
