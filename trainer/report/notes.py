"""The text under a table: method, uncertainty and provenance of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from trainer.base.plural import counted, plural
from trainer.base.stats import (
    ALPHA,
    MOST_SEEDS,
    RSB_SPREAD_PCT,
    RSB_VAL_IMAGES,
    binomial_error_pct,
    pooled_std,
    published_spread_pct,
)
from trainer.report.tables import CellSummary, Table, step_seconds
from trainer.runs.chance import chance_warning
from trainer.runs.results import Row

_MAX_NAMES = 4  # cells or runs listed in one warning
TIMES = ("train_s", "images_per_s")
COSTS = (*TIMES, "peak_mem_mib")  # columns of what was measured beside a score
_EVEN_RATIO = 1.25  # of step times, and of load to cores: beyond it a machine was shared


@dataclass(frozen=True)
class Fact:
    """A property of a group's rows. values: each distinct value with the cells that have it."""

    name: str
    values: tuple[tuple[str, tuple[str, ...]], ...]


def versions_text(row: Row) -> str:
    """The library versions of a row, in one line."""
    return ", ".join(f"{name} {version}" for name, version in row.versions.items())


def _bound(row: Row) -> str:
    return "" if row.numa == "off" else f", bound by numa={row.numa}"


def _commit(row: Row) -> str:
    commit = row.commit[:12] if row.commit else "unknown"
    return f"{commit}, with uncommitted changes" if row.dirty else commit


# The provenance of a row, as reports and comparisons show it.
ROW_FACTS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: f"{row.recipe}.v{row.version} (digest {row.digest[:12]})",
    "model": lambda row: row.model,
    "data": lambda row: f"{row.data} (fingerprint {row.data_fingerprint[:12]})",
    "scored on": lambda row: f"{counted(row.num_val_images, 'image')} of {row.split}",
    "scored weights": lambda row: row.scored,
    "epochs": lambda row: f"{row.epochs:,}",
    "steps": lambda row: f"{row.steps:,}",
    "images per step": lambda row: f"{row.batch_images:,}",
    "images per norm sample": lambda row: f"{row.norm_images:,}",
    "device": lambda row: row.device,
    "precision": lambda row: row.precision,
    "threads": lambda row: f"{row.num_threads}",
    "loader": lambda row: f"{row.loader}, {counted(row.num_workers, 'worker')}",
    "ranks": lambda row: f"{row.world_size}{_bound(row)}",
    "bitwise reproducible": lambda row: "yes" if row.bitwise else "no",
    "images replaced": lambda row: f"{row.num_replaced_images:,}",
    "changed during training": lambda row: "; ".join(row.changes) or "nothing",
    "versions": versions_text,
    "commit": _commit,
    "weights sha256": lambda row: (row.weights_sha256 or "none")[:12],
    "finished UTC": lambda row: row.finished_utc,
}

# What must be equal in all cells of a group for a difference to be the cell's own.
_COMPARED_FACTS: dict[str, Callable[[Row], str]] = {
    "data": lambda row: f"{row.data} ({row.data_fingerprint[:12]})",
    "split": lambda row: f"{counted(row.num_val_images, 'image')} of {row.split}",
    "epochs": lambda row: counted(row.epochs, "epoch"),
    "device": lambda row: row.device,
    "precision": lambda row: row.precision,
    "threads": lambda row: counted(row.num_threads, "thread"),
    "ranks": lambda row: counted(row.world_size, "rank"),
    "loader": lambda row: f"{row.loader} loader",
    "compile": lambda row: "compiled" if row.compiled else "not compiled",
    "group norm": lambda row: "group norm in half" if row.half_group_norm else "float32 group norm",
    # of runs that would have ended early there are no rows: a mean is of the survivors
    "early end": lambda row: f"under stop_if={row.stop_if}" if row.stop_if else "none ended early",
    "versions": versions_text,
    "commit": lambda row: f"commit {row.commit[:12]}" if row.commit else "commit unknown",
    "uncommitted changes": lambda row: {
        True: "uncommitted changes",
        False: "none uncommitted",
        None: "not under git",
    }[row.dirty],
}
# defaults, not worth a word where all rows have them
_DEFAULTS = (
    "1 rank",
    "torch loader",
    "not compiled",
    "float32 group norm",
    "none ended early",
    "none uncommitted",
    "not under git",
)


