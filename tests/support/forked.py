"""The program in processes forked from one that has imported all of it: a run starts in no time,
and can be killed.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.killed import strike_at
from trainer.__main__ import main
from trainer.runs import run

HERE = Path(__file__).parents[1]
NUM_STEPS = 22  # 2 epochs of 180 // 16
# mixing, accumulation (4 micro-batches), repeats, an average and stochastic depth, all at once, on
# few and small images
SET = (
    "epochs=2 batch.images=16 batch.norm_images=4 lr.warmup_epochs=1 image.train_px=32"
    " image.test_px=32 average='{name: ema, decay: 0.9, every_steps: 2}'"
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.forked"])


@functools.cache
def images() -> Path:
    """A folder of 180 and 24 images of 4 classes, gone with this process."""
    root = Path(tempfile.mkdtemp(prefix="rsb-images-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    draw = np.random.default_rng(0)
    for split, number in (("train", 180), ("val", 24)):
        for place in range(number):
            path = root / split / f"class{place % 4}" / f"{place:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return root


def words(folder: Path, checkpoint_s: float = 0, workers: int = 0) -> list[str]:
    """Those of a run of NUM_STEPS steps in a folder."""
    named = {
        "recipe": "A1", "model": "test_resnet", "data": images(), "device": "cpu", "workers": workers,
        "set": SET, "checkpoint-s": checkpoint_s, "runs": folder / "runs",
        "results": folder / "results",
    }  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in named.items())]


def end_of(
    words: list[str],
    moment: str = "",
    step: int = -1,
    act=None,
    prepare=None,
    timeout_s: float = 600,
) -> tuple[int, str]:
    """(exit code, all that was printed) of the program with these words.

    moment, step: where `act` is called, else the process is killed there. prepare: called first.
    No process that it has started is left 20 s later.
    """
    with started(words, moment, step, act, prepare) as process:
        process.join(timeout_s)
        # multiprocessing's own server, which loader processes are forked from here, takes seconds
        assert process.exitcode is None or left_in_session(process.pid, 20) == 0
        return process.exitcode, process.printed.read_text() if process.printed.exists() else ""


@contextlib.contextmanager
def started(words: list[str], moment: str = "", step: int = -1, act=None, prepare=None):
    """The same at work; killed where it still runs at the end of the block. printed: the file of
    what it says.
    """
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(HERE.parent)]
    )  # of the process that they are forked from
    with tempfile.TemporaryDirectory() as folder:
        process = _CONTEXT.Process(
            target=_run, args=(words, moment, step, act, prepare, Path(folder) / "printed.txt")
        )
        process.printed = Path(folder) / "printed.txt"
        process.start()
        os.environ["PYTHONPATH"] = before
        try:
            yield process
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def left_in_session(number: int, wait_s: float = 5.0) -> int:
    """How many processes of a session are left after so long, once its first one has ended; they
    are killed.
    """
    until_s = time.monotonic() + wait_s
    while left := [pid for pid in map(_number_of, Path("/proc").iterdir()) if _is_in(pid, number)]:
        if time.monotonic() > until_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return len(left)
        time.sleep(0.02)
    return 0


def _number_of(entry: Path) -> int:
    return int(entry.name) if entry.name.isdigit() else -1


def _is_in(pid: int, session: int) -> bool:
    with contextlib.suppress(OSError):
        is_in = pid > 0 and os.getsid(pid) == session
        # one that has ended may wait a while until init takes note
        return is_in and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _run(words, moment, step, act, prepare, printed: Path) -> None:
    os.setsid()  # what it starts is found by its session
    torch.set_num_threads(1)
    run.draw_first_batch = lambda path, *_: Image.new("RGB", (2, 2)).save(
        path
    )  # seconds of matplotlib's
    with open(printed, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if prepare is not None:
        prepare()
    if moment:
        strike_at(moment, step, **({"act": act} if act else {}))
    sys.argv = ["rsb", *words]
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.exit(1)
