"""The program in processes forked from one that has imported all of it: a run starts in no time, and can be killed."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from killed import strike_at
from trainer import export, job, train  # noqa: F401  what a run imports
from trainer.__main__ import main

HERE = Path(__file__).parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked"])


def end_of(words: list[str], moment: str = "", step: int = -1, act=None, prepare=None, timeout_s: float = 120) -> tuple[int, str]:
    """(exit code, all that was printed) of the program with these words.

    moment, step: where `act` is called, else the process is killed there. prepare: called first.
    """
    with started(words, moment, step, act, prepare) as process:
        process.join(timeout_s)
        return process.exitcode, process.printed.read_text() if process.printed.exists() else ""


@contextlib.contextmanager
def started(words: list[str], moment: str = "", step: int = -1, act=None, prepare=None):
    """The same at work; killed where it still runs at the end of the block. printed: the file of what it says."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])  # of the process that they are forked from
    with tempfile.TemporaryDirectory() as folder:
        process = _CONTEXT.Process(target=_run, args=(words, moment, step, act, prepare, Path(folder) / "printed.txt"))
        process.printed = Path(folder) / "printed.txt"
        process.start()
        os.environ["PYTHONPATH"] = before
        try:
            yield process
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def _run(words, moment, step, act, prepare, printed: Path) -> None:
    torch.set_num_threads(1)
    train.draw_first_batch = lambda path, *_: Image.new("RGB", (2, 2)).save(path)  # seconds of matplotlib's
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


def metrics_of(folder: Path) -> bytes:
    """metrics.jsonl of the only run under a folder."""
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return path.read_bytes()
