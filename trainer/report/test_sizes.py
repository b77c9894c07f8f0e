"""Scores at other image sizes (test_px=) as a table of its own, beside the results and no part of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.base.stats import mean_of, std_of
from trainer.report.tables import CellSummary, Metric, Table
from trainer.runs.results import Row

REMARK = (
    "Finished models at other image sizes, each by its recipe's own crop share; * is the recipe's"
    " own size, whose score is the result. No size is chosen by these."
)


@dataclass(frozen=True)
class SizeLine:
    """A cell's scores at the sizes of a SizeTable, as text, empty where there is none."""

    group: str
    cell: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class SizeTable:
    """Sizes in px across, cells down: those that have a score at another size than their own."""

    sizes: tuple[int, ...]
    lines: tuple[SizeLine, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns: the cell, then each size."""
        return "cell", *(f"{px} px" for px in self.sizes)


def size_table(table: Table) -> SizeTable | None:
    """The scores by table.metric at all sizes that a row of the table knows; None without any."""
    found = {
        summary.cell: values
        for summary in table.cells
        if any(row.test_sizes for row in summary.rows)
        and (values := _by_size(summary, table.metric))
    }
    if not found:
        return None
    sizes = tuple(sorted({px for values in found.values() for px in values}))
    lines = tuple(
        SizeLine(cell.group, cell.name, tuple(values.get(px, "") for px in sizes))
        for cell, values in found.items()
    )
    return SizeTable(sizes, lines)


def _by_size(summary: CellSummary, metric: Metric) -> dict[int, str]:
    """Mean ± standard deviation over seeds of each size, as text."""
    values: dict[int, list[float]] = {}
    own_px = {px for row in summary.rows if (px := own_size(row)) is not None}
    for row in summary.rows:
        for px, value in _values(row, metric).items():
            values.setdefault(px, []).append(value)
    num_seeds = len(summary.values)
    return {
        px: _text(each, metric)
        + (" *" if px in own_px else "")
        + (f" (n = {len(each)})" if len(each) != num_seeds else "")
        for px, each in values.items()
    }


def _values(row: Row, metric: Metric) -> dict[int, float]:
    """The row's scores by size, its own among them."""
    names = {"top1": "top1_pct", "top5": "top5_pct", "loss": "loss_nats"}
    if row.status != "finished" or metric.name not in names:
        return {}
    name, own_px = names[metric.name], own_size(row)
    found = {scores.test_px: getattr(scores, name) for scores in row.test_sizes}
    if own_px is not None and found:
        found[own_px] = getattr(row, name)
    return {px: value for px, value in found.items() if value is not None}


def own_size(row: Row) -> int | None:
    """The test_px of a row's recipe, where the row has the recipe."""
    return row.resolved_recipe["image"]["test_px"] if row.resolved_recipe else None


def _text(values: Sequence[float], metric: Metric) -> str:
    std = std_of(values)
    spread = "" if std is None else f" ± {std:.{metric.digits}f}"
    return f"{mean_of(values):.{metric.digits}f}{spread}"