def facts_of(cells: Sequence[CellSummary]) -> tuple[Fact, ...]:
    """The facts of the rows of some cells."""
    facts = []
    for name, describe in _COMPARED_FACTS.items():
        cells_of: dict[str, dict[str, None]] = {}
        for summary in cells:
            for row in summary.rows:
                cells_of.setdefault(describe(row), {})[summary.cell.name] = None
        facts.append(Fact(name, tuple((value, tuple(names)) for value, names in cells_of.items())))
    return tuple(facts)


def remarks(table: Table, columns: Collection[str] | None = None) -> tuple[str, ...]:
    """The lines under a table, the most important first.

    columns: those that are shown, None for all; a line about others is left out.
    """

    def are_shown(*about: str) -> bool:
        return columns is None or any(name in columns for name in about)

    return (
        _score_remark(table),
        *(_comparison_remark(table) if are_shown("difference", "p") else ()),
        *_single_value_remark(table),
        *_val_size_remarks(table),
        *(_spread_remarks(table) if are_shown("mean") else ()),
        *(_seeds_needed_remark(table) if are_shown("seeds_needed") else ()),
        *(_cost_remark(table) if are_shown(*COSTS) else ()),
        *(_published_remark(table) if are_shown("published") else ()),
        *(
            _provenance_remark(table, group, cells)
            for group, cells in table.groups.items()
            if _rows(cells)
        ),
    )


def brief_remarks(table: Table, columns: Collection[str]) -> tuple[str, ...]:
    """What a reader of a paper has to know of the columns shown, in a few lines."""
    shown = set(columns)
    lines = [*_missing_value_warnings(table), *_chance_warnings(table), _score_remark(table)]
    if shown & {"difference", "p"} or table.effects:
        lines += _brief_comparison(table)
    if "published" in shown and any(s.cell.published is not None for s in table.cells):
        lines.append("Published: as its source reports it, not measured here.")
    if shown & set(TIMES):
        lines += uneven_time_warnings(table)
    return tuple(lines)


def _brief_comparison(table: Table) -> list[str]:
    differences = [summary.difference for summary in table.cells if summary.difference]
    if not differences:
        return []
    if not any(difference.p is not None for difference in differences):
        return [
            f"Differences are cell − base ({_listed(table.bases)}), of one seed or without any "
            "spread: no interval and no p."
        ]
    paired = ", paired by seed" if {one.kind for one in differences} == {"paired"} else ""
    return [
        f"Differences are cell − base ({_listed(table.bases)}){paired}; intervals hold together at "
        "95 % (Bonferroni), p is Holm-corrected."
    ]


def warnings(table: Table) -> tuple[str, ...]:
    """Seeds without a value, and everything else in which the cells of a group differ."""
    return (
        *_missing_value_warnings(table),
        *_chance_warnings(table),
        *uneven_time_warnings(table),
        *(
            line
            for group, cells in table.groups.items()
            for line in _comparability_warnings(table, group, cells)
        ),
    )


def _chance_warnings(table: Table) -> list[str]:
    """Groups of cells whose scores are all chance."""
    if table.metric.name != "top1":
        return []
    found = ((group, chance_warning(_rows(cells))) for group, cells in table.groups.items())
    return [f"{_group_prefix(table, group)}{line}." for group, line in found if line]


def _score_remark(table: Table) -> str:
    metric = table.metric
    unit = "%" if metric.unit == "%" else f"in {metric.unit}"
    label = metric.label if not metric.label.islower() else metric.label.capitalize()
    score = f"{label} {unit} of val after the last epoch"
    seeds = f"{plural('seed', len(table.seeds))} {', '.join(map(str, table.seeds))}"
    spread = "mean ± standard deviation (n − 1) over " if len(table.seeds) > 1 else ""
    return f"{score}, {spread}{seeds}."


