"""`python killed.py MOMENT STEP train ...`: the program, killed as `kill -9` does, at a moment of a
step.

MOMENT: one of MOMENTS, named after what is about to happen. STEP: of the run, counted from 0: it
strikes the first time from there on; `-` for the moments that come once.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from trainer.__main__ import main
from trainer.engine import state, train
from trainer.runs import append_only_log as kept_file
from trainer.runs import checkpoint, export, job
from trainer.runs import checkpoint_writer as saver


def die(*anything, **named):
    os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    """Where to strike: each method patches the program so that `act` is called there once, from the
    step on.
    """

    def __init__(self, step: int, act=die) -> None:
        self.first, self.act, self.step, self.is_done = step, act, -1, False
        steps = train.optimizer_step

        def noting(state, loader, number):
            self.step = number
            return steps(state, loader, number)

        train.optimizer_step = noting

    def strike(self) -> None:
        if self.step >= self.first and not self.is_done:
            self.is_done = True
            self.act()

    def before(self, owner, name: str, when=lambda *given, **named: True) -> None:
        """Strike before a function of a module is called with what `when` accepts."""
        made = getattr(owner, name)

        def calling(*given, **named):
            if when(*given, **named):
                self.strike()
            return made(*given, **named)

        setattr(owner, name, calling)

    def after(self, owner, name: str) -> None:
        """Strike once a function of a module has done its work."""
        made = getattr(owner, name)

        def calling(*given, **named):
            result = made(*given, **named)
            self.strike()
            return result

        setattr(owner, name, calling)

    def in_model(self, is_training: bool) -> None:
        made = state.TrainingState.__init__

        def making(one, *given, **named):
            made(one, *given, **named)
            for model in one.weights().values():
                model.register_forward_hook(
                    lambda module, *_: self.strike() if module.training == is_training else None
                )

        state.TrainingState.__init__ = making

    def in_write(self) -> None:
        """Strike with a part of a checkpoint written."""
        num_bytes = {"left": 100_000}

        def is_far(file, content):
            num_bytes["left"] -= len(content)
            return num_bytes["left"] < 0

        self.before(checkpoint._Hashed, "write", is_far)

    def in_line(self) -> None:
        """Strike with half a line of metrics written."""
        write = os.pwrite

        def writing(descriptor, content, place):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if name.endswith("metrics.jsonl") and self.step >= self.first and not self.is_done:
                write(descriptor, content[: len(content) // 2], place)
                self.strike()
                return 0
            return write(descriptor, content, place)

        kept_file.os.pwrite = writing


def _is_checkpoint(source, target) -> bool:
    return str(target).endswith(".pt")


def _is_in_checkpoints(folder) -> bool:
    return Path(folder).name == "checkpoints"


MOMENTS = {
    "step": lambda moments: moments.in_model(True),
    "update": lambda moments: moments.before(torch.amp.GradScaler, "step"),
    "line": lambda moments: moments.in_line(),
    "evaluate": lambda moments: moments.before(train, "evaluate_all"),
    "batch": lambda moments: moments.in_model(False),
    "copy": lambda moments: moments.before(saver, "copied_state"),
    "write": lambda moments: moments.in_write(),
    "written": lambda moments: moments.after(checkpoint, "_write_state"),
    "rename": lambda moments: moments.before(checkpoint.os, "replace", _is_checkpoint),
    "renamed": lambda moments: moments.before(checkpoint, "sync_folder", _is_in_checkpoints),
    "drop": lambda moments: moments.before(checkpoint, "_newest_first"),
    "export": lambda moments: moments.before(export, "weights_digest"),
    "row": lambda moments: moments.before(job, "make_row"),
    "store": lambda moments: moments.before(job, "store_row"),
}


def strike_at(moment: str, step: int, act=die) -> None:
    MOMENTS[moment](Moments(step, act))


# A start, in the order in which it comes: the function that is about to be called, and for which
# time.
STARTS = {
    "plan": ("trainer.runs.start", "plan_of", 1),
    "data": ("trainer.runs.start", "open_data", 1),
    "settings": ("trainer.runs.start", "make_settings", 1),
    "claim": ("trainer.runs.run_folder", "acquire", 1),
    "flag": ("trainer.runs.lock.os", "rename", 1),
    "page": ("trainer.runs.plan_file", "write_atomically", 1),
    "facts": ("trainer.runs.plan_file", "write_atomically", 2),
    "model": ("trainer.engine.state", "build_model", 1),
    "resume": ("trainer.runs.run", "load_checkpoint", 1),
    "log": ("trainer.runs.run", "Log", 1),
    "cut": (
        "trainer.runs.append_only_log.os",
        "ftruncate",
        1,
    ),  # of the curves, to what the checkpoint counts
    "curves": ("trainer.runs.append_only_log.os", "ftruncate", 2),
    "picture": ("trainer.runs.run", "draw_first_batch", 1),  # of a fresh run alone
}


def strike_at_start(place: str, act=die) -> None:
    """Call `act` at a place of STARTS."""
    path, name, number = STARTS[place]
    owner = importlib.import_module("os" if path.endswith(".os") else path)
    made, calls = getattr(owner, name), iter(range(1, 1000))

    def calling(*given, **named):
        if next(calls) == number:
            act()
        return made(*given, **named)

    setattr(owner, name, calling)


if __name__ == "__main__":
    strike_at(sys.argv[1], int(sys.argv[2]) if sys.argv[2] != "-" else -1)
    sys.argv = ["rsb", *sys.argv[3:]]
    main()
