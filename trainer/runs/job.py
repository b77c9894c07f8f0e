"""From what a user asked to a plan, and from a plan to a stored row: the one code path that every
command joins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.base.commands import command
from trainer.base.cores import num_cores
from trainer.base.disk import must_write, write_atomically
from trainer.base.errors import DataError, OverrideError, UserError
from trainer.base.exits import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_UNWRITTEN,
)
from trainer.base.settings import Settings
from trainer.base.signals import StopRequest
from trainer.data.check import check_headers
from trainer.data.content import differ
from trainer.data.dataset import OpenedData
from trainer.data.profile import find_profile
from trainer.distributed.communicator import Ranks, alone
from trainer.models.trained import GivenWeights
from trainer.recipe.adapt import adaptation
from trainer.recipe.load import Positions
from trainer.recipe.overrides import Deviation, as_text, deviations_between, mended, overrides_of
from trainer.recipe.plan import Plan, PlanError, make_plan
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Recipe, apply_overrides, digest_of, load_recipe, open_recipe
from trainer.recipe.shipped import find_recipe, recipe_paths
from trainer.runs.best_weights import best_epoch
from trainer.runs.expected import ExpectedCurve, expected_curve
from trainer.runs.export import export_model
from trainer.runs.finalize import end_run, rescued, write_curves
from trainer.runs.guard import Guard
from trainer.runs.loggers.tracker import Tracker
from trainer.runs.loggers.tracker_process import Tracking
from trainer.runs.pace import pace_of
from trainer.runs.plan_file import check_same_images, check_same_lines, write_plan
from trainer.runs.results import Row, read_row, row_path, store_row, touches_result
from trainer.runs.row import about_run, make_row, parent_of, size_scores
from trainer.runs.run import train_in_folder
from trainer.runs.run_folder import own_folder
from trainer.tasks.teacher import hashed_teacher


@dataclass(frozen=True)
class Job:
    """What a user asked for, as they wrote it. ablation, cell: what it is a part of, for the
    row. weights: what weights= stands for, beside the overrides of set=.
    """

    recipe: str
    model: str
    data: str = "digits"
    data_dir: Path | None = None
    seed: int = 0
    overrides: str = ""
    bad_images: str = "fail"
    again: bool = False
    ablation: str | None = None
    cell: str | None = None
    world_size: int = 1
    weights: GivenWeights | None = None


def resolve(
    job: Job, profile: Profile | None
) -> tuple[Recipe, Positions, Recipe, tuple[Deviation, ...]]:
    """The recipe, where its keys stand, the recipe that a job makes of it, and every deviation on
    the way.

    profile: None leaves the recipe as it was published.

    Raises UserError for what is wrong in the recipe or in the overrides.
    """
    original, positions = open_recipe(find_recipe(job.recipe))
    recipe = original.for_model(job.model)
    origin = published_recipe(original)
    written = deviations_between(origin.for_model(job.model), recipe, "file") if origin else ()
    adapted: tuple[Deviation, ...] = ()
    if profile and recipe.adapted_to != profile.name:
        changes = adaptation(recipe, profile, _starts_from_weights(job, recipe))
        recipe, adapted = apply_overrides(recipe, changes, "profile")
        recipe = recipe.model_copy(update={"adapted_to": profile.name})
    started: tuple[Deviation, ...] = ()
    if job.weights:
        recipe, started = apply_overrides(recipe, _start(job, profile), "set")
    recipe, overridden = apply_overrides(recipe, job.overrides, "set")
    return original, positions, recipe, written + adapted + started + overridden


def _starts_from_weights(job: Job, recipe: Recipe) -> bool:
    """By weights=, by set=, or by the recipe's own file."""
    is_set = any(label.startswith("model.pretrained") for label in overrides_of(job.overrides))
    named = recipe.model and recipe.model.pretrained and recipe.model.pretrained.file
    return job.weights is not None or is_set or bool(named)


