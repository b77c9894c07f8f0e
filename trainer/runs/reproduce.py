"""A row run again from its own record, and what came of it: the same bits, within what seeds do, or something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from trainer.ablation.cells import row_key
from trainer.base import provenance
from trainer.base import stats as comparisons
from trainer.base.errors import UserError
from trainer.base.signals import StopRequest
from trainer.engine.settings import Settings
from trainer.recipe import check
from trainer.recipe.adapt import adaptation
from trainer.recipe.load import parse
from trainer.recipe.overrides import Deviation
from trainer.recipe.plan import BAD_IMAGES, Plan, make_plan
from trainer.recipe.profiles import Profile, data_folder, find_profile
from trainer.recipe.schema import Recipe, apply_overrides, find_recipe, load_recipe
from trainer.recipe.tree import plain
from trainer.runs.job import Job, run_job
from trainer.runs.results import RERUN_SUFFIX, Row, RowDeviation
from trainer.runs.run_folder import recipe_of

_MOST_TRIES = 500  # orders of added augmentations: a row tells what was added, not where


class ReproduceError(UserError):
    """A row whose record does not lead back to its run."""


@dataclass(frozen=True)
class Again:
    """What will run. reasons: why it may not be the row's run after all; none where page, plan and versions are its own."""

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
        return self.kind != "different"


def plan_again(
    row: Row, runs: Path, recipe: str = "", data: str = "", data_dir: Path | None = None
) -> Again:
    """The plan of a row, from its page and its deviations; held against the row's own name, a digest over all of it.

    recipe, data: where the page and the images are now, if not under the names that the row has. Its run folder, where
    it is on this machine, says where the images were.

    Raises UserError where there is no such page or data set.
    """
    facts = _facts(runs / row.run)
    data = data or facts.get("data") or row.data
    where = data_dir or (Path(facts["data_dir"]) if facts.get("data_dir") else None)
    name = recipe or f"{row.recipe}.v{row.version}"
    page = load_recipe(find_recipe(name)).for_model(row.model)
    plans = itertools.islice(_plans(row, page, find_profile(data, where)), _MOST_TRIES)
    first = next(plans)
    plan = next((plan for plan in itertools.chain([first], plans) if _is_of(plan, row)), first)
    job = Job(name, row.model, data, where, row.seed, bad_images=plan.bad_images, again=True)
    return Again(job, plan, tuple(_reasons(row, plan)))


def _facts(folder: Path) -> dict:
    return recipe_of(folder)[1] if (folder / "plan.json").exists() else {}


def _is_of(plan: Plan, row: Row) -> bool:
    """Does the plan lead to the row's own name?"""
    return plan.run_name(row.data_fingerprint) == RERUN_SUFFIX.sub("", row.run)


def _reasons(row: Row, plan: Plan) -> Iterator[str]:
    if plan.page_digest != row.digest:
        yield f"the page {row.recipe}.v{row.version} has the digest {plan.page_digest} now, the row's had {row.digest}"
    elif not _is_of(plan, row):
        yield (
            f"page and deviations lead to {plan.run_name(row.data_fingerprint)} now: the row's text does not tell all of its "
            f"plan; make recipe=runs/{row.run}/recipe.yaml does, where that folder is"
        )
    now = provenance.versions()
    for name in sorted(set(now) | set(row.versions)):
        if now.get(name) != row.versions.get(name):
            yield f"{name} is {now.get(name, 'not here')}, the row's was {row.versions.get(name, 'not told')}"


def data_reasons(row: Row, fingerprint: str) -> tuple[str, ...]:
    """Why the images opened are not the row's; none where they are."""
    if fingerprint == row.data_fingerprint:
        return ()
    return (
        f"the images have the fingerprint {fingerprint[:12]}, the row's had {row.data_fingerprint[:12]}",
    )


def _refusal(row: Row, reasons: Sequence[str]) -> ReproduceError:
    return ReproduceError(
        f"row={row.run}: {'; '.join(reasons)}; anyway=1 would run it nevertheless"
    )


def _plans(row: Row, page: Recipe, profile: Profile) -> Iterator[Plan]:
    """Every plan that the record may mean, on the road of job.resolve: the file's own departures, profile, set=."""
    changes = {
        origin: [change for change in row.deviations if change.origin == origin]
        for origin in ("file", "profile", "set")
    }
    for written, first in _applied(page, changes["file"], "file"):
        is_adapted = (
            bool(changes["file"]) and not changes["profile"]
        )  # a run folder's recipe.yaml is so already
        adapted, second = (
            (written, ())
            if is_adapted
            else apply_overrides(written, adaptation(written, profile), "profile")
        )
        adapted = adapted.model_copy(update={"adapted_to": profile.name})
        for recipe, third in _applied(adapted, changes["set"], "set"):
            for bad_images in BAD_IMAGES:
                yield make_plan(
                    recipe,
                    row.model,
                    profile,
                    row.seed,
                    page.digest,
                    first + second + third,
                    bad_images=bad_images,
                )


def _applied(
    recipe: Recipe, changes: Sequence[RowDeviation], origin: str
) -> Iterator[tuple[Recipe, tuple[Deviation, ...]]]:
    """A recipe with a record's departures, once for every order that it takes.

    Raises UserError where it takes none.
    """
    refused, num_taken = None, 0
    for values in _overrides(recipe, changes):
        try:
            result = apply_overrides(recipe, values, origin)
        except UserError as error:
            refused = refused or error
        else:
            num_taken += 1
            yield result
    if refused and not num_taken:
        raise refused