def _comparison_remark(table: Table) -> list[str]:
    differences = [summary.difference for summary in table.cells if summary.difference]
    if not differences:
        return []
    text = f"Differences are cell − base ({_listed(table.bases)})"
    tests = {difference.kind for difference in differences if difference.p is not None}
    if not tests:
        return [f"{text}."]
    test = {
        ("paired",): "paired by seed",
        ("welch",): "by Welch's t-test",
        ("paired", "welch"): "paired by seed, or by Welch's t-test where fewer than two seeds are "
        "shared with the base",
    }[tuple(sorted(tests))]
    return [
        f"{text}, {test}, {_simultaneous(table.num_compared)}",
        "Any two cells, with an interval and a p of their own: "
        f"make compare ablation={table.word} a=<cell> b=<cell>.",
    ]


def _simultaneous(num: int) -> str:
    """The words for intervals and p of several comparisons at once."""
    if num == 1:
        return "with a 95 % confidence interval (Student's t); p is two-sided."
    return (
        "with confidence intervals (Student's t) that hold together at 95 %: each is at "
        f"{_level(num)} %, Bonferroni's level for the {num} comparisons of this table; p is "
        "two-sided, Holm-corrected for them. An interval that leaves out 0 has p < 0.05; p may be "
        "below 0.05 where the interval holds 0, as Holm's test finds more than any such intervals."
    )


def _level(num: int) -> str:
    """Bonferroni's level of each of so many intervals, in percent."""
    return f"{100 * (1 - ALPHA / num):.4g}"


def effect_remarks(table: Table) -> tuple[str, ...]:
    """What main effects and interactions are, and what their intervals hold for."""
    if not table.effects:
        return ()
    num_tested = sum(effect.p_holm is not None for effect in table.effects)
    tested = ""
    if num_tested:
        tested = (
            f"; intervals hold together at 95 % ({_level(num_tested)} % each, Bonferroni over "
            f"{counted(num_tested, 'effect')}), p is Holm-corrected for the same"
        )
    first = next(iter(table.groups.values()))[0].cell
    more = "; interactions of three factors or more are not shown" * (len(first.levels) > 2)
    return (
        "A main effect is a level minus its factor's first, averaged over the other factors; an "
        "interaction is how much that difference changes from the first level of another factor to "
        f"this one{more}. Near 0 the factors add up.",
        f"Paired over the n seeds that all cells of the effect have{tested}.",
    )


def _single_value_remark(table: Table) -> list[str]:
    """A single value has no spread; what the literature says about the spread over seeds."""
    single = [summary for summary in table.cells if len(summary.values) == 1]
    if not single:
        return []
    prefix = "One seed" if len(table.seeds) == 1 else "n = 1"
    text = f"{prefix}: no confidence interval and no p-value."
    is_counted = all(row.is_counted for summary in single for row in summary.rows)
    if table.metric.name not in ("top1", "ema") or not is_counted:
        return [text]
    sizes = {row.num_val_images for summary in single for row in summary.rows} - {RSB_VAL_IMAGES}
    scaled = [f"about {published_spread_pct(size):.2f} on {size:,}" for size in sorted(sizes)]
    here = f"; scaled to this val set, {', '.join(scaled)} images" if scaled else ""
    return [
        f"{text} The seed alone gives top-1 a standard deviation of {RSB_SPREAD_PCT:.2f} points "
        f"on ImageNet's {RSB_VAL_IMAGES:,} val images (A2, ResNet-50, 100 seeds, "
        f"arXiv:2110.00476){here}: smaller differences are noise."
    ]


