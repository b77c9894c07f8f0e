"""The runs that are here: each run folder, and each row of one's own without a folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from trainer.base.disk import read_regular
from trainer.base.errors import UserError
from trainer.base.json_text import json_file, last_lines
from trainer.base.provenance import tracked_names
from trainer.base.scores import main_score, score_label
from trainer.runs.lock import STALE_S, heartbeat_age_s, owner_of
from trainer.runs.results import read_row_file, rows_folder

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

# or a row's status
RUNNING, STALE, STOPPED, KILLED, DAMAGED = (
    "running", "no heartbeat", "stopped", "killed", "damaged"
)  # fmt: skip
TRIALS = "trials"  # in a folder of lr-find: a file of each trial that is over
_LARGEST_RECIPE_BYTES = 2**20


@dataclass(frozen=True)
class OwnRun:
    """What a list says of a run; None where its files do not say.

    recipe: with its version. state: running; no heartbeat, of a running one whose process has given
    no sign of life for a minute; stopped, which has saved, or killed, which had no time to (the
    same command resumes both); finished, diverged; or damaged: files that cannot be read.
    epochs_done: of `epochs`, with fractions.
    score_pct: the row's main score, else the last evaluation's of the weights that are scored;
    score: its name; top1_pct: the same, where it is top-1. deviations: from
    the recipe, but for those of the data profile, `epochs=2` each. folder: None where only the row
    is here. One of lr-find has neither epochs nor a score, but num_trials, those that are over.
    steps_left: optimizer steps still to come.
    """

    run: str
    state: str
    recipe: str | None = None
    model: str | None = None
    data: str | None = None
    seed: int | None = None
    epochs_done: float | None = None
    epochs: float | None = None
    score_pct: float | None = None
    score: str | None = None
    top1_pct: float | None = None
    deviations: tuple[str, ...] = ()
    folder: str | None = None
    changed_utc: str | None = None
    steps_left: int | None = None
    num_trials: int | None = None


def score_text(one: OwnRun) -> str:
    """A run's score in a column for top-1: another score with its name."""
    if one.score_pct is None:
        return ""
    return f"{'' if one.top1_pct is not None else f'{one.score} '}{one.score_pct:.2f}"


def own_runs(runs: Path, results: Path) -> list[OwnRun]:
    """Every run folder in `runs`, those of lr-find too, and every row in `results` that has none
    and did not come with the project; the last changed is last.
    """
    found = own_folders(runs, results)
    here = {one.run for one in found}
    shipped = tracked_names(rows_folder(results))
    found += [
        _of_row(path, None)
        for path in rows_folder(results).glob("*.json")
        if path.stem not in here and path.name not in shipped
    ]
    return sorted(found, key=_by_change)


def own_folders(runs: Path, results: Path) -> list[OwnRun]:
    """Every run folder in `runs`, those of lr-find too; the last changed is last."""
    folders = {path.parent for path in runs.glob("*/plan.json")}
    searches = {path.parent for path in runs.glob("lr-find-*/*")} - folders
    rows = rows_folder(results)
    found = [_of_folder(folder, rows / f"{folder.name}.json") for folder in folders]
    return sorted(found + [_of_search(folder) for folder in searches], key=_by_change)


def _by_change(one: OwnRun) -> tuple[str, str]:
    return one.changed_utc or "", one.run


def _of_folder(folder: Path, stored: Path) -> OwnRun:
    """Of a run folder; stored: its row in the store, which a folder may lack."""
    state = _state_of(folder)
    own = folder / "row.json"
    path = next((path for path in (own, stored) if path.is_file()), None)
    if path and state not in (RUNNING, STALE):
        return _of_row(path, folder)
    return _unfinished(folder, state)


def _state_of(folder: Path) -> str:
    """Of a folder without a row, by its lock: who stops takes the lock file away."""
    age_s = heartbeat_age_s(folder)
    if owner_of(folder) is not None:
        return STALE if age_s is not None and age_s > STALE_S else RUNNING
    return STOPPED if age_s is None else KILLED


def _of_row(path: Path, folder: Path | None) -> OwnRun:
    try:
        row = read_row_file(path)
    except UserError:  # no row, or a link that leads elsewhere
        return OwnRun(folder.name if folder else path.stem, DAMAGED, folder=_text(folder))
    return OwnRun(
        folder.name if folder else row.run,
        row.status,
        recipe=f"{row.recipe}.v{row.version}",
        model=row.model,
        data=row.data,
        seed=row.seed,
        epochs_done=row.epochs if row.status == "finished" else _epochs_at(row.steps, folder),
        epochs=row.epochs,
        score_pct=row.main_pct,
        score=row.main_label,
        top1_pct=row.top1_pct,
        deviations=_deviations([one.model_dump() for one in row.deviations]),
        folder=_text(folder),
        changed_utc=_seconds(datetime.fromisoformat(row.finished_utc)),
    )


