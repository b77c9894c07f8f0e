"""Training recipes as versioned contracts: `train("A3", "resnet18")` in Python, `rsb train` or
`make` in a shell.

The folders, from the bottom up: each may import from those above it in this list, never from those
below.

    base          errors, names, streams of random numbers, statistics, the terminal, the machine
    models        timm models with a recipe's options: edit/ finds and replaces parts, parts/ are
                  what is put in; zoo/ has models that timm lacks
    components    losses, optimizers, schedules, augmentation (pixels/), mixing, averaging: one
                  small frozen class each
    recipe        a recipe: its schema, reading it, overrides, data profiles, the plan that follows,
                  explaining it
    distributed   ranks, collectives, gradient reduction, launching
    data          from files to micro-batches: index, order, decoding, transforms, loader;
                  datasets/, ffcv/
    tasks         what a target, a forward pass with its loss, and a score are: classification
    engine        training itself: state, THE STORY (train.py), evaluation, micro-batches, compile
    runs          a run from request to stored row: its folder, lock, checkpoints, loggers/, export,
                  verify, reproduce
    lr_finder     the learning-rate range test
    ablation      one question: cells, the runner and its backends/, failures, estimates
    report        tables and their formats, the HTML report, comparison of runs
    inference     a trained model in use: answers on images, quality by class
    tools         doctor, bench, fault injection, the compatibility matrix
    cli           one file per group of commands
    api           the Python API: load_recipe, plan, train, evaluate, lr_find, load_run

Read engine/train.py first: it is the story. README.md in this folder has the picture.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["evaluate", "load_recipe", "load_run", "lr_find", "plan", "train"]

if TYPE_CHECKING:
    from trainer.api import evaluate, load_recipe, load_run, lr_find, plan, train


def __getattr__(name: str):
    """The functions of trainer.api, which imports torch and timm, when one is asked for: not when
    the package is.
    """
    if name in __all__:
        return getattr(importlib.import_module("trainer.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