def _val_size_remarks(table: Table) -> list[str]:
    """The resolution and the standard error of a score that is a share of the val images."""
    if not table.metric.is_share:
        return []
    lines = []
    for group, cells in table.groups.items():
        scored = [(summary, summary.mean) for summary in cells if summary.mean is not None]
        if not scored:
            continue
        summary, mean = next((pair for pair in scored if pair[0].cell.is_base), scored[0])
        if not summary.rows[0].is_counted:
            continue
        size = summary.rows[0].num_val_images
        lines.append(
            f"{_group_prefix(table, group)}One of {counted(size, 'val image')} is "
            f"{_points(100 / size, '.3g')}; "
            f"the binomial standard error of {mean:.2f} % on {size:,} images is "
            f"{_points(binomial_error_pct(mean, size), '.2g')}, and more seeds do not reduce it."
        )
    return list(dict.fromkeys(lines))


def _spread_remarks(table: Table) -> list[str]:
    """The spread of a group's cells together, which more values stand behind than behind any."""
    lines = []
    for group, cells in table.groups.items():
        measured = [summary for summary in cells if summary.std is not None]
        pooled = pooled_std([list(summary.values.values()) for summary in measured])
        if pooled and len(measured) > 1:
            dof = sum(len(summary.values) - 1 for summary in measured)
            lines.append(
                f"{_group_prefix(table, group)}± is each cell's own spread; that of its "
                f"{len(measured)} cells pooled is {pooled:.{table.metric.digits}f} "
                f"({counted(dof, 'degree')} of freedom)."
            )
    return lines


def _seeds_needed_remark(table: Table) -> list[str]:
    needed = [summary.needed for summary in table.cells if summary.needed]
    if not needed:
        return []
    origins = {one.origin for one in needed}
    num_planned = sum(not summary.cell.is_base for summary in table.cells)
    level = f"5 % / {counted(num_planned, 'comparison')}" if num_planned > 1 else "5 %"
    parts = [
        "Seeds needed: per cell, to detect a difference of "
        f"{_points(table.smallest, 'g')} (smallest_points of the ablation file, by default 1), "
        f"whatever was observed, with 80 % power (two-sided t-test at {level}), by the spread of "
        "the cell's own difference"
    ]
    if any(one.pooled_std is not None for one in needed):
        parts.append("in brackets by that of all differences of the group pooled")
    if "pooled" in origins:
        parts.append("≈: fewer than three seeds, standard deviation pooled from the group's cells")
    if "published" in origins:
        parts.append(
            "≈: fewer than three seeds, standard deviation from RSB, scaled to this number of val"
            " images, as plan has it"
        )
    if any(one.num_seeds is None or (one.pooled_std and not one.pooled_seeds) for one in needed):
        parts.append(f"> {MOST_SEEDS:,}: more than that")
    return [f"{'; '.join(parts)}."]


def _cost_remark(table: Table) -> list[str]:
    costs = [summary.costs for summary in table.cells if summary.costs]
    if not costs:
        return []
    seeds = "median over the seeds (least–most)"
    if len(table.seeds) == 1:
        seeds = "of one seed (in brackets by the middle half of its steps)"
    text = (
        f"Train s is the time of a step times their number, {seeds}, evaluations left out; "
        "images/s is of the same step. A row's step is the median of its steps"
    )
    num_rows = sum(len(_finished(summary)) for summary in table.cells)
    num_without = sum(one.num_without_steps for one in costs)
    if num_without:
        whose = "all rows" if num_without == num_rows else f"{num_without} of {num_rows} rows"
        text += (
            f"; {whose} are from before that was recorded and have the mean of the whole run "
            "instead, with all that ran beside it"
        )
    text += "."
    shares = [
        (high - low) / one.peak_mem_mib
        for one in costs
        if one.peak_mem_mib
        for low, high in [one.range_of("peak_mem_mib")]
    ]
    if max(shares, default=0) > 0:
        text += (
            f" Peak MiB is the median; seeds of a cell differ by up to {100 * max(shares):.2g} %."
        )
    return [text]


def _finished(summary: CellSummary) -> list[Row]:
    return [row for row in summary.rows if row.status == "finished"]


def _published_remark(table: Table) -> list[str]:
    published = [summary.cell for summary in table.cells if summary.cell.published is not None]
    if not published:
        return []
    sources = dict.fromkeys(cell.published_source for cell in published)
    return [
        "Published: top-1 % as the source reports it, not measured here and not part of any "
        f"comparison: {'; '.join(sources)}."
    ]


