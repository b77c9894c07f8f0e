"""A dry run: one optimizer step of every shape of cell, before hours are spent on any.

A shape is all that decides whether a step works; cells that differ in real numbers share one.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.ablation.cell_run import Repeat, Shared, written_to
from trainer.base import provenance
from trainer.base.errors import UserError
from trainer.base.plugins import loaded_plugins
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.profile import data_folder
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import check_model_name
from trainer.recipe import tree
from trainer.recipe.plan import Plan

# Keys of a recipe that cannot make a step fail: metadata, length and learning rate.
_IGNORED_KEYS = (
    "name",
    "version",
    "title",
    "source",
    "assumed",
    "unconfirmed",
    "published",
    "per_model",
    "adapted_to",
    "epochs",
    "lr",
)


@dataclass(frozen=True)
class DryTrial:
    """The result of one shape's trial step. error: one line, None where it worked. is_users: it is
    a user's error.
    """

    shape: str
    error: str | None = None
    is_users: bool = False
    log_tail: tuple[str, ...] = ()


def dry_run_shape(plan: Plan) -> str:
    """16 hex digits over all that decides whether a step works: the recipe without its real
    numbers, model, data, versions, plugins.
    """
    recipe = {
        key: value for key, value in tree.plain(plan.recipe).items() if key not in _IGNORED_KEYS
    }
    fields = (
        plan.profile.name,
        plan.profile.num_classes,
        plan.profile.channels,
        plan.model,
        plan.bad_images,
    )
    text = json.dumps(
        [_without_reals(recipe), fields, provenance.versions() | loaded_plugins()],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_reals(value: Any) -> Any:
    if isinstance(value, float):
        return 0.0
    if isinstance(value, dict):
        return {key: _without_reals(part) for key, part in value.items()}
    return [_without_reals(part) for part in value] if isinstance(value, (list, tuple)) else value


def untried(repeats: Iterable[Repeat], shared: Shared) -> dict[str, Repeat]:
    """One repeat of each shape that has no trial step recorded in this runs folder, by shape."""
    found: dict[str, Repeat] = {}
    for repeat in repeats:
        found.setdefault(dry_run_shape(repeat.plan), repeat)
    return {shape: repeat for shape, repeat in found.items() if not _mark(shared, shape).exists()}


def mark_tried(shared: Shared, shape: str) -> None:
    """Record that a shape works."""
    path = _mark(shared, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _mark(shared: Shared, shape: str) -> Path:
    return Path(shared.runs) / "cells" / "tried" / shape


def try_shapes(shapes: dict[str, Repeat], shared: Shared) -> Iterator[DryTrial]:
    """Make one step of each shape in this process and evaluate one batch; each data set is opened
    once.
    """
    opened: dict[tuple, Any] = {}
    for shape, repeat in shapes.items():
        try:
            with written_to(Path(shared.runs) / "cells" / "dry_run.txt"):
                _try(repeat, shared, opened)
            yield DryTrial(shape)
        except UserError as error:
            yield DryTrial(shape, str(error), is_users=True)
        except Exception as error:  # of the model, an allocator, a driver
            lines = traceback.format_exc().splitlines()
            first = (str(error).strip() or "no message").splitlines()[0]
            yield DryTrial(shape, f"{type(error).__name__}: {first}", log_tail=tuple(lines))


def _try(repeat: Repeat, shared: Shared, opened: dict[tuple, Any]) -> None:
    """The first step of the last epoch: a full batch, and the largest images where they grow."""
    job, plan = repeat.job, repeat.plan
    check_model_name(job.model)
    where = job.data, job.data_dir
    if where not in opened:
        opened[where] = open_data(plan.profile, data_folder(*where))
    data = opened[where]
    settings = make_settings(shared.device, shared.precision, "0", shared.runs, shared.results)
    state = TrainingState(plan, settings)
    step = (plan.recipe.epochs - 1) * plan.steps_per_epoch
    stream = data.train_stream(replace(plan, num_steps=step + 1), settings, step)
    optimizer_step(state, stream, step).item()
    evaluate(
        plan, settings, state.weights()[state.scored], islice(data.val_batches(plan, settings), 1)
    )