def _start(job: Job, profile: Profile | None) -> dict[str, Any]:
    """The overrides of a job's weights=, but for those that set= has. Raises OverrideError for
    other weights in set=.
    """
    assert job.weights
    given = overrides_of(job.overrides)
    for label in ("model.pretrained.file", "model.pretrained.sha256"):
        if label in given:
            raise OverrideError(
                f"{label} is set twice, by weights= too",
                "leave one of them out",
                place=f"set={label}={given[label]}",
                labels=(label,),
            )
    start = job.weights.overrides(*((profile.mean, profile.std) if profile else ((), ())))
    return {label: value for label, value in start.items() if label not in given}


def published_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of this name and version that comes with the suite: what a file of the same name
    is measured against.

    So a run folder's recipe.yaml, or an edited copy, is not taken for the recipe whose name it
    bears.
    """
    found = [path for path in recipe_paths() if path.stem == f"{recipe.name}.v{recipe.version}"]
    return load_recipe(found[0]) if found else None


def plan_of(job: Job, check: Callable[[Plan], None] = lambda plan: None) -> Plan:
    """Recipe, model's lines, profile's adaptation, overrides; then the units. Reads no image.

    check: raises what else is asked of the plan.

    Raises UserError for whatever does not fit, with all that is refused and one set= in its place.
    """

    def checked(job: Job) -> Plan:
        plan = _plan_of(job)
        check(plan)
        return plan

    def attempt(items: Mapping[str, Any]) -> Plan:
        return checked(dataclasses.replace(job, overrides=as_text(items)))

    try:
        return checked(job)
    except UserError as error:
        if not error.fix:
            raise
        made = mended(error, overrides_of(job.overrides), attempt)
        if os.path.isdir(job.data):  # no profile: that fits any recipe to it, and any set=
            file = f"{find_profile(job.data).name}.yaml"
            writes = command("check-data", data=job.data, profile=file)
            made.hint += f", or a data profile, which suits all recipes (`{writes}` writes it)"
        raise made from None


def _plan_of(job: Job) -> Plan:
    task = None
    if os.path.isdir(job.data):  # which may hold targets of several
        task = open_recipe(find_recipe(job.recipe))[0].of_task.name
    profile = find_profile(job.data, job.data_dir, task)
    original, _, recipe, deviations = resolve(job, profile)
    recipe, hashed = apply_overrides(recipe, hashed_teacher(recipe), "set")
    return make_plan(
        recipe,
        model=job.model,
        profile=profile,
        seed=job.seed,
        page_digest=(published_recipe(original) or original).for_model(job.model).digest,
        deviations=deviations + hashed,
        world_size=job.world_size,
        bad_images=job.bad_images,
    )


def run_job(
    job: Job,
    plan: Plan,
    settings: Settings,
    data,
    console: Console,
    stop: StopRequest,
    ranks: Ranks = alone(),
    faults=None,
) -> tuple[int, Row | None]:
    """Run a plan to its row, or find the row it has: (exit code, row or None where the run was
    stopped).

    Of several ranks all train, and rank 0 alone reads and writes folders: the others get no row.

    faults: what makes a run's faults on purpose of (plan, folder, ranks), or None.

    Raises LockedError where another process works in the run's folder, DataError where ranks see
    unlike images.
    """
    if not ranks.is_same(int(data.fingerprint[:15], 16)):
        raise DataError(
            f"{plan.profile.name}: the ranks' machines hold unlike images; use one folder that"
            " all see"
        )
    data = with_content(data, console, stop, ranks)
    name = ranks.broadcast(
        run_name(job, plan, settings, data.fingerprint) if ranks.is_first else ""
    )
    row = _stored_row(settings, name, ranks)
    if not ranks.any(row is not None):
        with (
            own_folder(settings.runs / name, stop.check)
            if ranks.is_first
            else contextlib.nullcontext()
        ) as lock:
            row = _stored_row(settings, name, ranks)  # who had the lock before may have stored it
            if not ranks.any(row is not None):
                return _run_to_row(
                    name, job, plan, settings, data, console, stop, ranks, lock, faults
                )
    if row is not None:
        _check_found(name, row, plan, data)
    _say_found(name, row, plan, settings, console)
    status = ranks.broadcast(row.status if row else "")
    return (EXIT_DONE if status == "finished" else EXIT_DIVERGED), row


def _say_found(
    name: str, row: Row | None, plan: Plan, settings: Settings, console: Console
) -> None:
    """That a run has its row already. row: None on other ranks, whose console is quiet."""
    by = row.loader.split(",")[0] if row else settings.loader
    made = "" if by == settings.loader else f", made with loader={by}"
    console.print(
        f"{name} already has a row{made}; use again=1 to rerun it", markup=False, highlight=False
    )
    if row is not None and (missing := _sizes_missing(row, plan, settings)):
        asks = command("eval", run=name, test_px=" ".join(map(str, missing)))
        console.print(
            f"it has no scores at {', '.join(map(str, missing))} px: `{asks}` gives them",
            markup=False,
            highlight=False,
        )


def _sizes_missing(row: Row, plan: Plan, settings: Settings) -> list[int]:
    """The image sizes asked for at which a row that was found has no score."""
    known = {plan.recipe.image.test_px, *(scores.test_px for scores in row.test_sizes)}
    return [px for px in settings.test_px if px not in known] if row.status == "finished" else []


def _check_found(name: str, row: Row, plan: Plan, data) -> None:
    """Is the row found under a run's name that run's? Raises PlanError or DataError."""
    if row.resolved_recipe is not None and digest_of(row.resolved_recipe) != plan.recipe.digest:
        raise PlanError(
            f"{name}: the store has the row of another recipe under this name; another seed= has"
            " another name"
        )
    if differ(row.content_sha256, data.content_sha256):
        raise DataError(
            f"{name}: has a row of other images, which had the same names and sizes",
            "restore the images, or use again=1 for a row of these",
        )


def with_content(
    data: OpenedData, console: Console, stop: StopRequest, ranks: Ranks = alone()
) -> OpenedData:
    """The data with the digest of its bytes, read by rank 0 where it is not cached. All ranks come
    here together, and any of them may be asked to stop.
    """
    if data.content_sha256 is not None:
        return data
    num_images = data.train.num_images + data.val.num_images
    parts = data.read_content() if ranks.is_first else iter(())
    is_said = False
    while ranks.any((found := next(parts, data)) is None):
        if not is_said:
            console.print(f"reading {num_images:,} images once, to record their content ...")
            is_said = True
        ranks.check(stop)
    assert found is not None
    return dataclasses.replace(data, content_sha256=ranks.broadcast(found.content_sha256))


def _check_val(data: OpenedData, stop: StopRequest, ranks: Ranks) -> None:
    """Have rank 0 open every validation image before the first step. All ranks come here together.

    Raises BadImage on rank 0.
    """
    parts = check_headers(data.val, num_cores()) if ranks.is_first else iter(())
    while ranks.any(next(parts, parts) is None):
        ranks.check(stop)


def _stored_row(settings: Settings, name: str, ranks: Ranks) -> Row | None:
    return read_row(settings.results, name) if ranks.is_first else None


def _run_to_row(
    name: str,
    job: Job,
    plan: Plan,
    settings: Settings,
    data,
    console: Console,
    stop: StopRequest,
    ranks: Ranks,
    lock,
    faults,
) -> tuple:
    folder = settings.runs / name
    _check_val(data, stop, ranks)
    expected = _expected(job, plan, settings, data, console) if ranks.is_first else None
    if ranks.is_first:
        check_same_images(folder, data.content_sha256)
        check_same_lines(folder, settings)
        with must_write(folder):
            write_plan(folder, job, plan, data.content_sha256, settings)
    parent = parent_of(plan)  # now: by the end its folder may be gone
    guard = Guard(lock, faults(plan, folder, ranks) if faults else None)
    with Tracking(
        settings.trackers if ranks.is_first else (),
        lambda: about_run(folder, job, plan, settings, data),
        partial(console.print, markup=False, highlight=False, soft_wrap=True),
    ) as tracking:
        code, row = _train_to_row(
            job,
            plan,
            settings,
            data,
            folder,
            console,
            stop,
            ranks,
            guard,
            expected,
            parent,
            tracking.trackers,
        )
        if row is not None:
            tracking.row = row.model_dump(mode="json", exclude={"resolved_recipe"})
    return code, row


def _train_to_row(
    job: Job,
    plan: Plan,
    settings: Settings,
    data,
    folder: Path,
    console: Console,
    stop: StopRequest,
    ranks: Ranks,
    guard: Guard,
    expected: ExpectedCurve | None,
    parent: Mapping[str, str | None],
    trackers: Sequence[Tracker],
) -> tuple[int, Row | None]:
    outcome = train_in_folder(
        plan, settings, data, folder, console, stop, ranks, guard, expected, trackers
    )
    if outcome.status == "stopped":
        if not ranks.any(outcome.run.saver.error is not None):
            return (EXIT_FAILED if outcome.run.is_off_track else EXIT_STOPPED), None
        if ranks.is_first:
            missing = rescued(
                outcome, outcome.run.unsaved, lambda to: _write_stopped(to, job, plan, outcome)
            )
            _say_unwritten(console, missing)
        return EXIT_UNWRITTEN, None
    done = EXIT_FAILED if outcome.run.is_off_track else EXIT_DONE
    if not ranks.is_first:
        return (done if outcome.status == "finished" else EXIT_DIVERGED), None
    row, missing = end_run(
        outcome,
        lambda to: _write_end(to, job, plan, settings, data, outcome, parent),
        lambda row: _store(settings.results, row, folder, console),
        row_path(settings.results, folder.name),
        lambda: stop.is_requested,
    )
    if missing:
        _say_unwritten(console, missing)
        return EXIT_UNWRITTEN, row
    assert row is not None
    return (done if row.status == "finished" else EXIT_DIVERGED), row


def _say_unwritten(console: Console, missing: str) -> None:
    console.print(
        f"error: {missing}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )


def _expected(
    job: Job, plan: Plan, settings: Settings, data, console: Console
) -> ExpectedCurve | None:
    """What a run's evaluations are compared with, said in one line. Raises UserError."""

    def plan_of_recipe(recipe: str) -> Plan:
        start = {
            label: value
            for label, value in overrides_of(job.overrides).items()
            if label.startswith("model.pretrained")
        }
        return plan_of(dataclasses.replace(job, recipe=recipe, overrides=as_text(start)))

    asked = settings.expect, bool(settings.stop_if)
    curve, line = expected_curve(settings.results, plan, data, *asked, plan_of_recipe)
    if line:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return curve


