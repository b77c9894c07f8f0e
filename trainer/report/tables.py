"""An ablation as one typed table: scores, differences to the base, costs and caveats.

Everything that is printed, stored or drawn is made from `Table`. It is a pure function of the
ablation file, the rows and, for cells without a row, the failures: no clock, no dataset, no device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.ablation.cells import Cell, command
from trainer.ablation.questions import Question
from trainer.base.commands import command as command_line
from trainer.base.commands import quoted
from trainer.base.errors import UserError, did_you_mean
from trainer.base.plural import plural
from trainer.base.scores import CLASSIFICATION, score_label
from trainer.base.stats import (
    ALPHA,
    Difference,
    compare_cells,
    holm,
    mean_of,
    pool,
    pooled_std,
    published_spread_pct,
    seeds_needed,
    std_of,
)
from trainer.components.task import scores_of_tasks
from trainer.report.effects import FactorEffect, effects_of
from trainer.runs.results import Row

# of a standard deviation that seeds are planned by: that of two seeds may be 30 times too small
LEAST_DOF = 2
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
        """Such as `top-1 %`."""
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
    """Medians over the finished seeds; num_params and gmacs are the same in all of them.

    step_s: of the rows' own medians, or of the mean over the run in rows that have none (see
    num_without_steps). train_s and images_per_s are what all steps take and what one step makes of
    it. ranges: by field, the least and the most over the seeds; of a single row's train_s, where
    the middle half of its steps lies.
    """

    step_s: float
    train_s: float
    images_per_s: float
    peak_mem_mib: float
    num_params: int
    gmacs: float
    ranges: Mapping[str, tuple[float, float]]
    num_without_steps: int

    def range_of(self, field: str) -> tuple[float, float]:
        """(low, high) of a field; the value twice where it has no spread."""
        value = getattr(self, field)
        return self.ranges.get(field, (value, value))


@dataclass(frozen=True)
class Needed:
    """The seeds per cell that detect the table's smallest difference of interest with 80 % power,
    by a two-sided t-test at 5 % divided by the number of the table's comparisons.

    num_seeds: None is more than MOST_SEEDS. std: the standard deviation assumed; origin: that of
    this difference ("measured"), of the other cells of the group ("pooled"), or RSB's scaled to
    this val set ("published"). pooled_seeds, pooled_std: of a measured one, by the standard
    deviation that all differences of the group have together.
    """

    num_seeds: int | None
    std: float
    origin: Origin
    pooled_seeds: int | None = None
    pooled_std: float | None = None


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
        """Those of the seeds that have one."""
        return tuple(result.row for result in self.seeds if result.row)


@dataclass(frozen=True)
class Table:
    """One ablation.

    source: of its question. notes: the user's comments, Markdown. cells: in the order of the file.
    bases: names of the cells that differences are taken against, one per group. num_compared: how
    many differences have a p, the number that Holm's method corrects for and that the intervals
    hold for together. effects: of full designs, corrected among themselves. Bases, num_compared
    and effects are of all cells, also where a view shows only some. smallest: difference of
    interest, in points. word: what ablation= takes for it.
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
    effects: tuple[FactorEffect, ...]
    smallest: float
    word: str

    @property
    def score_label(self) -> str:
        """What the main score of its rows is called."""
        return next((row.main_label for one in self.cells for row in one.rows), "top-1")

    @property
    def groups(self) -> dict[str, tuple[CellSummary, ...]]:
        """The cells that are compared with each other, by the name of their group."""
        names = dict.fromkeys(summary.cell.group for summary in self.cells)
        return {
            name: tuple(summary for summary in self.cells if summary.cell.group == name)
            for name in names
        }


def find_metric(name: str) -> Metric:
    """The metric of a name: one of METRICS, or a score of a task ("mIoU" for mIoU_pct). Raises
    UserError for an unknown one.
    """
    if name in METRICS:
        return METRICS[name]
    known = METRICS | {
        score.removesuffix("_pct"): Metric(score.removesuffix("_pct"), score_label(score), "%", 2)
        for score in scores_of_tasks()  # which takes a second to import
    }
    if name not in known:
        raise UserError(
            f"metric={name}: unknown metric{did_you_mean(name, known)}; valid: {', '.join(known)}"
        )
    return known[name]


def _of_task(metric: Metric, rows: Iterable[Row | None]) -> Metric:
    """The metric by the name that rows of another task than classification have for it: top1 is
    their main score.
    """
    label = next((row.main_label for row in rows if row and row.task != CLASSIFICATION), None)
    if label is None or metric.name not in ("top1", "ema"):
        return metric
    return replace(metric, label=label if metric.name == "top1" else f"{label} of the average")


