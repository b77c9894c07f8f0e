"""The process of one tracker: `python -m trainer.runs.loggers.tracker_child <name>`.

Messages come on standard input, a JSON object a line; what the reader of the run should know goes
to standard output. No failure ends it: what a call of the package raises is said once, and written
in full to standard error, the tracker's log. It ends with the message `end`, or with the process
that sends, which then was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from trainer.base.signals import SIGNALS
from trainer.runs.loggers.tracker import About, PackageTracker

_NICE = 5  # the training comes first
_ORPHAN_S = 60.0  # how long one whose run was killed may still take for what it has
_POLL_S = 1.0


class Kept:
    """What a tracker has of a run, in the run folder: its id there, and the last step of each name.

    A resumed run does some steps again, and they are not said twice. A step is noted before it is
    said: a process killed in between leaves one point out, and none twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.run_id: str | None = None
        self._steps: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text())
            self.run_id, self._steps = found["run_id"], dict(found["steps"])

    def new(self, names: list[str], step: int) -> list[str]:
        """Those of the names that have not been said at this step or a later one; noted now."""
        new = [name for name in names if step > self._steps.get(name, -1)]
        self._steps |= dict.fromkeys(new, step)
        self.write()
        return new

    def write(self) -> None:
        """Put it on the disk, whole or not at all."""
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk: then a resumed run may say points twice
            part.write_text(json.dumps({"run_id": self.run_id, "steps": self._steps}) + "\n")
            part.replace(self._path)


def main(name: str) -> None:
    """Read messages until the end."""
    for number in SIGNALS:  # the run is asked to stop, and says so; no SIG_IGN, which is inherited
        signal.signal(number, lambda *given: None)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    messages, say = _own_streams()
    first = _message(next(messages))
    first.pop("call")
    about = About(**first)
    folder = Path(about.folder) / "trackers"
    with (folder / f"{name}.log").open("r+b") as log:
        # one process at a time: that of a killed run may still send what it had taken
        fcntl.flock(log, fcntl.LOCK_EX)
        serve(name, about, Kept(folder / f"{name}.json"), messages, say)


def serve(
    name: str, about: About, kept: Kept, messages: Iterator[str], say: Callable[[str], None]
) -> None:
    """Hand each message to the tracker, if it opens."""
    guard = Guard(say)
    tracker = guard.call("start", lambda: _opened(name, about, kept, say))
    for line in messages:
        message = _message(line)
        call = message.pop("call")
        if tracker is None:  # read on: a full pipe would be taken for a hang
            if call == "end":
                return
            continue
        if call == "scalars":
            values, step = message["values"], message["step"]
            message["values"] = {key: values[key] for key in kept.new(list(values), step)}
            if not message["values"]:
                continue
        if call == "picture":
            message["path"] = Path(message["path"])
            if not kept.new([message["name"]], message["step"]):
                continue
        guard.call(call, partial(getattr(tracker, call), **message))
        if call == "end":
            return
    if tracker is not None:  # the run's process was killed
        guard.call("end", lambda: tracker.end("stopped", None))


class Guard:
    """Calls that must not fail; the first failure of each kind is said."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._failed = say, set[str]()

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """What the function gives, or None where it raises, sys.exit included."""
        try:
            return function()
        except BaseException as error:
            traceback.print_exc()
            if what not in self._failed:
                self._failed.add(what)
                why = " ".join(str(error).split())[:200]
                self._say(
                    f"{what} failed ({type(error).__name__}: {why}); the run continues without it"
                )
            return None


def _opened(name: str, about: About, kept: Kept, say: Callable[[str], None]) -> PackageTracker:
    module = importlib.import_module(f"trainer.runs.loggers.{name}")
    tracker: PackageTracker = module.open_tracker(about, kept.run_id)
    kept.run_id = tracker.run_id
    kept.write()
    say(tracker.where)
    return tracker


def _end_after(parent: int) -> None:
    """End this process, and those that its package has started, some time after its parent."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    time.sleep(_ORPHAN_S)
    os.killpg(0, signal.SIGKILL)


def _own_streams() -> tuple[Iterator[str], Callable[[str], None]]:
    """Standard input and output for us alone: what a package prints goes to the log, and nothing is
    there to be asked for.
    """
    messages: TextIO = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the run has ended
            print(line, file=out, flush=True)

    return messages, say


def _message(line: str) -> dict[str, Any]:
    return json.loads(line)


if __name__ == "__main__":
    main(sys.argv[1])
