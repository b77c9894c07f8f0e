"""The coordinates of a report's figures: effect sizes, learning curves, accuracy against cost.

Numbers in, coordinates out; assets/figures.html draws them. The x of an effect is in percent of the
width, so that the figure can be as wide as the window; the other figures are in pixels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.base.stats import Difference, front_of
from trainer.report.curves import Curves, Points
from trainer.report.tables import CellSummary, Metric, Table

MAX_CELLS = 60  # of one figure; the table has all
SIGNIFICANT_P = 0.05  # below it an effect is drawn filled

# ---- axes


@dataclass(frozen=True)
class Tick:
    """A coordinate on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """A linear map from values in [low, high] to coordinates from start to end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of a value, clipped to the scale."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, max_ticks: int) -> tuple[Tick, ...]:
        """Round numbers: multiples of 1, 2 or 5 times a power of ten."""
        span = self.high - self.low
        unit = 10 ** math.floor(math.log10(span / max_ticks))
        step = next(unit * k for k in (1, 2, 5, 10, 20) if span / (unit * k) <= max_ticks)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = (math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9))
        return tuple(
            Tick(self.at(k * step), f"{k * step:,.{digits}f}") for k in range(first, last + 1)
        )


def scale_over(
    values: Iterable[float], start: float, end: float, margin_share: float = 0.06
) -> Scale:
    """A scale with a margin around the values; a single value is in its middle."""
    values = list(values)
    low, high = min(values), max(values)
    margin = (high - low) * margin_share if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, end)


# ---- effect sizes


@dataclass(frozen=True)
class Effect:
    """One line: a difference with its interval. at: None without a difference.

    low, high: None without an interval. is_cut_*: does the interval continue beyond the axis on
    that side? is_significant: p below SIGNIFICANT_P after Holm's correction.
    """

    summary: CellSummary
    at: float | None
    low: float | None = None
    high: float | None = None
    is_cut_low: bool = False
    is_cut_high: bool = False
    is_significant: bool = False


@dataclass(frozen=True)
class Forest:
    """A forest plot of a group's differences. num_left_out: smaller ones, not drawn."""

    group: str
    base: str
    zero: float
    ticks: tuple[Tick, ...]
    effects: tuple[Effect, ...]
    num_left_out: int


def forest(group: str, cells: Sequence[CellSummary]) -> Forest | None:
    """The forest plot of a group; None where nothing is compared."""
    base = next((summary for summary in cells if summary.cell.is_base), None)
    others = [summary for summary in cells if not summary.cell.is_base]
    if base is None or not any(summary.difference for summary in others):
        return None
    shown = others
    if len(others) > MAX_CELLS:
        sizes = {id(one): abs(one.difference.value) for one in others if one.difference}
        drawn = sorted(sizes, key=lambda key: -sizes[key])[:MAX_CELLS]
        shown = [summary for summary in others if id(summary) in drawn]
    scale = _effect_scale([summary.difference for summary in shown if summary.difference])
    effects = tuple(_effect(summary, scale) for summary in shown)
    return Forest(
        group, base.cell.name, scale.at(0), scale.ticks(5), effects, len(others) - len(shown)
    )


def _effect_scale(differences: Sequence[Difference]) -> Scale:
    """Wide enough for all differences and a typical interval; much wider ones are cut."""
    values = [0.0, *(difference.value for difference in differences)]
    intervals = [interval for one in differences if (interval := one.interval)]
    halves = [(high - low) / 2 for low, high in intervals]
    typical = 1.2 * statistics.median(halves) if halves else 0.0
    margin = max((max(values) - min(values)) * 0.5, typical)
    ends = [end for interval in intervals for end in interval]
    low = max(min(values + ends), min(values) - margin)
    high = min(max(values + ends), max(values) + margin)
    return scale_over((low, high), 2, 98, margin_share=0.02)


def _effect(summary: CellSummary, scale: Scale) -> Effect:
    difference = summary.difference
    if difference is None:
        return Effect(summary, None)
    if difference.interval is None:
        return Effect(summary, scale.at(difference.value))
    low, high = difference.interval
    return Effect(
        summary,
        scale.at(difference.value),
        scale.at(low),
        scale.at(high),
        is_cut_low=low < scale.low,
        is_cut_high=high > scale.high,
        is_significant=summary.p_holm is not None and summary.p_holm < SIGNIFICANT_P,
    )


# ---- learning curves