def value_of(row: Row, metric: Metric) -> float | None:
    """A row's score; None where it has none: diverged, no weight average kept, not finite."""
    if row.status != "finished":
        return None
    scores = {name.removesuffix("_pct"): one for name, one in row.percentages.items()} | {
        "top1": row.main_pct,
        "loss": row.loss_nats,
        "ema": row.main_pct if row.scored == "average" else row.other_top1_pct,
    }
    value = scores.get(metric.name)
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
    metric = _of_task(metric, rows.values())
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
    compared = [_against_base(summary, groups[summary.cell.group]) for summary in cells]
    ps = holm([summary.difference.p if summary.difference else None for summary in compared])
    num_compared = sum(p is not None for p in ps)
    tested = [
        replace(
            summary,
            p_holm=p,
            difference=summary.difference and summary.difference.simultaneous(num_compared),
        )
        for summary, p in zip(compared, ps, strict=True)
    ]
    if metric.is_share:
        tested = _with_needed(tested, question.smallest)
    marked = tuple(replace(summary, marks=_marks(summary, tested)) for summary in tested)
    return Table(
        question.name,
        question.title,
        question.question,
        question.source,
        notes,
        question.seeds,
        metric,
        marked,
        bases=tuple(summary.cell.name for summary in marked if summary.cell.is_base),
        num_compared=num_compared,
        effects=effects_of((summary.cell, summary.values) for summary in marked),
        smallest=question.smallest,
        word=quoted(question.word or question.name),
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
    steps_s = [step_seconds(row) for row in rows]
    step_s, num_steps = statistics.median(steps_s), rows[0].steps
    lasts = [num_steps * value for value in steps_s]
    if len(rows) == 1:
        half = (rows[0].step_spread_share or 0.0) / 2
        lasts = [lasts[0] * (1 - half), lasts[0] * (1 + half)]
    memory = [row.peak_mem_mib for row in rows]
    return Costs(
        step_s=step_s,
        train_s=num_steps * step_s,
        images_per_s=rows[0].batch_images / step_s if step_s else 0.0,
        peak_mem_mib=statistics.median(memory),
        num_params=rows[0].num_params,
        gmacs=rows[0].gmacs,
        ranges={
            "train_s": (min(lasts), max(lasts)),
            "peak_mem_mib": (min(memory), max(memory)),
        },
        num_without_steps=sum(row.step_s is None for row in rows),
    )


def step_seconds(row: Row) -> float:
    """The seconds of a row's steps: their median, or in a row that has none their mean."""
    return row.step_s if row.step_s is not None else row.train_s / max(1, row.steps)


def _against_base(summary: CellSummary, group: Sequence[CellSummary]) -> CellSummary:
    """A cell with its difference to the base of its group."""
    base = base_of(summary, group)
    if base is None or base is summary:
        return summary
    return replace(summary, difference=compare_cells(summary.values, base.values))


def base_of(summary: CellSummary, cells: Sequence[CellSummary]) -> CellSummary | None:
    """The base of a cell's group; None where there is none."""
    group = summary.cell.group
    return next((one for one in cells if one.cell.is_base and one.cell.group == group), None)


def _with_needed(cells: Sequence[CellSummary], smallest: float) -> list[CellSummary]:
    """The cells with the seeds that they need, each at its share of 5 %."""
    alpha = ALPHA / max(1, sum(not summary.cell.is_base for summary in cells))
    planned = []
    for summary in cells:
        group = [other for other in cells if other.cell.group == summary.cell.group]
        needed = _needed(summary.difference, group, smallest, alpha) if summary.difference else None
        planned.append(replace(summary, needed=needed))
    return planned


def _needed(
    difference: Difference, group: Sequence[CellSummary], smallest: float, alpha: float
) -> Needed | None:
    """With the best standard deviation known: its own, else pooled, else published."""

    def seeds_for(std: float, is_paired: bool = False) -> int | None:
        return seeds_needed(smallest, std, is_paired=is_paired, alpha=alpha)

    if difference.std is not None and (difference.dof or 0) >= LEAST_DOF:
        pooled = _pooled_difference_std(difference.kind, group)
        paired = difference.kind == "paired"
        own = Needed(seeds_for(difference.std, paired), difference.std, "measured")
        if not pooled:
            return own
        return replace(own, pooled_seeds=seeds_for(pooled, paired), pooled_std=pooled)
    if difference.kind != "single" and difference.std is None:
        return None
    values = [list(other.values.values()) for other in group]
    std = pooled_std(values)
    if std and sum(len(one) - 1 for one in values if one) >= LEAST_DOF:
        return Needed(seeds_for(std), std, "pooled")
    num_images = next(row.num_val_images for other in group for row in other.rows)
    std = published_spread_pct(num_images)
    return Needed(seeds_for(std), std, "published")


def _pooled_difference_std(kind: str, group: Sequence[CellSummary]) -> float | None:
    """The std of a group's differences of one kind taken together; None for fewer than two."""
    alike = [
        one for summary in group if (one := summary.difference) and one.std and one.kind == kind
    ]
    if len(alike) < 2:
        return None
    if kind == "welch":
        return pooled_std([list(summary.values.values()) for summary in group])
    return pool([(one.num_pairs - 1, one.std) for one in alike if one.std])


def _marks(summary: CellSummary, cells: Sequence[CellSummary]) -> tuple[str, ...]:
    """Seeds without a value, n = 1, values that do not vary, a comparison over fewer seeds."""
    marks = []
    for state in ("failed", "missing", "diverged", "no value"):
        seeds = [str(result.seed) for result in summary.seeds if result.state == state]
        if seeds:
            is_all = len(seeds) == len(summary.seeds) > 1
            word = "all" if is_all else f"{plural('seed', len(seeds))} {', '.join(seeds)}"
            marks.append(f"{STATE_TEXTS[state]}: {word}")
    if len(summary.values) == 1:
        marks.append("n = 1")
    if summary.std == 0:
        marks.append("all values equal")
    base = base_of(summary, cells)
    if summary.difference and base:
        marks += _difference_marks(summary.difference, set(summary.values), set(base.values))
    return tuple(marks)


def _difference_marks(difference: Difference, own: set[int], base: set[int]) -> list[str]:
    """Where a difference is not that of the two means in the table, or has no interval."""
    marks, common = [], sorted(own & base)
    if difference.num_pairs and own != base:
        word = plural("seed", len(common))
        marks.append(f"difference over the common {word} {', '.join(map(str, common))}")
    elif not common and difference.kind == "single":
        marks.append("no seed in common with the base")
    if difference.kind == "welch":
        marks.append("Welch: fewer than two seeds shared with the base")
    if difference.kind != "single" and difference.p is None:
        marks.append("difference does not vary: no interval")
    return marks
