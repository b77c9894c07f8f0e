"""Images that are away for a moment, or for good: the run waits, then saves and ends to be resumed;
no other image takes their place.
"""

import functools
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from support import forked
from support.endings import ending
from trainer.data import workers


def words(images: Path, folder: Path, num_workers: int) -> list[str]:
    """Those of support.forked's run, over these images."""
    changed = {"--workers=0": f"--workers={num_workers}", f"--data={forked.images()}": None}
    kept = [changed.get(word, word) for word in forked.words(folder)]
    return [*(word or f"--data={images}" for word in kept), "--bad-images=skip"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "images"
    shutil.copytree(forked.images(), root)
    return root


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = forked.end_of(words(images, folder, 0))
    assert code == 0, printed
    return ending(folder)


def brief(seconds: float) -> None:
    workers.RETRY_FOR_S, workers._RETRY_S = seconds, 0.05
    multiprocessing.set_start_method("fork", force=True)  # as the program has it, not its server


def away(folder: Path) -> None:
    folder.rename(folder.with_suffix(".away"))


def back(folder: Path) -> None:
    folder.with_suffix(".away").rename(folder)


@pytest.mark.parametrize(
    ("num_workers", "moment", "step"), [(0, "step", 5), (2, "step", 5), (2, "evaluate", 10)]
)
def test_a_folder_that_is_gone_ends_the_run_saved(
    images, undisturbed, tmp_path, num_workers, moment, step
):
    given = words(images, tmp_path, num_workers)
    act = functools.partial(away, images)
    code, printed = forked.end_of(given, moment, step, act, functools.partial(brief, 0.2))
    back(images)
    last = printed.splitlines()[-1]
    assert code == 75 and "unreadable data" in last and "ENOENT" in last, printed
    assert str(images) in last and ": saved; rerun the same command to resume" in last
    code, printed = forked.end_of(given, prepare=functools.partial(brief, 60))
    assert (
        code == 0 and f"resumed after step {last.split('after step ')[1].split(':')[0]}" in printed
    )
    assert ending(tmp_path) == undisturbed
    assert ending(tmp_path)["row"]["num_replaced_images"] == 0


def gone_for_a_second(folder: Path) -> None:
    """Another process brings it back."""
    away(folder)
    if os.fork() == 0:
        time.sleep(1)
        back(folder)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_that_comes_back_is_waited_for(images, undisturbed, tmp_path, num_workers):
    given = words(images, tmp_path, num_workers)
    act = functools.partial(gone_for_a_second, images)
    code, printed = forked.end_of(given, "step", 5, act, functools.partial(brief, 60))
    assert code == 0 and printed.count("trying again") >= 1, printed
    assert ending(tmp_path) == undisturbed