PANEL_PX = (250, 160)
PANEL_INNER_PX = (42, 8, 242, 136)  # left, top, right, bottom of the plotting area


@dataclass(frozen=True)
class Panel:
    """The curves of one cell, as SVG points. base: the mean curve of the group's base."""

    summary: CellSummary
    seeds: tuple[str, ...]
    band: str
    mean: str
    base: str


@dataclass(frozen=True)
class CurveFigure:
    """One quantity by epoch, a panel per cell, same axes. without: cells that have none."""

    group: str
    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    panels: tuple[Panel, ...]
    num_left_out: int
    without: tuple[str, ...]


def curve_figures(table: Table, curves: Mapping[str, Curves]) -> tuple[CurveFigure, ...]:
    """Val top-1 and training loss of every group that has curves."""
    figures = []
    for group, cells in table.groups.items():
        for kind, title in (("val_top1", "Top-1 % of val"), ("train_loss", "Training loss, nats")):
            lines_of = [(summary, _lines(summary, curves, kind)) for summary in cells]
            if any(lines for _, lines in lines_of):
                figures.append(_curve_figure(group, title, lines_of))
    return tuple(figures)


def _lines(summary: CellSummary, curves: Mapping[str, Curves], kind: str) -> list[Points]:
    lines = [getattr(curves[row.run], kind) for row in summary.rows if row.run in curves]
    return [points for points in lines if points]


def _curve_figure(
    group: str, title: str, lines_of: Sequence[tuple[CellSummary, list[Points]]]
) -> CurveFigure:
    drawn = [(summary, lines) for summary, lines in lines_of if lines]
    points = [point for _, lines in drawn for line in lines for point in line]
    left, top, right, bottom = PANEL_INNER_PX
    x = scale_over((epoch for epoch, _ in points), left, right, margin_share=0.02)
    y = scale_over((value for _, value in points), bottom, top)
    base_lines = next((lines for summary, lines in drawn if summary.cell.is_base), [])
    base_mean = _svg([(epoch, mean) for epoch, _, mean, _ in _spread(base_lines)], x, y)
    panels = tuple(_panel(summary, lines, x, y, base_mean) for summary, lines in drawn[:MAX_CELLS])
    without = tuple(summary.cell.name for summary, lines in lines_of if not lines)
    num_left_out = len(drawn) - len(panels)
    return CurveFigure(group, title, x.ticks(5), y.ticks(5), panels, num_left_out, without)


def _panel(summary: CellSummary, lines: list[Points], x: Scale, y: Scale, base_mean: str) -> Panel:
    spread = _spread(lines)
    lows = [(epoch, low) for epoch, low, _, _ in spread]
    highs = [(epoch, high) for epoch, _, _, high in spread]
    has_seeds = len(lines) > 1
    return Panel(
        summary,
        seeds=tuple(_svg(line, x, y) for line in lines) if has_seeds else (),
        band=_svg([*lows, *reversed(highs)], x, y) if has_seeds else "",
        mean=_svg([(epoch, mean) for epoch, _, mean, _ in spread], x, y),
        base="" if summary.cell.is_base else base_mean,
    )


def _spread(lines: Sequence[Points]) -> list[tuple[float, float, float, float]]:
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
    return " ".join(f"{x.at(epoch):g},{y.at(value):g}" for epoch, value in points)


# ---- accuracy against cost

COST_PX = (420, 300)
COST_INNER_PX = (56, 14, 404, 252)
_COSTS = (  # field of Costs, name, unit, factor from the field to the unit
    ("train_s", "training time", "s", 1.0),
    ("peak_mem_mib", "peak memory", "MiB", 1.0),
    ("gmacs", "multiply-adds of one image", "G", 1.0),
    ("num_params", "parameters", "M", 1e6),
)
_MIN_COST_RATIO = 1.005  # below it the cells cost the same
_LABEL_OFFSETS_PX = ((9, 4), (-9, 4), (0, -9), (0, 17), (9, -7), (-9, -7), (9, 15), (-9, 15))
_ENOUGH_PX = 14.0  # between a label and the next mark


@dataclass(frozen=True)
class CostPoint:
    """A cell's mean against its cost. low, high: mean ± one standard deviation."""

    summary: CellSummary
    cost: str
    x: float
    y: float
    low: float | None
    high: float | None
    is_front: bool
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class CostFigure:
    """title: the cost and its unit. front: an SVG path along the Pareto front."""

    group: str
    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[CostPoint, ...]
    front: str
    num_left_out: int


