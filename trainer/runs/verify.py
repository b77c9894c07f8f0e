"""A run folder checked against itself, its row and the store: nothing lost, nothing doubled,
nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.base.commands import command
from trainer.base.disk import read_regular
from trainer.base.errors import UserError
from trainer.base.json_text import json_file, json_of
from trainer.base.names import links_out
from trainer.base.scores import score_label
from trainer.base.settings import Settings
from trainer.base.signals import StopRequest
from trainer.models.build import assemble, num_parameters
from trainer.recipe import schema as recipe
from trainer.recipe.identity import first_name
from trainer.recipe.plan import Plan
from trainer.runs.append_only_log import LARGEST_METRICS_BYTES
from trainer.runs.checkpoint import read_checksums, sha256_of
from trainer.runs.export import file_digest, timm_facts
from trainer.runs.job import published_recipe, with_content
from trainer.runs.loader_equivalence import certificates_of
from trainer.runs.rescore import data_of_run, most_moved, rescore
from trainer.runs.results import (
    FOUND_ORIGINS,
    Row,
    read_row,
    read_row_file,
    row_path,
    touches_result,
)
from trainer.runs.run_folder import exported_weights, open_model, plan_of_run, recipe_of
from trainer.runs.verify_curves import curve_checks

# of a checkpoint, for each weight (four numbers of eight bytes, twice over), and for all else
_LARGEST_WEIGHT_BYTES, _OTHER_BYTES = 64, 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. expected, found: for a reader; the same where it is_good."""

    what: str
    is_good: bool
    expected: str
    found: str


def verify(folder: Path, results: Path) -> Iterator[Check]:
    """Every check that needs no images, in the order of a reader's trust: what was asked, what was
    saved, what came of it.
    """
    yield from _guarded("links", lambda: _links(folder))
    plan = yield from _opened("plan", lambda: plan_of_run(folder))
    row = None
    if (folder / "row.json").exists():
        row = yield from _opened("row.json", lambda: read_row_file(folder / "row.json"))
    else:
        yield Check(
            "row.json",
            False,
            "one of a finished run",
            "none yet: the run has not ended, and rerun the same command to resume",
        )
    if row is not None:
        yield from _guarded("the store's row", lambda: _store(row, results))
        yield from _guarded("parity certificate", lambda: _parity(row, results))
    if row is not None and plan is not None:
        yield from _guarded("plan and row", lambda: _plan(folder, plan, row))
    yield from _guarded("checkpoints", lambda: _checkpoints(folder, plan, row))
    if plan is not None:
        yield from _guarded("metrics.jsonl", lambda: _curves(folder, plan, row))
    if row is not None and row.status == "finished":
        yield from _guarded("model.safetensors", lambda: _weights(folder, row))
        if plan is not None:
            yield from _guarded("config.json", lambda: _timm_facts(folder, plan))
            yield from _guarded("the model opens", lambda: _model(folder))


def _guarded(what: str, checks) -> Iterator[Check]:
    """The checks, or one that failed where a file cannot be read at all."""
    try:
        yield from checks()
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Check(what, False, "a whole file", _told(error))


def _opened(what: str, read) -> Any:
    """What was read, with its check on the way; None where that failed."""
    try:
        value = read()
    except (UserError, OSError) as error:
        yield Check(
            what,
            False,
            "one of a finished run" if what == "row.json" else "one that is read",
            _told(error),
        )
        return None
    yield Check(what, True, "read", "read")
    return value


def _told(error: Exception) -> str:
    lines = str(error).splitlines()
    return (
        lines[0]
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {lines[0]}"
        if lines
        else type(error).__name__
    )[:300]


def same(what: str, expected: Any, found: Any) -> Check:
    """Two values that must be the same."""
    return Check(what, expected == found, str(expected), str(found))


def _links(folder: Path) -> Iterator[Check]:
    leading_out = [str(path.relative_to(folder)) for path in links_out(folder)]
    yield same("links that lead out", "none", ", ".join(leading_out) or "none")


def _store(row: Row, results: Path) -> Iterator[Check]:
    stored = read_row(results, row.run)
    if touches_result(row.injected):
        yield same(
            "the store's row",
            "none: inject= touched the result",
            "none: inject= touched the result" if stored is None else "one",
        )
        return
    if stored is None:
        yield Check("the store's row", False, f"{row_path(results, row.run)}", "no such file")
        return
    other = [name for name in Row.model_fields if getattr(stored, name) != getattr(row, name)]
    for name in other[:3]:
        yield same(f"the store's {name}", getattr(row, name), getattr(stored, name))
    if not other:
        yield Check("the store's row", True, "as the folder's", "as the folder's")


def _parity(row: Row, results: Path) -> Iterator[Check]:
    """The certificates of `make parity` about the very files of the row; none is no fault."""
    found = list(certificates_of(row.data_fingerprint, row.loader, results))
    for path, is_within in found:
        yield Check(
            "parity certificate",
            is_within,
            "one that is within what it allows",
            f"parity/{path.name}{'' if is_within else ', which is not'}",
        )
    if not found and row.loader == "ffcv":
        yield Check(
            "parity certificate",
            True,
            "one of these files, or none",
            f"none; `{command('parity')}` writes one",
        )


