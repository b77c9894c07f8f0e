"""What stands under a table: how its numbers are made, how far they can be trusted, where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.base.stats import (
    MOST_SEEDS,
    RSB_SPREAD_PCT,
    RSB_VAL_IMAGES,
    binomial_error_pct,
    published_spread_pct,
)
from trainer.report.tables import CellSummary, Table
from trainer.runs.results import Row

_MOST_NAMED = 4  # cells in one warning


@dataclass(frozen=True)
class Fact:
    """One fact of the rows of a group. values: each with the cells that have it; one alone where all agree."""

    name: str
    values: tuple[tuple[str, tuple[str, ...]], ...]


def versions_text(row: Row) -> str:
    """The versions a row names, in one line."""
    return ", ".join(f"{name} {version}" for name, version in row.versions.items())


# What must be the same in all cells of a group, so that nothing but the cell differs.
_FACTS: dict[str, Callable[[Row], str]] = {
    "data": lambda row: f"{row.data} ({row.data_fingerprint[:12]})",
    "split": lambda row: f"{row.num_val_images:,} images of {row.split}",
    "epochs": lambda row: f"{row.epochs} epoch{'s' * (row.epochs != 1)}",
    "device": lambda row: row.device,
    "precision": lambda row: row.precision,
    "threads": lambda row: f"{row.num_threads} thread{'s' * (row.num_threads != 1)}",
    "ranks": lambda row: f"{row.world_size} rank{'s' * (row.world_size != 1)}",
    "loader": lambda row: f"{row.loader} loader",
    "compiling": lambda row: "compiled" if row.compiled else "not compiled",
    "versions": versions_text,
    "commit": lambda row: f"commit {row.commit[:12]}" if row.commit else "no commit known",
    "uncommitted changes": lambda row: {
        True: "uncommitted changes",
        False: "none uncommitted",
        None: "not under git",
    }[row.dirty],
}
_NOT_TOLD = (
    "1 rank",
    "torch loader",
    "not compiled",
    "none uncommitted",
    "not under git",
)  # where all rows say so


def facts_of(cells: Sequence[CellSummary]) -> tuple[Fact, ...]:
    """The facts of the rows of some cells."""
    facts = []
    for name, told in _FACTS.items():
        found: dict[str, dict[str, None]] = {}
        for one in cells:
            for row in one.rows:
                found.setdefault(told(row), {})[one.cell.name] = None
        facts.append(Fact(name, tuple((value, tuple(names)) for value, names in found.items())))
    return tuple(facts)


def remarks(table: Table) -> tuple[str, ...]:
    """The plain lines under a table, most needed first."""
    lines = [
        _how_scored(table),
        *_how_compared(table),
        *_alone(table),
        *_size_of_val(table),
        *_seeds_needed(table),
    ]
    lines += _published(table)
    lines += [
        _where_from(table, group, cells) for group, cells in table.groups.items() if _rows(cells)
    ]
    return tuple(lines)


def warnings(table: Table) -> tuple[str, ...]:
    """What makes the cells of a group unlike each other beside what they ask, and seeds that have no value."""
    lines = [line for group, cells in table.groups.items() for line in _unlike(table, group, cells)]
    return (*_without_value(table), *lines)


def _how_scored(table: Table) -> str:
    seeds = f"seed{'s' * (len(table.seeds) > 1)} {', '.join(map(str, table.seeds))}"
    what = f"{table.metric.label[0].upper()}{table.metric.label[1:]} in {table.metric.unit} of val after the last epoch"
    if table.metric.unit == "%":
        what = (
            f"{table.metric.label[0].upper()}{table.metric.label[1:]} % of val after the last epoch"
        )
    return (
        f"{what}, mean ± standard deviation (n − 1) over {seeds}."
        if len(table.seeds) > 1
        else f"{what}, {seeds}."
    )


def _how_compared(table: Table) -> list[str]:
    compared = [one for one in table.cells if one.difference]
    if not compared:
        return []
    against = f"Differences are cell − base ({_named(table.bases)})"
    kinds = {one.difference.kind for one in compared if one.p_holm is not None}
    if not kinds:
        return [f"{against}."]
    how = {
        ("paired",): "paired by seed",
        ("welch",): "by Welch's test",
        (
            "paired",
            "welch",
        ): "paired by seed where at least two seeds are common, else by Welch's test",
    }[tuple(sorted(kinds))]
    number = (
        f"the {table.num_compared} differences" if table.num_compared > 1 else "the one difference"
    )
    return [
        f"{against}, {how}, with the 95 % interval of Student's t; p is two-sided, corrected by Holm for {number} "
        "of this table."
    ]


def _alone(table: Table) -> list[str]:
    """One value has no spread: what then may be said."""
    single = [one for one in table.cells if len(one.values) == 1]
    if not single:
        return []
    who = "One seed" if len(table.seeds) == 1 else "Cells with n = 1"
    line = f"{who}: no interval and no p."
    if table.metric.name not in ("top1", "ema"):
        return [line]
    sizes = sorted({row.num_val_images for one in single for row in one.rows})
    scaled = [
        f"about {published_spread_pct(size):.2f} on {size:,}"
        for size in sizes
        if size != RSB_VAL_IMAGES
    ]
    spread = f"{RSB_SPREAD_PCT:.2f} points on ImageNet's {RSB_VAL_IMAGES:,} val images (A2, ResNet-50, 100 seeds, arXiv:2110.00476)"
    by_size = f", which would be {', '.join(scaled)} images" if scaled else ""
    return [
        f"{line} Seeds alone move top-1 by a standard deviation of {spread}{by_size}: smaller differences mean nothing."
    ]


def _size_of_val(table: Table) -> list[str]:
    """What the number of val images means for a share of them."""
    if not table.metric.is_share:
        return []
    lines = []
    for group, cells in table.groups.items():
        known = [one for one in cells if one.mean is not None]
        if not known:
            continue
        one = next((one for one in known if one.cell.is_base), known[0])
        num_images = one.rows[0].num_val_images
        lines.append(
            f"{_in_group(table, group)}One of {num_images:,} val images is {100 / num_images:.3g} points; the standard error of "
            f"{one.mean:.2f} % of so many images is {binomial_error_pct(one.mean, num_images):.2g} points: what another val "
            "set of this size would move, whatever the number of seeds."
        )
    return list(dict.fromkeys(lines))


def _seeds_needed(table: Table) -> list[str]:
    origins = {one.needed.origin for one in table.cells if one.needed}
    if not origins:
        return []
    line = "Seeds needed: in each cell, to see the difference found with 80 % power (t-test, two-sided 5 %)"
    told = {
        "pooled": "≈ where n = 1: with the spread of the group's other cells",
        "published": "≈ where n = 1: with RSB's spread for this number of val images",
    }
    more = [told[origin] for origin in ("pooled", "published") if origin in origins]
    is_more = any(one.needed and one.needed.num_seeds is None for one in table.cells)
    return [
        "; ".join([line, *more, *([f"> {MOST_SEEDS:,}: more than that"] if is_more else [])]) + "."
    ]


def _published(table: Table) -> list[str]:
    sources = dict.fromkeys(
        one.cell.published_source for one in table.cells if one.cell.published is not None
    )
    if not sources:
        return []
    return [
        f"Published: top-1 % as the sources state it, not measured here and compared with nothing: {'; '.join(sources)}."
    ]


def _where_from(table: Table, group: str, cells: Sequence[CellSummary]) -> str:
    """Data, length, machine, versions, commit: of all rows where they agree, the warnings say where they do not."""
    facts = facts_of(cells)
    agreed = [
        fact.values[0][0]
        for fact in facts
        if len(fact.values) == 1 and fact.values[0][0] not in _NOT_TOLD
    ]
    unlike = [fact.name for fact in facts if len(fact.values) > 1]
    return f"{_in_group(table, group)}{', '.join(agreed)}{'; not all alike in ' + ', '.join(unlike) if unlike else ''}."


def _unlike(table: Table, group: str, cells: Sequence[CellSummary]) -> list[str]:
    lines = []
    for fact in facts_of(cells):
        if len(fact.values) > 1:
            found = "; ".join(f"{value}: {_named(names)}" for value, names in fact.values)
            lines.append(f"{_in_group(table, group)}rows differ in {fact.name}: {found}.")
    rows = _rows(cells)
    if rows and all(row.dirty for row in rows):
        lines.append(
            f"{_in_group(table, group)}all rows were made with uncommitted changes: the commit does not tell their code."
        )
    replaced = [row.run for row in rows if row.num_replaced_images]
    if replaced:
        lines.append(
            f"{_in_group(table, group)}bad images were replaced by others in {_named(replaced)}."
        )
    changed = [row.run for row in rows if row.changes]
    if changed:
        lines.append(
            f"{_in_group(table, group)}runs went on elsewhere than they began: {_named(changed)}."
        )
    return lines


def _without_value(table: Table) -> list[str]:
    told = {
        "failed": "failed and in no mean",
        "missing": "without a row",
        "diverged": "diverged and in no mean",
        "no value": f"without {table.metric.label}",
    }
    lines = []
    for state, words in told.items():
        found = [
            f"{one.cell.name} seed {seed.seed}"
            for one in table.cells
            for seed in one.seeds
            if seed.state == state
        ]
        if found:
            lines.append(
                f"{len(found)} of {len(table.cells) * len(table.seeds)} runs {words}: {_named(found)}."
            )
    return lines


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _in_group(table: Table, group: str) -> str:
    return f"{group}: " if len(table.groups) > 1 else ""


def _rows(cells: Sequence[CellSummary]) -> list[Row]:
    return [row for one in cells for row in one.rows]
