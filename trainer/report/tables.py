"""One ablation as one typed table: what was found for each cell, against its base, and what must be said about it.

Everything that is printed, stored or drawn is made from `Table`. It is a pure function of the page, the rows and, for
cells without a row, the failures: no clock, no data set, no device.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.ablation.cells import Cell, command
from trainer.ablation.questions import Question
from trainer.base import stats as comparisons
from trainer.base.errors import UserError, did_you_mean
from trainer.base.stats import Difference
from trainer.runs.results import Row

State = Literal["finished", "diverged", "failed", "missing", "no value"]


@dataclass(frozen=True)
class Metric:
    """What a table is about. digits: behind the point, of means and differences alike."""

    name: str
    label: str
    unit: str
    digits: int

    @property
    def is_share(self) -> bool:
        """Is it a share of the val images, so that their number says how far it can be trusted?"""
        return self.unit == "%"

    @property
    def heading(self) -> str:
        return f"{self.label} {self.unit}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", "top-1", "%", 2),
        Metric("top5", "top-5", "%", 2),
        Metric("loss", "loss", "nats", 4),
        Metric("ema", "top-1 of the average", "%", 2),
    )
}


@dataclass(frozen=True)
class SeedResult:
    """One seed of a cell: its value, or why there is none.

    state: "missing" has no row; "failed" has none either, and error is what its last attempt said; "no value" has
    finished, but without such a score. folder: of the run, where it is on this machine (curves: metrics.jsonl in it).
    command: what runs this seed of the cell.
    """

    seed: int
    state: State
    value: float | None
    row: Row | None
    error: str
    command: str
    folder: Path | None

    @property
    def reproduce(self) -> str:
        """The command that runs the row again from its own record; empty where there is no row."""
        return f"make reproduce row={shlex.quote(self.row.run)}" if self.row else ""


@dataclass(frozen=True)
class Costs:
    """Means over the finished seeds; num_params and gmacs are the same in all of them."""

    train_s: float
    images_per_s: float
    peak_mem_mib: float
    num_params: int
    gmacs: float


@dataclass(frozen=True)
class Needed:
    """How many seeds in each cell would show the difference found: two-sided 5 %, 80 % power.

    num_seeds: None is more than MOST_SEEDS. std: what it was reckoned with; origin: whose that is: of this difference
    ("measured"), of the other cells of its group ("pooled"), or RSB's, scaled to this val set ("published").
    """

    num_seeds: int | None
    std: float
    origin: Literal["measured", "pooled", "published"]


@dataclass(frozen=True)
class CellSummary:
    """One line of the table.

    mean, std (n - 1): over the seeds that have a value, and over no others. difference: to the base of the group,
    None for the base itself. p_holm: corrected for all differences of the table. marks: all that the numbers hide.
    """

    cell: Cell
    seeds: tuple[SeedResult, ...]
    mean: float | None
    std: float | None
    difference: Difference | None
    p_holm: float | None
    needed: Needed | None
    costs: Costs | None
    marks: tuple[str, ...]

    @property
    def values(self) -> dict[int, float]:
        """The values that there are, by seed."""
        return {one.seed: one.value for one in self.seeds if one.value is not None}

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(one.row for one in self.seeds if one.row)


@dataclass(frozen=True)
class Table:
    """One ablation. source: where its question is from. cells: in the order of the page. notes: the user's own words
    about it, Markdown.

    bases: what the differences are taken against, one per group. num_compared: how many differences have a p, that is,
    what Holm's correction corrects for. Both are of all cells, also where a view shows only some.
    """

    name: str
    title: str
    question: str
    source: str
    notes: str
    seeds: tuple[int, ...]
    metric: Metric
    cells: tuple[CellSummary, ...]
    bases: tuple[str, ...]
    num_compared: int

    @property
    def groups(self) -> dict[str, tuple[CellSummary, ...]]:
        """The cells that are compared with each other, by the name of their group."""
        names = dict.fromkeys(one.cell.group for one in self.cells)
        return {name: tuple(one for one in self.cells if one.cell.group == name) for name in names}


def find_metric(name: str) -> Metric:
    """The metric of a name. Raises UserError for an unknown one."""
    if name not in METRICS:
        raise UserError(
            f"metric={name}: unknown{did_you_mean(name, METRICS)}; valid: {', '.join(METRICS)}"
        )
    return METRICS[name]


def value_of(row: Row, metric: Metric) -> float | None:
    """A row's score; None where it has none: diverged, no average kept, no finite number."""
    if row.status != "finished":
        return None
    average_pct = row.top1_pct if row.scored == "average" else row.other_top1_pct
    found = {"top1": row.top1_pct, "top5": row.top5_pct, "loss": row.loss_nats, "ema": average_pct}[
        metric.name
    ]
    return found if found is not None and math.isfinite(found) else None


