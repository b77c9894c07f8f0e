"""The coordinates of learning curves: all cells in one figure, and a panel for each."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.report.curves import Curves, Points
from trainer.report.figures import MAX_CELLS, Scale, Tick, core_range, most_different, scale_over
from trainer.report.tables import CellSummary, Table

PANEL_PX = (260, 182)
PANEL_INNER_PX = (54, 8, 252, 140)  # left, top, right, bottom of the plotting area
OVERVIEW_PX = (640, 320)
OVERVIEW_INNER_PX = (62, 10, 630, 272)
MAX_LINES = 24  # of a figure with all cells: what colours and dashes tell apart
NUM_COLOURS = 6
_LEAST_LOSS_SQUEEZE = 8.0  # a loss begins high: that alone is no reason to cut it
_FARTHEST_PX = 9999.0  # of a point beyond the axis


@dataclass(frozen=True)
class Quantity:
    """What one axis can show: the main score of val, or one training loss, of the cells that have
    curves of it.

    lines: of each cell its seeds' curves. without: names of the cells that have none.
    """

    group: str
    title: str
    unit: str
    lines: tuple[tuple[CellSummary, tuple[Points, ...]], ...]
    without: tuple[str, ...]

    @property
    def axis(self) -> str:
        """The label of the axis, with its unit."""
        return f"{self.title}, {self.unit}"

    def y_range(self) -> tuple[float, float]:
        """(low, high) of an axis for all cells but the few that end far from the others."""
        ends = {
            id(lines): statistics.fmean(line[-1][1] for line in lines) for _, lines in self.lines
        }
        low, high = core_range(ends.values())
        points = [
            value
            for _, lines in self.lines
            if low <= ends[id(lines)] <= high
            for line in lines
            for _, value in line
        ]
        if self.unit == "nats":
            return core_range(points, _LEAST_LOSS_SQUEEZE)
        return min(points), max(points)

    def last_epoch(self) -> float:
        """The epoch at which the longest curve ends."""
        return max(line[-1][0] for _, lines in self.lines for line in lines)


def quantities(table: Table, curves: Mapping[str, Curves]) -> tuple[Quantity, ...]:
    """The main score of val and the training losses of every group that has curves.

    Values of different losses are no measure of each other: each has an axis of its own.
    """
    found = []
    for group, cells in table.groups.items():
        names = _loss_names(dict.fromkeys(summary.cell.loss for summary in cells))
        kinds = [("val_top1", f"{table.score_label} of val", "%", cells)] + [
            (
                "train_loss",
                f"training loss{f' ({name})' if name else ''}",
                "nats",
                tuple(summary for summary in cells if summary.cell.loss == loss),
            )
            for loss, name in names.items()
        ]
        for kind, title, unit, members in kinds:
            lines = [(summary, _lines(summary, curves, kind)) for summary in members]
            drawn = tuple((summary, tuple(found)) for summary, found in lines if found)
            without = tuple(summary.cell.name for summary, found in lines if not found)
            if drawn:
                found.append(Quantity(group, title, unit, drawn, without))
    return tuple(found)


def _loss_names(losses: Iterable[str]) -> dict[str, str]:
    """Names of losses by their JSON: with all fields where two losses have the same name."""
    fields = {loss: json.loads(loss) if loss else {} for loss in losses}
    names = [values.get("name", "") for values in fields.values()]
    return {
        loss: ", ".join(
            [
                values.get("name", ""),
                *(
                    f"{key} {value}"
                    for key, value in values.items()
                    if key != "name" and names.count(values["name"]) > 1
                ),
            ]
        )
        for loss, values in fields.items()
    }


def _lines(summary: CellSummary, curves: Mapping[str, Curves], kind: str) -> list[Points]:
    lines = [getattr(curves[row.run], kind) for row in summary.rows if row.run in curves]
    return [points for points in lines if points]


@dataclass(frozen=True)
class Line:
    """A cell's mean curve as SVG points, and its values there: "epoch mean min max; ...".

    end: its last value. is_beyond: does it end outside of the axis?
    """

    summary: CellSummary
    points: str
    values: str
    end: float
    is_beyond: bool


@dataclass(frozen=True)
class Panel:
    """The curves of one cell, as SVG points. base: the mean curve of the group's base."""

    line: Line
    seeds: tuple[str, ...]
    band: str
    base: str

    @property
    def summary(self) -> CellSummary:
        """The cell's."""
        return self.line.summary