def cost_figures(table: Table) -> tuple[CostFigure, ...]:
    """A figure for each group and each cost in which its cells differ."""
    figures = []
    for group, cells in table.groups.items():
        for field, name, unit, factor in _COSTS:
            scored = [
                _Scored(
                    summary,
                    getattr(summary.costs, field) / factor,
                    summary.mean,
                    tuple(end / factor for end in summary.costs.range_of(field)),
                )
                for summary in cells
                if summary.costs and summary.mean is not None
            ]
            least = min((one.costs[1] for one in scored), default=0.0)
            if any(one.costs[0] > least * _MIN_COST_RATIO for one in scored):
                figures.append(_cost_figure(group, name, unit, scored, table.metric))
    return tuple(figures)


class _Scored(NamedTuple):
    """A cell with both coordinates. costs: (low, high) over the seeds."""

    summary: CellSummary
    cost: float
    mean: float
    costs: tuple[float, ...]

    @property
    def one_std(self) -> tuple[float, ...]:
        """The mean ± one standard deviation; the mean alone without one."""
        std = self.summary.std
        return (self.mean,) if std is None else (self.mean - std, self.mean + std)


def _cost_figure(
    group: str, name: str, unit: str, scored: Sequence[_Scored], metric: Metric
) -> CostFigure:
    costs = [one.cost for one in scored]
    gains = [one.mean if metric.is_share else -one.mean for one in scored]
    spreads = [one.summary.std or 0.0 for one in scored]
    front = front_of(
        [(one.costs[0], one.costs[1]) for one in scored],
        [(gain - std, gain + std) for gain, std in zip(gains, spreads, strict=True)],
    )
    fronts = [index in front for index in range(len(scored))]
    order = sorted(range(len(scored)), key=lambda index: (not fronts[index], -gains[index]))
    order = order[:MAX_CELLS]
    left, top, right, bottom = COST_INNER_PX
    x = scale_over((costs[index] for index in order), left, right)
    y = scale_over((end for index in order for end in scored[index].one_std), bottom, top)
    occupied = [(x.at(scored[index].cost), y.at(scored[index].mean)) for index in order]
    points = tuple(
        _cost_point(scored[index], unit, fronts[index], x, y, occupied) for index in order
    )
    title, num_left_out = f"{name}, {unit}", len(scored) - len(order)
    return CostFigure(
        group, title, x.ticks(5), y.ticks(5), points, _front_path(points), num_left_out
    )


def _front_path(points: Iterable[CostPoint]) -> str:
    """Steps along the front, cheapest cell first; empty for fewer than two cells."""
    front = sorted((p for p in points if p.is_front), key=lambda point: (point.x, -point.y))
    if len(front) < 2:
        return ""
    steps = " ".join(f"H{point.x:g} V{point.y:g}" for point in front[1:])
    return f"M{front[0].x:g},{front[0].y:g} {steps}"


def _cost_point(
    scored: _Scored,
    unit: str,
    is_on_front: bool,
    x: Scale,
    y: Scale,
    occupied: list[tuple[float, float]],
) -> CostPoint:
    """A point, its label where most space is left; occupied grows by the label."""
    at_x, at_y = x.at(scored.cost), y.at(scored.mean)
    others = [mark for mark in occupied if mark != (at_x, at_y)]
    candidates = [
        (
            round(at_x + dx, 2),
            round(at_y + dy, 2),
            "start" if dx > 0 else "end" if dx < 0 else "middle",
        )
        for dx, dy in _LABEL_OFFSETS_PX
    ]
    label = max(
        candidates,
        key=lambda label: min([_clearance_px(label, mark) for mark in others], default=99.0),
    )
    occupied.append((label[0], label[1] - 4))
    ends = [y.at(end) for end in scored.one_std]
    low, high = ends if len(ends) == 2 else (None, None)
    cost = f"{scored.cost:,.0f}" if scored.cost >= 100 else f"{scored.cost:.3g}"
    return CostPoint(scored.summary, f"{cost} {unit}", at_x, at_y, low, high, is_on_front, *label)


def _clearance_px(label: tuple[float, float, str], mark: tuple[float, float]) -> float:
    """The distance from the middle of a label to another mark, up to what is enough."""
    x, y, anchor = label
    middle = x + {"start": 5, "end": -5, "middle": 0}[anchor]
    return min(_ENOUGH_PX, math.hypot(middle - mark[0], y - 4 - mark[1]))