def _overrides(recipe: Recipe, changes: Sequence[RowDeviation]) -> Iterator[dict[str, Any]]:
    """The values that a row's texts mean, by path; for parts added to a list, with each order that they may have.

    An ingredient with another name is set as a whole: its changes tell all of it, and a new name alone keeps keys.
    """
    page, values, added = plain(recipe), {}, {}
    renamed = [
        change.path.removesuffix(".name") for change in changes if change.path.endswith(".name")
    ]
    for change in changes:
        value = (
            None
            if change.after == "off"
            else parse(change.after, change.path, reads_bare_exponents=True)[0]
        )
        whole = next(
            (section for section in renamed if change.path.startswith(f"{section}.")), None
        )
        section, _, name = change.path.rpartition(".")
        if whole is not None:
            before = values.get(whole) or check.value_at(page, tuple(whole.split(".")))
            values[whole] = _with(before, change.path.removeprefix(f"{whole}.").split("."), value)
        elif isinstance(page.get(section), tuple) and name not in [
            item.get("name") for item in page[section]
        ]:
            added.setdefault(section, []).append(value)
        else:
            values[change.path] = value
    for lists in itertools.product(
        *(_orders(page[section], items) for section, items in added.items())
    ):
        yield dict(zip(added, lists, strict=True)) | values


def _with(section: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A section with another value under some keys; None takes it out."""
    first, *others = keys
    inner = _with(section.get(first) or {}, others, value) if others else value
    return {key: part for key, part in {**section, first: inner}.items() if part is not None}


def _orders(items: tuple, added: Iterable) -> Iterator[tuple]:
    """The list with the parts added, at the end first."""
    first, *others = added
    for place in reversed(range(len(items) + 1)):
        longer = (*items[:place], first, *items[place:])
        if others:
            yield from _orders(longer, others)
        else:
            yield longer


def same_cell(row: Row, rows: Iterable[Row]) -> dict[int, float]:
    """Top-1 of all first runs of the row's cell, by seed: the same in all but the seed."""
    key = row_key(row)
    return {
        other.seed: other.top1_pct
        for other in rows
        if other.top1_pct is not None
        and not RERUN_SUFFIX.search(other.run)
        and row_key(other.model_copy(update={"seed": row.seed})) == key
    }


def verdict(row: Row, again: Row, seeds: dict[int, float]) -> Verdict:
    """What a rerun says. seeds: top-1 of the row's cell by seed, its own included, as same_cell gives them."""
    if row.status == again.status == "diverged":
        return Verdict(
            "diverged again", (f"diverged after {row.steps} steps then, after {again.steps} now",)
        )
    if row.status != again.status or row.top1_pct is None or again.top1_pct is None:
        return Verdict("different", (f"{row.status} then, {again.status} now",))
    change = again.top1_pct - row.top1_pct
    lines = [f"top-1 {row.top1_pct:.4f} % then, {again.top1_pct:.4f} % now: {change:+.4f} points"]
    if row.weights_sha256 == again.weights_sha256 and change == 0:
        return Verdict("bit-identical", (*lines, f"weights {row.weights_sha256}, both"))
    lines += [
        f"weights {(row.weights_sha256 or 'none')[:12]} then, {(again.weights_sha256 or 'none')[:12]} now",
        *_unlike(row, again),
    ]
    reach = comparisons.next_value_range(list(seeds.values()))
    if reach is None:
        lines.append(
            f"{len(seeds)} seed of this cell in the store with a score: what a seed moves is not known; other seeds tell"
        )
        return Verdict("different", tuple(lines))
    is_within = reach[0] <= again.top1_pct <= reach[1]
    std = comparisons.std_of(list(seeds.values()))
    lines.append(
        f"{len(seeds)} seeds of this cell: standard deviation {std:.2f} points; one more would lie in {reach[0]:.2f} .. "
        f"{reach[1]:.2f} % with 95 %: this one does{'' if is_within else ' not'}"
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
        ("commit", "commit"),
    ):
        then, now = getattr(row, of), getattr(again, of)
        if then != now:
            yield f"{name} {then} then, {now} now"
    if not (row.bitwise and again.bitwise):
        yield "on such a device sums are not the same bits from run to run"


def run_again(
    row: Row, again: Again, settings: Settings, console: Console, stop: StopRequest, anyway: bool
) -> tuple[int, Row | None]:
    """Run a row's plan into a run of its own, on as many threads as it had: (exit code, row or None where it was stopped).

    Raises ReproduceError where page, plan, versions or images are not the row's and `anyway` is not said.
    """
    import torch

    from trainer.data.dataset import open_data
    from trainer.data.ffcv.beton import chosen_loader
    from trainer.runs import summary as show

    if again.reasons and not anyway:
        raise _refusal(row, again.reasons)
    folder = data_folder(again.job.data, again.job.data_dir)
    loader = chosen_loader(row.loader, folder) if row.loader in ("ffcv", "pil") else settings.loader
    data = open_data(again.plan.profile, folder, in_beton=loader == "ffcv")
    settings = replace(settings, loader=loader, compile=row.compiled)
    reasons = again.reasons + data_reasons(row, data.fingerprint)
    if reasons and not anyway:
        raise _refusal(row, reasons)
    for reason in reasons:
        console.print(f"anyway: {reason}", style="yellow", markup=False)
    torch.set_num_threads(row.num_threads)
    settings = replace(settings, num_threads=row.num_threads)
    show.plan_in_brief(console, again.plan, settings, show.surgery(again.plan))
    return run_job(again.job, again.plan, settings, data, console, stop)