def _provenance_remark(table: Table, group: str, cells: Sequence[CellSummary]) -> str:
    """What all rows share: data, length, machine, versions, commit; warnings list the rest."""
    facts = facts_of(cells)
    shared = [fact.values[0][0] for fact in facts if len(fact.values) == 1]
    shared = [text for text in shared if text not in _DEFAULTS]
    differing = [fact.name for fact in facts if len(fact.values) > 1]
    text = f"{_group_prefix(table, group)}{', '.join(shared)}"
    return f"{text}; rows differ in {', '.join(differing)}." if differing else f"{text}."


def _comparability_warnings(table: Table, group: str, cells: Sequence[CellSummary]) -> list[str]:
    lines = []
    for fact in facts_of(cells):
        if len(fact.values) > 1:
            values = "; ".join(f"{value}: {_listed(names)}" for value, names in fact.values)
            lines.append(f"rows differ in {fact.name}: {values}.")
    rows = _rows(cells)
    if rows and all(row.dirty for row in rows):
        lines.append(
            "all rows were made with uncommitted changes: the commit does not identify their code."
        )
    replaced = [row.run for row in rows if row.num_replaced_images]
    if replaced:
        lines.append(f"unreadable images were replaced by others in {_listed(replaced)}.")
    changed = [row.run for row in rows if row.changes]
    if changed:
        lines.append(
            f"machine, software or memory use changed during training: {_listed(changed)}."
        )
    return [f"{_group_prefix(table, group)}{line}" for line in lines]


def uneven_time_warnings(table: Table) -> list[str]:
    """Runs that shared their machine: times that are no comparison of the cells."""
    ratios = {}
    for summary in table.cells:
        seconds = [step_seconds(row) for row in _finished(summary)]
        if seconds and max(seconds) > _EVEN_RATIO * min(seconds):
            ratios[summary.cell.name] = max(seconds) / min(seconds) if min(seconds) else math.inf
    rows = [row for summary in table.cells for row in _finished(summary)]
    busy = [row.run for row in rows if (row.load_per_core or 0) > _EVEN_RATIO]
    uneven = [row.run for row in rows if (row.step_spread_share or 0) > _EVEN_RATIO - 1]
    found = []
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        found.append(
            f"step times of the seeds of {_listed(list(ratios))} differ by more than a quarter, "
            f"those of {worst} by a factor of {ratios[worst]:.2g}"
        )
    if uneven:
        found.append(f"step times within {_listed(uneven)} vary by more than a quarter")
    if busy:
        found.append(f"more processes than cores ran beside {_listed(busy)}")
    if not found:
        return []
    return [f"times compare nothing here, the machine was shared or changed: {'; '.join(found)}."]


def _missing_value_warnings(table: Table) -> list[str]:
    texts = {
        "failed": "failed, excluded from the mean",
        "missing": "without a row",
        "diverged": "diverged, excluded from the mean",
        "no value": f"without {table.metric.label}",
    }
    num_runs = len(table.cells) * len(table.seeds)
    lines = []
    for state, text in texts.items():
        runs = [
            f"{summary.cell.name} seed {result.seed}"
            for summary in table.cells
            for result in summary.seeds
            if result.state == state
        ]
        if runs:
            lines.append(f"{len(runs)} of {counted(num_runs, 'run')} {text}: {_listed(runs)}.")
    return lines


def _points(value: float, form: str) -> str:
    text = f"{value:{form}}"
    return f"{text} {plural('point', float(text))}"


def _listed(names: Sequence[str]) -> str:
    """The first names; with semicolons where a name has commas of its own."""
    shown = ("; " if any("," in name for name in names) else ", ").join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"


def _group_prefix(table: Table, group: str) -> str:
    return f"{group}: " if len(table.groups) > 1 else ""


def _rows(cells: Sequence[CellSummary]) -> list[Row]:
    return [row for summary in cells for row in summary.rows]
