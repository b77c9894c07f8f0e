"""An ablation as one typed table: scores, differences to the base, costs and caveats.

Everything that is printed, stored or drawn is made from `Table`. It is a pure function of the
ablation file, the rows and, for cells without a row, the failures: no clock, no dataset, no device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.ablation.cells import Cell, command
from trainer.ablation.questions import Question
from trainer.base.commands import command as command_line
from trainer.base.errors import UserError, did_you_mean
from trainer.base.stats import (
    Difference,
    compare_cells,
    holm,
    mean_of,
    pooled_std,
    published_spread_pct,
    seeds_needed,
    std_of,
)
from trainer.runs.results import Row

State = Literal["finished", "diverged", "failed", "missing", "no value"]
Origin = Literal["measured", "pooled", "published"]
STATE_TEXTS: dict[State, str] = {
    "finished": "finished",
    "diverged": "diverged",
    "failed": "failed",
    "missing": "no row",
    "no value": "no such score",
}


@dataclass(frozen=True)
class Metric:
    """The score of a table. digits: after the decimal point, of means and differences alike."""

    name: str
    label: str
    unit: str
    digits: int

    @property
    def is_share(self) -> bool:
        """Is it a share of the val images, with a binomial standard error?"""
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

    state: "missing" has no row; "failed" has none either, and error is the message of its last
    attempt; "no value" finished without this score. folder: of the run, where it is on this machine
    (curves: its metrics.jsonl). command: the shell command that runs this cell with this seed.
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
        """The shell command that reruns the row from its record; empty without a row."""
        return command_line("reproduce", row=self.row.run) if self.row else ""


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
    """The seeds per cell that detect the observed difference (two-sided t-test, 5 %, power 80 %).

    num_seeds: None is more than MOST_SEEDS. std: the standard deviation assumed; origin: that of
    this difference ("measured"), of the other cells of the group ("pooled"), or RSB's scaled to
    this val set ("published").
    """

    num_seeds: int | None
    std: float
    origin: Origin


@dataclass(frozen=True)
class CellSummary:
    """One line of the table.

    mean, std (n - 1): over the seeds that have a value. difference: to the base of the group, None
    for the base itself. p_holm: corrected for all comparisons of the table. marks: caveats that the
    numbers do not show.
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
        """The scores by seed, of the seeds that have one."""
        return {result.seed: result.value for result in self.seeds if result.value is not None}

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(result.row for result in self.seeds if result.row)


@dataclass(frozen=True)
class Table:
    """One ablation.

    source: of its question. notes: the user's comments, Markdown. cells: in the order of the file.
    bases: names of the cells that differences are taken against, one per group. num_compared: how
    many differences have a p, the number that Holm's method corrects for. Both count all cells,
    also where a view shows only some.
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
        names = dict.fromkeys(summary.cell.group for summary in self.cells)
        return {
            name: tuple(summary for summary in self.cells if summary.cell.group == name)
            for name in names
        }


def find_metric(name: str) -> Metric:
    """The metric of a name. Raises UserError for an unknown one."""
    if name not in METRICS:
        raise UserError(
            f"metric={name}: unknown metric{did_you_mean(name, METRICS)}; "
            f"valid: {', '.join(METRICS)}"
        )
    return METRICS[name]


def value_of(row: Row, metric: Metric) -> float | None:
    """A row's score; None where it has none: diverged, no weight average kept, not finite."""
    if row.status != "finished":
        return None
    ema_top1_pct = row.top1_pct if row.scored == "average" else row.other_top1_pct
    scores = {
        "top1": row.top1_pct,
        "top5": row.top5_pct,
        "loss": row.loss_nats,
        "ema": ema_top1_pct,
    }
    value = scores[metric.name]
    return value if value is not None and math.isfinite(value) else None