def _unfinished(folder: Path, state: str) -> OwnRun:
    try:
        plan = json_file(folder / "plan.json")
        model, data, seed = str(plan["model"]), str(plan["data"]), int(plan["seed"])
        steps = int(plan["num_steps"]), int(plan["steps_per_epoch"])
        epochs = round(steps[0] / steps[1], 2)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
        damaged = state if state in (RUNNING, STALE) else DAMAGED
        return OwnRun(folder.name, damaged, folder=_text(folder))
    lines = last_lines(folder / "metrics.jsonl")
    step = last_number(lines, "step") or 0
    recipe, scored = _recipe(folder / "recipe.yaml")
    scores = [line for line in lines if line.get("weights", scored) == scored and main_score(line)]
    name, score = (main_score(scores[-1]) if scores else None) or (None, None)
    return OwnRun(
        folder.name,
        state,
        recipe,
        model=model,
        data=data,
        seed=seed,
        epochs_done=round(step / steps[1], 2),
        epochs=epochs,
        score_pct=score,
        score=score_label(name) if name else None,
        top1_pct=score if name == "top1_pct" else None,
        deviations=_deviations(plan.get("deviations")),
        folder=_text(folder),
        changed_utc=_changed(folder),
        steps_left=max(0, steps[0] - int(step)),
    )


def _of_search(folder: Path) -> OwnRun:
    """Of a folder of lr-find."""
    path = folder / "suggestion.json"
    state, is_done = _state_of(folder), path.is_file()
    if is_done and state not in (RUNNING, STALE):
        state = "finished"
    facts: Any = {}
    try:
        facts = json_file(path) if is_done else {}
    except (OSError, ValueError):
        state = DAMAGED
    recipe, model, data = (
        str(facts[key]) if isinstance(facts, dict) and key in facts else None
        for key in ("recipe", "model", "data")
    )
    trials = folder / TRIALS
    changed = path if is_done else trials if trials.is_dir() else folder
    return OwnRun(
        folder.name,
        state,
        recipe,
        model,
        data,
        folder=_text(folder),
        changed_utc=_changed(changed),
        num_trials=len(list(trials.glob("*.json"))),
    )


def _epochs_at(step: int, folder: Path | None) -> float | None:
    """The epochs of so many steps, by the plan of a run folder."""
    if folder is None:
        return None
    try:
        return round(step / int(json_file(folder / "plan.json")["steps_per_epoch"]), 2)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
        return None


def _deviations(listed: Any) -> tuple[str, ...]:
    """Of a row or a plan.json, but for what a data profile changes: `epochs=2` each."""
    try:
        return tuple(
            f"{one['path']}={one['after']}" for one in listed if one["origin"] != "profile"
        )
    except (KeyError, TypeError):  # of a damaged file
        return ()


def _recipe(path: Path) -> tuple[str | None, str]:
    """A recipe's name with its version, and whose scores are its result."""
    values = recipe_values(path)
    if values is None:
        return None, "model"
    average = values.get("average")
    is_averages = isinstance(average, dict) and bool(average.get("is_scored", False))
    return f"{values['name']}.v{values['version']}", "average" if is_averages else "model"


def recipe_values(path: Path) -> dict[str, Any] | None:
    """What a recipe file with a name and a version says, as plain YAML: to check every value would
    import torch, which takes seconds. None for any other file.
    """
    try:
        recipe = yaml.load(read_regular(path, _LARGEST_RECIPE_BYTES), Loader=SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    is_recipe = isinstance(recipe, dict) and {"name", "version"} <= set(recipe)
    return recipe if is_recipe else None


def last_number(lines: list[dict[str, Any]], name: str) -> float | None:
    """The last number under a name in some lines; None where there is none."""
    numbers = [line[name] for line in lines if isinstance(line.get(name), (int, float))]
    return numbers[-1] if numbers else None


def _changed(path: Path) -> str | None:
    """When the curves of a folder, else it or a file itself, were last written to."""
    curves = path / "metrics.jsonl"
    try:
        changed_s = (curves if curves.is_file() else path).stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return _seconds(datetime.fromtimestamp(changed_s, UTC))


def _seconds(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")


def _text(folder: Path | None) -> str | None:
    return str(folder) if folder else None