@dataclass(frozen=True)
class CurveFigure:
    """One quantity by epoch: all cells in one figure, and a panel for each, with axes of the same
    range.

    lines: of all cells. num_left_out: cells without a panel. num_lines_left_out: cells that are in
    the panels alone.
    """

    quantity: Quantity
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    num_lines_left_out: int
    panel_x_ticks: tuple[Tick, ...]
    panel_y_ticks: tuple[Tick, ...]
    panels: tuple[Panel, ...]
    num_left_out: int


def curve_figures(table: Table, curves: Mapping[str, Curves]) -> tuple[CurveFigure, ...]:
    """The figures of all quantities that have curves."""
    return tuple(_curve_figure(quantity) for quantity in quantities(table, curves))


def _curve_figure(quantity: Quantity) -> CurveFigure:
    x, y = _curve_scales(quantity, OVERVIEW_INNER_PX)
    drawn = [summary for summary, _ in quantity.lines]
    chosen = {id(summary) for summary in most_different(drawn, MAX_LINES)}
    lines = tuple(
        _line(summary, lines, x, y) for summary, lines in quantity.lines if id(summary) in chosen
    )
    panel_x, panel_y = _curve_scales(quantity, PANEL_INNER_PX)
    base_lines = next((lines for summary, lines in quantity.lines if summary.cell.is_base), ())
    base = _svg([(epoch, mean) for epoch, _, mean, _ in spread_of(base_lines)], panel_x, panel_y)
    panels = tuple(
        _panel(summary, lines, panel_x, panel_y, base)
        for summary, lines in quantity.lines[:MAX_CELLS]
    )
    return CurveFigure(
        quantity,
        x.ticks(10, is_whole=True),
        y.ticks(6),
        lines,
        len(drawn) - len(lines),
        panel_x.ticks(5, is_whole=True),
        panel_y.ticks(5),
        panels,
        len(drawn) - len(panels),
    )


def _curve_scales(quantity: Quantity, inner: tuple[int, int, int, int]) -> tuple[Scale, Scale]:
    left, top, right, bottom = inner
    x = scale_over((0, math.ceil(quantity.last_epoch())), left, right, margin_share=0.02)
    return x, scale_over(quantity.y_range(), bottom, top)


def _line(summary: CellSummary, lines: Sequence[Points], x: Scale, y: Scale) -> Line:
    spread = spread_of(lines)
    values = ";".join(
        f"{epoch:g} {mean:.4g} {low:.4g} {high:.4g}" for epoch, low, mean, high in spread
    )
    end = spread[-1][2]
    points = _svg([(epoch, mean) for epoch, _, mean, _ in spread], x, y)
    return Line(summary, points, values, end, not y.has(end))


def _panel(
    summary: CellSummary, lines: Sequence[Points], x: Scale, y: Scale, base_mean: str
) -> Panel:
    spread = spread_of(lines)
    lows = [(epoch, low) for epoch, low, _, _ in spread]
    highs = [(epoch, high) for epoch, _, _, high in spread]
    has_seeds = len(lines) > 1
    return Panel(
        _line(summary, lines, x, y),
        seeds=tuple(_svg(line, x, y) for line in lines) if has_seeds else (),
        band=_svg([*lows, *reversed(highs)], x, y) if has_seeds else "",
        base="" if summary.cell.is_base else base_mean,
    )


def spread_of(lines: Sequence[Points]) -> list[tuple[float, float, float, float]]:
    """(epoch, min, mean, max) over the seeds that have a point at this epoch."""
    by_epoch: dict[float, list[float]] = {}
    for line in lines:
        for epoch, value in line:
            by_epoch.setdefault(epoch, []).append(value)
    return [
        (epoch, min(values), statistics.fmean(values), max(values))
        for epoch, values in sorted(by_epoch.items())
    ]


def _svg(points: Iterable[tuple[float, float]], x: Scale, y: Scale) -> str:
    """Points as SVG has them; what lies beyond the axis is cut off where it is drawn."""
    return " ".join(
        f"{x.at(epoch):g},{min(max(y.beyond(value), -_FARTHEST_PX), _FARTHEST_PX):g}"
        for epoch, value in points
    )