def _plan(folder: Path, plan: Plan, row: Row) -> Iterator[Check]:
    """The plan worked out again from recipe.yaml leads to the row's own name, a digest over all
    that may change the score.
    """
    _, facts = recipe_of(folder)
    yield same(
        "the run's name from recipe.yaml", first_name(row.run), plan.run_name(row.data_fingerprint)
    )
    if row.resolved_recipe is not None:
        yield same(
            "the row's resolved recipe", plan.recipe.digest, recipe.digest_of(row.resolved_recipe)
        )
    yield same("plan.json's recipe digest", row.digest, facts.get("page_digest"))
    yield same("plan.json's steps", plan.num_steps, facts.get("num_steps"))
    # found while it ran
    told = [
        tuple(change.model_dump().values())
        for change in row.deviations
        if change.origin not in FOUND_ORIGINS
    ]
    written = [tuple(change.values()) for change in facts.get("deviations", ())]
    if written != told:
        yield Check("plan.json's deviations", False, _listed(told), _listed(written))
    for name, of_plan in (
        ("recipe", plan.recipe.name), ("version", plan.recipe.version), ("model", plan.model),
        ("data", plan.profile.name), ("seed", plan.seed), ("epochs", plan.recipe.epochs),
        ("batch_images", plan.recipe.batch.images), ("norm_images", plan.recipe.batch.norm_images),
        ("num_val_images", plan.profile.num_val),
    ):  # fmt: skip
        if getattr(row, name) != of_plan:
            yield same(f"the row's {name}", of_plan, getattr(row, name))
    if row.status == "finished" and not plan.recipe.early_stopping:
        yield same("the row's steps", plan.num_steps, row.steps)
    published = published_recipe(plan.recipe)
    if published is not None:
        yield same(
            "the published recipe's digest", published.for_model(plan.model).digest, row.digest
        )


def _listed(changes) -> str:
    return "; ".join(f"{path}: {before} -> {after}" for path, before, after, _ in changes) or "none"


def _checkpoints(folder: Path, plan: Plan | None, row: Row | None) -> Iterator[Check]:
    """Each file has its checksum; the last one of a finished run is that of its last step."""
    paths = sorted((folder / "checkpoints").glob("step_*.pt"))
    largest_bytes = 0
    if paths and (row is not None or plan is not None):
        num = row.num_params if row is not None else num_parameters(assemble(plan)[0])
        largest_bytes = num * _LARGEST_WEIGHT_BYTES + _OTHER_BYTES
    for path in paths:
        what = f"checkpoints/{path.name}"
        try:
            expected, found = read_checksums(path), sha256_of(path, largest_bytes)
        except (OSError, ValueError) as error:
            yield Check(what, False, "a file and its checksum", _told(error))
            continue
        yield Check(
            what,
            found in expected,
            " or ".join(one[:12] for one in expected) or "a checksum",
            found[:12],
        )
    if row is not None and row.status == "finished":
        yield same(
            "the last checkpoint", f"step_{row.steps:09d}.pt", paths[-1].name if paths else "none"
        )


def _curves(folder: Path, plan: Plan, row: Row | None) -> Iterator[Check]:
    lines = []
    content = read_regular(folder / "metrics.jsonl", LARGEST_METRICS_BYTES)
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = json_of(text)
        except ValueError as error:
            yield Check(f"metrics.jsonl:{number}", False, "a line of JSON", str(error)[:100])
            return
        lines.append(line)
    facts = recipe_of(folder)[1]
    given = [
        facts.get(name, default)
        for name, default in (
            ("log_every", Settings.log_steps),
            ("eval_every", Settings.eval_every_epochs),
        )
    ]
    for what, expected, found in curve_checks(lines, plan, row, *given):
        yield same(what, expected, found)


def _weights(folder: Path, row: Row) -> Iterator[Check]:
    try:
        tensors = exported_weights(folder)
    except (
        Exception
    ) as error:  # safetensors has an error of its own, which is none of Python's kinds
        yield Check("model.safetensors", False, "weights", _told(error))
        return
    yield same("model.safetensors", row.weights_sha256, file_digest(tensors))


def _timm_facts(folder: Path, plan: Plan) -> Iterator[Check]:
    found = json_file(folder / "config.json")
    expected = timm_facts(plan, tuple(found["label_names"]))
    other = [name for name in expected if found.get(name) != expected[name]]
    for name in other or ["architecture"]:
        yield same(f"config.json's {name}", expected[name], found.get(name))
    yield same(
        "config.json's number of classes", plan.profile.num_classes, len(found["label_names"])
    )


def _model(folder: Path) -> Iterator[Check]:
    open_model(folder)
    yield Check("the model opens", True, "opened", "opened")


def scores_check(folder: Path, settings, data_dir: Path | None) -> list[Check]:
    """The exported weights scored once more on the validation images of now: the row's own score.

    Exactly where a CPU repeats what a CPU did, else to what `most_moved` allows.
    """
    row, scores, _ = rescore(folder, settings, data_dir)
    data = with_content(data_of_run(folder, row, data_dir), Console(quiet=True), StopRequest())
    where = (
        ""
        if settings.precision == row.precision
        else f" (in {settings.precision}, the row's {row.precision})"
    )
    found = {
        score_label(name): (row.percentages.get(name), now)
        for name, now in scores.percentages().items()
    }
    most = most_moved(row, settings)
    content = data.content_sha256 if row.content_sha256 and data.content_sha256 else None
    return [
        same("fingerprint of the images now", row.data_fingerprint, data.fingerprint),
        *([same("content of the images now", row.content_sha256, content)] if content else []),
        same("images scored now", row.num_val_images, scores.num_images),
        *(
            _score_check(f"{name} % now{where}", row, then, now, most)
            for name, (then, now) in found.items()
        ),
    ]


def _score_check(name: str, row: Row, then: float | None, now: float, num_moved: int) -> Check:
    """Two scores in percent, the same to num_moved images."""
    if not num_moved or then is None:
        return same(name, then, now)
    points = 100 * num_moved / row.num_val_images
    return Check(
        f"{name}, to {points:.2g} points", abs(then - now) <= points + 1e-9, str(then), str(now)
    )