def _write_end(
    folder: Path,
    job: Job,
    plan: Plan,
    settings: Settings,
    data,
    outcome,
    parent: Mapping[str, str | None],
) -> Row:
    """Write all that a run ends with into its folder, or into one that takes its place. Raises
    OSError.
    """
    _write_stopped(folder, job, plan, outcome)
    digest = (
        export_model(folder, plan, outcome.state, data.classes)
        if outcome.status == "finished"
        else None
    )
    row = make_row(outcome.run.folder.name, plan, settings, data, outcome, digest)
    more = {
        "ablation": job.ablation,
        "cell": job.cell,
        "best_epoch": best_epoch(outcome.run.folder, outcome.run.curve) if settings.keep else None,
        "curves_incomplete": outcome.run.curves_incomplete,
        "test_sizes": size_scores(outcome.state),
        **parent,
        **pace_of(outcome.run.folder / "speed.jsonl", plan),
    }
    row = row.model_copy(update=more)
    write_atomically(folder / "row.json", row.as_json())
    return row


def _write_stopped(folder: Path, job: Job, plan: Plan, outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "plan.json").exists():
        write_plan(folder, job, plan, settings=outcome.run.settings)
    write_curves(outcome, folder)


def _store(results: Path, row: Row, folder: Path, console: Console) -> None:
    if not touches_result(row.injected):
        store_row(results, row)
        return
    console.print(
        f"the row stays out of the store: inject={','.join(row.injected)}; it is"
        f" {folder / 'row.json'}",
        style="yellow",
        markup=False,
    )


def run_name(job: Job, plan: Plan, settings: Settings, fingerprint: str) -> str:
    """The plan's own name; with `again`, the first of name-2, name-3 ... that has no row."""
    name = plan.run_name(fingerprint)
    if not job.again or read_row(settings.results, name) is None:
        return name
    number = 2
    while read_row(settings.results, f"{name}-{number}") is not None:
        number += 1
    return f"{name}-{number}"