def summarize(
    question: Question,
    rows: Mapping[tuple[str, int], Row | None],
    metric: Metric,
    error_of: Callable[[Cell, int], str | None] = lambda cell, seed: None,
    runs: Path | None = None,
    notes: str = "",
) -> Table:
    """The table of an ablation.

    rows: by cell's name and seed. error_of: what a failed seed of a cell said last, asked only where there is no row.
    runs: the folder of run folders, where there is one.
    """
    cells = []
    for cell in question.cells:
        seeds = tuple(
            _seed_result(cell, seed, rows.get((cell.name, seed)), metric, error_of, runs)
            for seed in question.seeds
        )
        cells.append(_alone(cell, seeds))
    compared = [
        _against_base(one, [other for other in cells if other.cell.group == one.cell.group], metric)
        for one in cells
    ]
    ps = comparisons.holm([one.difference.p if one.difference else None for one in compared])
    marked = tuple(
        replace(one, p_holm=p, marks=_marks(one)) for one, p in zip(compared, ps, strict=True)
    )
    bases = tuple(one.cell.name for one in marked if one.cell.is_base)
    head = question.name, question.title, question.question, question.source, notes, question.seeds
    return Table(*head, metric, marked, bases, num_compared=sum(p is not None for p in ps))


def _seed_result(cell, seed, row, metric, error_of, runs) -> SeedResult:
    error = error_of(cell, seed) if row is None else None
    value = value_of(row, metric) if row else None
    if row is None:
        state: State = "missing" if error is None else "failed"
    elif row.status == "diverged":
        state = "diverged"
    else:
        state = "finished" if value is not None else "no value"
    folder = runs / row.run if runs and row and (runs / row.run).is_dir() else None
    return SeedResult(seed, state, value, row, error or "", command(cell, seed), folder)


def _alone(cell: Cell, seeds: tuple[SeedResult, ...]) -> CellSummary:
    """What a cell says by itself."""
    values = [one.value for one in seeds if one.value is not None]
    rows = [one.row for one in seeds if one.row and one.row.status == "finished"]
    mean, std = comparisons.mean_of(values), comparisons.std_of(values)
    return CellSummary(cell, seeds, mean, std, None, None, None, _costs(rows), ())


def _costs(rows: Sequence[Row]) -> Costs | None:
    if not rows:
        return None
    means = [
        comparisons.mean_of([getattr(row, key) for row in rows])
        for key in ("train_s", "images_per_s", "peak_mem_mib")
    ]
    return Costs(*means, rows[0].num_params, rows[0].gmacs)


def _against_base(one: CellSummary, group: Sequence[CellSummary], metric: Metric) -> CellSummary:
    """A cell with its difference to the base of its group."""
    bases = [other for other in group if other.cell.is_base]
    if one.cell.is_base or not bases:
        return one
    difference = comparisons.compare(one.values, bases[0].values)
    needed = _needed(difference, group, metric) if difference else None
    return replace(one, difference=difference, needed=needed)


def _needed(difference: Difference, group: Sequence[CellSummary], metric: Metric) -> Needed | None:
    """The seeds that a difference needs, by the best spread there is; None where none is known, or nothing differs."""
    is_paired = difference.kind == "paired"
    std, origin = difference.std, "measured"
    if std is None and difference.kind == "single":
        std, origin = (
            comparisons.pooled_std([list(other.values.values()) for other in group]),
            "pooled",
        )
    if std is None and difference.kind == "single" and metric.name == "top1":
        num_images = next(row.num_val_images for other in group for row in other.rows)
        std, origin = comparisons.published_spread_pct(num_images), "published"
    if not std or not difference.value:
        return None
    return Needed(comparisons.seeds_needed(difference.value, std, is_paired), std, origin)


def _marks(one: CellSummary) -> tuple[str, ...]:
    """What a reader of the numbers must know: seeds without a value, one value alone, values that do not vary."""
    marks = []
    for state, words in (
        ("failed", "failed"),
        ("missing", "no row"),
        ("diverged", "diverged"),
        ("no value", "no such score"),
    ):
        seeds = [str(result.seed) for result in one.seeds if result.state == state]
        if seeds:
            marks.append(
                f"{words}: {'all' if len(seeds) == len(one.seeds) > 1 else 'seed ' + ', '.join(seeds)}"
            )
    num_values = len(one.values)
    if num_values == 1:
        marks.append("n = 1")
    if one.std == 0:
        marks.append("all values equal")
    difference = one.difference
    if difference and difference.kind == "paired" and difference.num_pairs < num_values:
        marks.append(f"difference over the {difference.num_pairs} seeds that the base has too")
    if difference and difference.kind == "welch":
        marks.append("Welch: no two seeds in common with the base")
    if difference and difference.kind != "single" and difference.p is None:
        marks.append("difference does not vary: no interval")
    return tuple(marks)
