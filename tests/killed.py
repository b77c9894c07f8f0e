"""`python killed.py MOMENT STEP train ...`: the program, killed as `kill -9` does, at a moment of a step.

MOMENT: step (in the middle of an optimizer step), rename (a checkpoint written under its temporary name only),
evaluate (before an evaluation), export (the exported weights just in place), row (before the row is made), store (the
row in the run folder only). STEP: of the run, counted from 0; `-` for the moments that come once.
"""

import os
import signal
import sys

import torch

torch.set_num_threads(1)

from trainer import checkpoint, export, job, train
from trainer.__main__ import main


def die(*anything, **named):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, step: int) -> None:
    steps = train.optimizer_step
    position = {"step": -1}

    def noting(state, window, number):
        position["step"] = number
        if moment == "step" and number == step:
            state.model.register_forward_hook(die)
        return steps(state, window, number)

    train.optimizer_step = noting
    if moment == "rename":
        replace = os.replace

        def replacing(source, target):
            if position["step"] >= step and str(target).endswith(".pt"):
                die()
            replace(source, target)

        checkpoint.os.replace = replacing
    if moment == "evaluate":
        evaluate = train.evaluate
        train.evaluate = lambda *given, **named: die() if position["step"] >= step else evaluate(*given, **named)
    if moment == "export":
        export.weights_digest = die
    if moment == "row":
        job.make_row = die
    if moment == "store":
        job.store_row = die


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]) if sys.argv[2] != "-" else 0)
    sys.argv = ["rsb", *sys.argv[3:]]
    main()
