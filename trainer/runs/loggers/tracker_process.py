"""A tracker that lives in a process of its own, so that nothing of it touches the run: no crash, no
wait, and no thread, hook or variable of its package.

What the run has to say goes through a pipe, as JSON lines, and is never waited for: what the pipe
does not take is kept, up to a limit, and offered again with the next. tracker_child.py reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.base.disk import END_S, STOP_S
from trainer.runs.loggers.tracker import About, Tracker

MOST_WAITING_BYTES = 2**22  # some 20,000 points: hours of a tracker that hangs
_KILLED_S = 5.0  # how long a killed process is waited for
_ROOT = Path(__file__).parents[3]  # what has the package `trainer`


class TrackerProcess(Tracker):
    """One tracker's process, and what is on its way there.

    name: of its package. What it prints is in the run folder, trackers/<name>.log.
    """

    def __init__(self, name: str, about: About) -> None:
        self.name = name
        self._log = Path(about.folder) / "trackers" / f"{name}.log"
        self._process: subprocess.Popen | None = None  # None: it is over
        self._waiting, self._heard = bytearray(), b""
        self._news: list[str] = []
        self._is_full = False
        self._ended = f"its process has ended, see {self._log}; the run does without"
        try:
            self._process = self._started()
        except OSError as error:
            self._news.append(f"cannot start ({error}); the run continues without it")
        self._send("start", **asdict(about))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._send("scalars", values=dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._send("picture", name=name, path=str(path.resolve()), step=step)

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        self._send("end", status=status, row=row)

    def news(self) -> list[str]:
        self._listen()
        news, self._news = self._news, []
        return [f"{self.name}: {line}" for line in news]

    def wait(self, until_s: float) -> None:
        """Let the process take what waits, and end, until time.monotonic() is that; then end it."""
        if self._process is None:
            return
        try:
            while self._waiting and self._process and (left_s := until_s - time.monotonic()) > 0:
                select.select([], [self._stdin], [], left_s)
                self._flush()
            if self._process and self._process.wait(max(0.0, until_s - time.monotonic())):
                self._news.append(self._ended)
        except subprocess.TimeoutExpired:
            self._news.append("does not end; it was given up, and may lack the last points")
        finally:
            self._close()

    def _started(self) -> subprocess.Popen:
        self._log.parent.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.runs.loggers.tracker_child", self.name],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the run; and all of it can be ended at once
            )
        assert process.stdin and process.stdout
        self._stdin, self._stdout = process.stdin, process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        return process

    def _send(self, call: str, **given: Any) -> None:
        if self._process is None:
            return
        line = json.dumps({"call": call, **given}, default=str).encode() + b"\n"
        if len(self._waiting) + len(line) <= MOST_WAITING_BYTES:
            self._waiting += line
        elif not self._is_full:
            self._is_full = True
            self._news.append("takes nothing any more; what it cannot keep up with is left out")
        self._flush()

    def _flush(self) -> None:
        """Offer what waits to the pipe, as far as it takes that at once."""
        try:
            while self._waiting:
                del self._waiting[: os.write(self._stdin.fileno(), self._waiting[:65536])]
        except BlockingIOError:
            pass
        except OSError:  # nobody is there to read it
            self._close()
            self._news.append(self._ended)

    def _listen(self) -> None:
        """Take the lines that the process has to say."""
        if self._process is None:
            return
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._stdout.fileno(), 65536):
                self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        self._news += [line.decode(errors="backslashreplace") for line in lines]

    def _close(self) -> None:
        """End the process, and those that it has started, where it still runs."""
        self._listen()
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_KILLED_S)
        self._stdin.close()
        self._stdout.close()


class Tracking:
    """The trackers of a run, from before its first step until its row is stored; a context.

    row: to be set before its end, where the run has one. say: takes what they have to tell once the
    run's own log is closed.
    """

    def __init__(
        self, names: Sequence[str], about: Callable[[], About], say: Callable[[str], None]
    ) -> None:
        self.row: Mapping[str, Any] | None = None
        self._say = say
        made = about() if names else None
        self.trackers = tuple(TrackerProcess(name, made) for name in names if made)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind=None, *exception) -> None:
        status = self.row["status"] if self.row else "failed" if kind else "stopped"
        for tracker in self.trackers:
            tracker.end(status, self.row)
        until_s = time.monotonic() + (END_S if self.row else STOP_S)
        for tracker in self.trackers:
            tracker.wait(until_s)
            for line in tracker.news():
                self._say(line)