def summarize(
    question: Question,
    rows: Mapping[tuple[str, int], Row | None],
    metric: Metric,
    error_of: Callable[[Cell, int], str | None] = lambda cell, seed: None,
    runs: Path | None = None,
    notes: str = "",
) -> Table:
    """The table of an ablation.

    rows: by cell name and seed. error_of: the last error message of a failed cell and seed, None
    where it has not failed; called only where there is no row. runs: the folder of run folders,
    where there is one.
    """
    cells = []
    for cell in question.cells:
        seeds = tuple(
            _seed_result(cell, seed, rows.get((cell.name, seed)), metric, error_of, runs)
            for seed in question.seeds
        )
        cells.append(_summary(cell, seeds))
    groups: dict[str, list[CellSummary]] = {}
    for summary in cells:
        groups.setdefault(summary.cell.group, []).append(summary)
    compared = [_against_base(summary, groups[summary.cell.group], metric) for summary in cells]
    ps = holm([summary.difference.p if summary.difference else None for summary in compared])
    marked = tuple(
        replace(summary, p_holm=p, marks=_marks(summary))
        for summary, p in zip(compared, ps, strict=True)
    )
    bases = tuple(summary.cell.name for summary in marked if summary.cell.is_base)
    return Table(
        question.name,
        question.title,
        question.question,
        question.source,
        notes,
        question.seeds,
        metric,
        marked,
        bases,
        num_compared=sum(p is not None for p in ps),
    )


def _seed_result(
    cell: Cell,
    seed: int,
    row: Row | None,
    metric: Metric,
    error_of: Callable[[Cell, int], str | None],
    runs: Path | None,
) -> SeedResult:
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


def _summary(cell: Cell, seeds: tuple[SeedResult, ...]) -> CellSummary:
    """A cell by itself, before it is compared with others."""
    values = [result.value for result in seeds if result.value is not None]
    rows = [result.row for result in seeds if result.row and result.row.status == "finished"]
    mean, std = mean_of(values), std_of(values)
    return CellSummary(cell, seeds, mean, std, None, None, None, _costs(rows), ())


def _costs(rows: Sequence[Row]) -> Costs | None:
    if not rows:
        return None
    return Costs(
        train_s=statistics.fmean(row.train_s for row in rows),
        images_per_s=statistics.fmean(row.images_per_s for row in rows),
        peak_mem_mib=statistics.fmean(row.peak_mem_mib for row in rows),
        num_params=rows[0].num_params,
        gmacs=rows[0].gmacs,
    )


def _against_base(
    summary: CellSummary, group: Sequence[CellSummary], metric: Metric
) -> CellSummary:
    """A cell with its difference to the base of its group."""
    bases = [other for other in group if other.cell.is_base]
    if summary.cell.is_base or not bases:
        return summary
    difference = compare_cells(summary.values, bases[0].values)
    needed = _needed(difference, group, metric) if difference else None
    return replace(summary, difference=difference, needed=needed)


def _needed(difference: Difference, group: Sequence[CellSummary], metric: Metric) -> Needed | None:
    """With the best standard deviation known: its own, else pooled, else published."""
    std = difference.std
    origin: Origin = "measured"
    if std is None and difference.kind == "single":
        std, origin = (pooled_std([list(other.values.values()) for other in group]), "pooled")
        if std is None and metric.name == "top1":
            num_images = next(row.num_val_images for other in group for row in other.rows)
            std, origin = published_spread_pct(num_images), "published"
    if not std or not difference.value:
        return None
    num_seeds = seeds_needed(difference.value, std, is_paired=difference.kind == "paired")
    return Needed(num_seeds, std, origin)


def _marks(summary: CellSummary) -> tuple[str, ...]:
    """Seeds without a value, n = 1, values that do not vary, a comparison over fewer seeds."""
    marks = []
    for state in ("failed", "missing", "diverged", "no value"):
        seeds = [str(result.seed) for result in summary.seeds if result.state == state]
        if seeds:
            is_all = len(seeds) == len(summary.seeds) > 1
            marks.append(f"{STATE_TEXTS[state]}: {'all' if is_all else 'seed ' + ', '.join(seeds)}")
    if len(summary.values) == 1:
        marks.append("n = 1")
    if summary.std == 0:
        marks.append("all values equal")
    difference = summary.difference
    if difference and difference.kind == "paired" and difference.num_pairs < len(summary.values):
        marks.append(f"paired over the {difference.num_pairs} seeds shared with the base")
    if difference and difference.kind == "welch":
        marks.append("Welch: fewer than two seeds shared with the base")
    if difference and difference.kind != "single" and difference.p is None:
        marks.append("difference does not vary: no interval")
    return tuple(marks)
