"""A row run again from its own record, and what came of it: the same bits, within what seeds do, or
something else.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from trainer.base import provenance
from trainer.base import stats as comparisons
from trainer.base.commands import command
from trainer.base.errors import ConfigError, UserError
from trainer.base.memory import keep_freed_memory
from trainer.base.plugins import reasons_against
from trainer.base.settings import Settings
from trainer.base.signals import StopRequest
from trainer.data.content import differ
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.profile import data_folder, find_profile
from trainer.recipe import tree
from trainer.recipe.check import check
from trainer.recipe.identity import is_repetition
from trainer.recipe.load import parse
from trainer.recipe.overrides import Deviation
from trainer.recipe.plan import BAD_IMAGES, Plan, make_plan
from trainer.recipe.schema import Recipe, apply_overrides
from trainer.runs import summary as show
from trainer.runs.job import Job, resolve, run_job, with_content
from trainer.runs.results import FOUND_ORIGINS, Row
from trainer.runs.run_folder import recipe_of
from trainer.tasks.teacher import open_teacher


class ReproduceError(UserError):
    """A row whose record does not lead back to its run."""


@dataclass(frozen=True)
class Rerun:
    """What will run. reasons: why it may not be the row's run after all; none where recipe, images
    and versions are its own.
    """

    job: Job
    plan: Plan
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What a run says about the row that it repeats. lines: the numbers, for a reader."""

    kind: Literal["bit-identical", "within the seed spread", "diverged again", "different"]
    lines: tuple[str, ...]

    @property
    def is_reproduced(self) -> bool:
        """Has the row's result come again: its bits, its seeds' spread, or its divergence?"""
        return self.kind != "different"


def plan_again(
    row: Row, runs: Path, recipe: str = "", data: str = "", data_dir: Path | None = None
) -> Rerun:
    """The plan of a row: its resolved recipe on its data, held against the row's own name, a digest
    over all of it.

    data: where the images are now, if not under the name that the row has; its run folder, where it
    is on this machine, says where they were. A row of the first edition has no recipe: that of its
    run folder is taken, or else the recipe, `recipe` where it is not under the row's name, with the
    row's own overrides.

    Raises UserError where there is no such recipe or data set, or the row's recipe is none.
    """
    folder = runs / row.run
    left, facts = recipe_of(folder) if (folder / "plan.json").exists() else (None, {})
    data = data or facts.get("data") or row.data
    where = data_dir or (Path(facts["data_dir"]) if facts.get("data_dir") else None)
    name = recipe or f"{row.recipe}.v{row.version}"
    if row.resolved_recipe is not None:
        resolved = _recorded(row)
    else:
        resolved = left or _from_page(row, Job(name, row.model, data, where))
    told = tuple(
        Deviation(**change.model_dump())
        for change in row.deviations
        if change.origin not in FOUND_ORIGINS
    )
    profile, known = find_profile(data, where), row.bad_images or facts.get("bad_images")
    plans = [
        make_plan(
            resolved,
            row.model,
            profile,
            row.seed,
            row.digest,
            told,
            bad_images=bad_images,
            plugins=row.plugins,
        )
        for bad_images in ([known] if known else BAD_IMAGES)
    ]
    plan = next((plan for plan in plans if plan.identity.is_of(row)), plans[0])
    job = Job(name, row.model, data, where, row.seed, bad_images=plan.bad_images, again=True)
    return Rerun(job, plan, tuple(_reasons(row, plan)))


def _recorded(row: Row) -> Recipe:
    """The recipe that a row holds. Raises ReproduceError where it is none of this version."""
    try:
        return check(Recipe, tree.from_json(row.resolved_recipe))
    except ConfigError as error:
        raise ReproduceError(f"row={row.run}: its resolved recipe: {error}") from None


def _from_page(row: Row, job: Job) -> Recipe:
    """A row of the first edition: its recipe with the texts of its overrides, which may have been
    rounded.

    What another component lacks need not be turned off; what was added to the augmentations comes
    last.
    """
    changes = {change.path: change.after for change in row.deviations if change.origin == "set"}
    renamed = [path.removesuffix("name") for path in changes if path.endswith(".name")]
    off = [
        path for path, text in changes.items() if text == "off" and path.startswith(tuple(renamed))
    ]
    values: dict[str, Any] = {
        path: None if text == "off" else parse(text, path)[0]
        for path, text in changes.items()
        if path not in off
    }
    recipe = resolve(job, find_profile(job.data, job.data_dir))[2]
    there = {f"augment.{part.name}" for part in recipe.augment}
    added = [
        values.pop(path)
        for path in list(values)
        if re.fullmatch(r"augment\.\w+", path) and path not in there
    ]
    if added:
        recipe, _ = apply_overrides(
            recipe, {"augment": (*tree.plain(recipe)["augment"], *added)}, "set"
        )
    recipe, _ = apply_overrides(recipe, values, "set")
    for path, value in itertools.product(off, (None, ())):  # a list that is off is empty
        with contextlib.suppress(UserError):
            recipe, _ = apply_overrides(recipe, {path: value}, "set")
    return recipe


def _reasons(row: Row, plan: Plan) -> Iterator[str]:
    if not plan.identity.is_of(row):
        now = plan.run_name(row.data_fingerprint)
        yield (
            f"its record leads to {now} now, a run of another recipe or of another profile of the"
            " data"
            if row.resolved_recipe is not None
            else (
                "this row was stored before rows held their recipe; the recipe file and its"
                f" overrides lead to {now} now; "
                f"{command(recipe=f'runs/{row.run}/recipe.yaml')}, where that folder is, runs it"
            )
        )
    yield from reasons_against(row.plugins)
    now = provenance.versions()
    for name in sorted(set(now) | set(row.versions)):
        if now.get(name) != row.versions.get(name):
            yield (
                f"{name} is {now.get(name, 'not here')}, the row's was"
                f" {row.versions.get(name, 'not recorded')}"
            )


