"""The only writer to the terminal and to the curves during a run.

metrics.jsonl holds what a rerun must repeat (steps, losses, learning rates, scores) and no time of
day: it is the truth of the curves, equal byte for byte after a kill. Speeds go to speed.jsonl,
which a kill may shorten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.base.cores import load_per_core
from trainer.base.disk import Troubles, why
from trainer.base.terminal import readable, recorded
from trainer.runs.append_only_log import KeptFile
from trainer.runs.lock import LockLost
from trainer.runs.loggers.tensorboard import Board
from trainer.runs.loggers.tracker import Tracker

PLAIN_LINE_S = 10.0  # least time between two progress lines where the output is not a terminal


class Log:
    """Curves, log file, trackers and progress of one run; a context, so that every file is
    closed. The log file begins with what the console has recorded: the header of the run.

    first_step: where this process resumes the run. metrics: what metrics.jsonl begins with; what a
    killed process wrote after it is cut away. unwritten: all of metrics.jsonl, where the disk did
    not take its end. trackers: beside TensorBoard; they outlive the log.

    What cannot be written is kept, said once a minute, and written once it can be; it ends no run.

    Raises UserError where one of the files is no regular file.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        first_step: int,
        metrics: bytes,
        console: Console,
        before_write: Callable[[Path], None] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.console = console
        self.num_steps, self.first_step = num_steps, first_step
        self.unwritten: bytes | None = None
        self._is_loss_told = False
        self._troubles = Troubles(folder, self.say)
        self._metrics = KeptFile(
            folder / "metrics.jsonl", len(metrics), is_safe=True, before_write=before_write
        )
        self._digest = hashlib.sha256(metrics)
        self._speed = KeptFile(folder / "speed.jsonl")
        self._text = KeptFile(folder / "log.txt")
        if header := recorded(console):
            self._text.write(header.encode(errors="backslashreplace"))
        self._board = Board(folder, first_step)  # TensorBoard names a run by its folder
        self._trackers = (self._board, *trackers)
        self._started_s = self._last_line_s = time.monotonic()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=num_steps, completed=first_step, epoch="", facts=""
        )

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(self, kind=None, *exception) -> None:
        self._progress.stop()
        # the files are another process's by now
        is_lost = kind is not None and issubclass(kind, LockLost)
        for file in (self._metrics, self._speed, self._board.file, self._text):
            file.abandon() if is_lost else file.close()
        self.unwritten = self._metrics.unwritten

    def metrics_written(self) -> tuple[int, str]:
        """(length, SHA-256) of metrics.jsonl, once all of it is written."""
        return self._metrics.num_bytes, self._digest.hexdigest()

    def sync(self) -> None:
        """Have all of metrics.jsonl on the disk for sure; any thread may ask. Raises OSError."""
        self._metrics.sync()

    def trouble(self, what: str, error: OSError | None, more: str = "") -> None:
        """Note how the last try to write something ended, told once a minute as long as it fails;
        more: told with it.
        """
        self._troubles.note(what, error, more)

    def say(self, line: str, style: str | None = None) -> None:
        """One line for the reader, on the terminal and in log.txt."""
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
        lost = getattr(self.console.file, "trouble", None)  # base.output's
        if lost is not None and not self._is_loss_told:
            self._is_loss_told = True
            told = f"standard output: cannot write ({why(lost)}); this file alone says what follows"
            self._write("log.txt", self._text, told + "\n")
        self._write("log.txt", self._text, readable(line) + "\n")

    def window(
        self,
        step: int,
        epoch: float,
        loss_nats: float,
        lr: float,
        images_per_s: float,
        wait_share: float,
    ) -> None:
        """The mean training loss since the last window, after `step` steps; how fast, and how long
        data was awaited.
        """
        self._write_metrics(
            {"step": step, "epoch": round(epoch, 6), "loss_nats": loss_nats, "lr": lr}
        )
        speed = {"step": step, "images_per_s": images_per_s, "wait_share": wait_share}
        if (load := load_per_core()) is not None:
            speed["load_per_core"] = load
        self._write("speed.jsonl", self._speed, json.dumps(speed) + "\n")
        curves = {
            "train/loss_nats": loss_nats,
            "train/lr": lr,
            "speed/images_per_s": images_per_s,
            "speed/wait_share": wait_share,
        }
        self._track(curves, step)
        self.trouble("tensorboard", self._board.file.error)
        facts = (
            f"loss {loss_nats:.4f}  lr {lr:.2e}  {images_per_s:.0f} images/s  wait"
            f" {100 * wait_share:.0f} %"
        )
        self._progress.update(self._task, completed=step, epoch=f"{epoch:.1f}", facts=facts)
        now_s = time.monotonic()
        if not self.console.is_terminal and now_s - self._last_line_s >= PLAIN_LINE_S:
            self._last_line_s = now_s
            left_s = (now_s - self._started_s) / (step - self.first_step) * (self.num_steps - step)
            left = timedelta(seconds=round(left_s))
            self.say(f"step {step}/{self.num_steps}  epoch {epoch:.1f}  {facts}  time left {left}")

    def scores(self, step: int, epoch: int, which: str, scores) -> None:
        """One evaluation: `which` weights (model or average), counts and percentages."""
        line = {"step": step, "epoch": epoch, "weights": which}
        self._write_metrics(
            line | scores.percentages() | scores.counts() | {"val_loss_nats": scores.loss_nats}
        )
        values = scores.percentages() | {"loss_nats": scores.loss_nats}
        self._track({f"val_{which}/{name}": value for name, value in values.items()}, step)
        label = "val" if which == "model" else "val (average)"
        self.say(f"epoch {epoch:>4}  {label} {scores.summary()}")

    def picture(self, name: str, path: Path, step: int) -> None:
        """Put a PNG file beside the curves; TensorBoard sorts by name, so it comes after them."""
        for tracker in self._trackers:
            tracker.picture(f"view/{name}", path, step)

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.scalars(values, step)
            for line in tracker.news():
                self.say(line)

    def _write_metrics(self, line: dict) -> None:
        text = json.dumps(line) + "\n"
        self._digest.update(text.encode())
        self._write("metrics.jsonl", self._metrics, text)

    def _write(self, name: str, file: KeptFile, text: str) -> None:
        file.write(text.encode(errors="backslashreplace"))
        self.trouble(name, file.error)


def log_result(folder: Path, text: str) -> None:
    """End the log file of a run that is over with its result; a disk that does not take it is no
    matter, for the row has all of it.
    """
    with (
        contextlib.suppress(OSError),
        (folder / "log.txt").open("a", errors="backslashreplace") as f,
    ):
        f.write(text)