def data_reasons(row: Row, data: OpenedData) -> tuple[str, ...]:
    """Why the images opened are not the row's; none where they are."""
    for kind, then, now in (
        ("fingerprint", row.data_fingerprint, data.fingerprint),
        ("content", row.content_sha256, data.content_sha256),
    ):
        if differ(then, now):
            return (f"the images have the {kind} {now[:12]}, the row's had {then[:12]}",)
    return ()


def check_plugins(row: Row) -> None:
    """Refuse plugins that are not the row's, before they are missed as an unknown component. Raises
    ReproduceError.
    """
    if reasons := reasons_against(row.plugins):
        raise _refusal(row, reasons)


def _refusal(row: Row, reasons: Sequence[str]) -> ReproduceError:
    return ReproduceError(
        f"row={row.run}: {'; '.join(reasons)}; anyway=1 would run it nevertheless"
    )


def same_cell(plan: Plan, rows: Iterable[Row]) -> dict[int, float]:
    """The main score of all first runs of the plan's cell, by seed, the same in all but that."""
    return {
        row.seed: row.main_pct
        for row in rows
        if row.main_pct is not None
        and not is_repetition(row.run)
        and replace(plan, seed=row.seed).identity.is_of(row)
    }


def verdict(row: Row, again: Row, seeds: dict[int, float]) -> Verdict:
    """What a rerun says. seeds: the main scores of the row's cell by seed, its own included, as
    same_cell gives them.
    """
    if row.status == again.status == "diverged":
        return Verdict(
            "diverged again", (f"diverged after {row.steps} steps then, after {again.steps} now",)
        )
    if row.status != again.status or row.main_pct is None or again.main_pct is None:
        return Verdict("different", (f"{row.status} then, {again.status} now",))
    change = again.main_pct - row.main_pct
    both = f"{row.main_pct:.4f} % then, {again.main_pct:.4f} % now"
    lines = [f"{row.main_label} {both}: {change:+.4f} points"]
    if row.weights_sha256 == again.weights_sha256 and change == 0:
        return Verdict("bit-identical", (*lines, f"weights {row.weights_sha256}, both"))
    lines += [
        (
            f"weights {(row.weights_sha256 or 'none')[:12]} then,"
            f" {(again.weights_sha256 or 'none')[:12]} now"
        ),
        *_unlike(row, again),
    ]
    reach = comparisons.next_value_range(list(seeds.values()))
    if reach is None:
        lines.append(
            f"{len(seeds)} seed of this cell in the store with a score: the spread over seeds is"
            " unknown; run other seeds"
        )
        return Verdict("different", tuple(lines))
    is_within = reach[0] <= again.main_pct <= reach[1]
    std = comparisons.std_of(list(seeds.values()))
    lines.append(
        f"{len(seeds)} seeds of this cell: standard deviation {std:.2f} points; one more would lie"
        f" in {reach[0]:.2f} .. {reach[1]:.2f} % with 95 %: this one"
        f" does{'' if is_within else ' not'}"
    )
    return Verdict("within the seed spread" if is_within else "different", tuple(lines))


def _unlike(row: Row, again: Row) -> Iterator[str]:
    """What may have moved the bits."""
    for name, of in (
        ("device", "device"),
        ("precision", "precision"),
        ("threads", "num_threads"),
        ("ranks", "world_size"),
        ("loader", "loader"),
        ("compiled", "compiled"),
        ("compile mode", "compile_mode"),
        ("CUDA graphs", "cuda_graphs"),
        ("half group norm", "half_group_norm"),
        ("commit", "commit"),
    ):
        then, now = getattr(row, of), getattr(again, of)
        if then != now:
            yield f"{name} {then} then, {now} now"
    if not (row.bitwise and again.bitwise):
        yield "on such a device sums are not the same bits from run to run"


def run_again(
    row: Row, again: Rerun, settings: Settings, console: Console, stop: StopRequest, anyway: bool
) -> tuple[int, Row | None]:
    """Run a row's plan into a run of its own, on as many threads as it had: (exit code, row or None
    where it was stopped).

    Raises ReproduceError where recipe, versions or images are not the row's and `anyway` is not
    said.
    """
    if again.reasons and not anyway:
        raise _refusal(row, again.reasons)
    folder = data_folder(again.job.data, again.job.data_dir)
    loader = chosen_loader(row.loader, folder) if row.loader in ("ffcv", "pil") else settings.loader
    data = open_data(again.plan.profile, folder, in_beton=loader == "ffcv")
    data = with_content(data, console, stop)
    settings = replace(
        settings,
        loader=loader,
        compile=row.compiled,
        compile_mode=row.compile_mode,
        cuda_graphs=row.cuda_graphs and settings.device != "cpu",
        half_group_norm=row.half_group_norm,
        test_px=tuple(scores.test_px for scores in row.test_sizes),
    )
    reasons = again.reasons + data_reasons(row, data)
    if reasons and not anyway:
        raise _refusal(row, reasons)
    for reason in reasons:
        console.print(f"anyway: {reason}", style="yellow", markup=False)
    torch.set_num_threads(row.num_threads)
    keep_freed_memory()
    settings = replace(settings, num_threads=row.num_threads)
    plan = again.plan
    show.plan_in_brief(console, plan, settings, show.module_replacements(plan), open_teacher(plan))
    show.changed_images(console, data)
    return run_job(again.job, again.plan, settings, data, console, stop)
