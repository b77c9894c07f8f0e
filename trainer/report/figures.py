"""The coordinates of a report's figures: effect sizes, learning curves, accuracy against cost.

Numbers in, coordinates out; assets/figures.html draws them. The x of an effect is in percent of the
width, so that the figure can be as wide as the window; the other figures are in pixels.
drawings.py draws the same for papers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trainer.base.stats import Difference, front_of
from trainer.report.notes import uneven_time_warnings
from trainer.report.tables import CellSummary, Costs, Metric, Table

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
        return self.beyond(min(max(value, self.low), self.high))

    def beyond(self, value: float) -> float:
        """The coordinate of a value, outside of the scale too."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def has(self, value: float) -> bool:
        """Does the value lie on the axis?"""
        return self.low <= value <= self.high

    def ticks(self, max_ticks: int, is_whole: bool = False) -> tuple[Tick, ...]:
        """Round numbers: multiples of 1, 2 or 5 times a power of ten. is_whole: whole ones only."""
        span = self.high - self.low
        unit = 10 ** math.floor(math.log10(span / max_ticks))
        step = next(unit * k for k in (1, 2, 5, 10, 20) if span / (unit * k) <= max_ticks)
        step = max(1, step) if is_whole else step
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


_MOST_BEYOND_SHARE = 0.2  # of the values may lie outside of an axis
_LEAST_SQUEEZE = 3.0  # an axis that held all would be so many times as long as one without them


def core_range(
    values: Iterable[float], least_squeeze: float = _LEAST_SQUEEZE
) -> tuple[float, float]:
    """(low, high) of what an axis should hold: all values but the few that would squash the rest.

    Left out is at most a fifth of them, and only where an axis for all would be so many times as
    long as one for the others.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    num_kept = len(ordered) - max(int(_MOST_BEYOND_SHARE * len(ordered)), len(ordered) > 3)
    windows = zip(ordered, ordered[num_kept - 1 :], strict=False)
    start, end = min(windows, key=lambda window: window[1] - window[0])
    if end == start or high - low < least_squeeze * (end - start):
        return low, high
    reach = (end - start) / 2
    inside = [value for value in ordered if start - reach <= value <= end + reach]
    return inside[0], inside[-1]


def most_different(cells: Sequence[CellSummary], most: int) -> list[CellSummary]:
    """At most so many cells, in order: the base, and those that differ most from it."""
    sizes = {id(one): abs(one.difference.value) if one.difference else -1.0 for one in cells}
    order = sorted(cells, key=lambda one: (not one.cell.is_base, -sizes[id(one)]))
    chosen = {id(one) for one in order[:most]}
    return [one for one in cells if id(one) in chosen]


# ---- effect sizes


@dataclass(frozen=True)
class Effect:
    """One line: a difference with its interval. at: None without a difference.

    low, high: None without an interval. is_cut_*: does the interval, or the difference itself, lie
    beyond the axis on that side? is_beyond: the difference does. is_significant: p below
    SIGNIFICANT_P after Holm's correction.
    """

    summary: CellSummary
    at: float | None
    low: float | None = None
    high: float | None = None
    is_cut_low: bool = False
    is_cut_high: bool = False
    is_beyond: bool = False
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
    shown = most_different(others, MAX_CELLS)
    low_high = effect_range([summary.difference for summary in shown if summary.difference])
    scale = scale_over(low_high, 2, 98, margin_share=0.02)
    effects = tuple(_effect(summary, scale) for summary in shown)
    return Forest(
        group, base.cell.name, scale.at(0), scale.ticks(5), effects, len(others) - len(shown)
    )


def effect_range(differences: Sequence[Difference]) -> tuple[float, float]:
    """(low, high) of an axis that is wide enough for zero, the differences and a typical interval;
    much wider intervals, and the few differences that lie far off, are cut.
    """
    values = [0.0, *core_range(difference.value for difference in differences)]
    intervals = [interval for one in differences if (interval := one.interval)]
    halves = [(high - low) / 2 for low, high in intervals]
    typical = 1.2 * statistics.median(halves) if halves else 0.0
    margin = max((max(values) - min(values)) * 0.5, typical)
    ends = [end for interval in intervals for end in interval]
    low = max(min(values + ends), min(values) - margin)
    high = min(max(values + ends), max(values) + margin)
    return low, high


def _effect(summary: CellSummary, scale: Scale) -> Effect:
    difference = summary.difference
    if difference is None:
        return Effect(summary, None)
    low, high = difference.interval or (difference.value, difference.value)
    return Effect(
        summary,
        scale.at(difference.value),
        scale.at(low) if difference.interval else None,
        scale.at(high) if difference.interval else None,
        is_cut_low=low < scale.low,
        is_cut_high=high > scale.high,
        is_beyond=not scale.has(difference.value),
        is_significant=summary.p_holm is not None and summary.p_holm < SIGNIFICANT_P,
    )


# ---- accuracy against cost

COST_PX = (420, 300)
COST_INNER_PX = (56, 14, 404, 252)
_COSTS = (  # field of Costs, name, unit, factor from the field to the unit
    ("train_s", "training time", "s", 1.0),
    ("peak_mem_mib", "peak memory", "MiB", 1.0),
    ("gmacs", "multiply-adds of one image", "G", 1.0),
    ("num_params", "parameters", "M", 1e6),
)
_MIN_COST_RATIO = 1.02  # below it the cells cost the same, up to noise
# aslant first: beside a mark and above it lie its own lines of spread
_LABEL_OFFSETS_PX = ((9, -7), (-9, -7), (9, 15), (-9, 15), (9, 4), (-9, 4), (0, -9), (0, 17))
_LABEL_PX = 22.0  # wide: a number of three digits
_LABEL_HIGH_PX = 10.0
_ENOUGH_PX = 14.0  # between a label and the next mark


@dataclass(frozen=True)
class Scored:
    """A cell's mean and its cost. low, high: the least and the most that it cost over seeds."""

    summary: CellSummary
    cost: float
    low: float
    high: float
    mean: float
    is_front: bool = False

    @property
    def one_std(self) -> tuple[float, ...]:
        """The mean ± one standard deviation; the mean alone without one."""
        std = self.summary.std
        return (self.mean,) if std is None else (self.mean - std, self.mean + std)

    @property
    def cost_text(self) -> str:
        """The cost to three digits, or in whole units from 100 on."""
        return f"{self.cost:,.0f}" if self.cost >= 100 else f"{self.cost:.3g}"


@dataclass(frozen=True)
class Trade:
    """The scores of a group's cells against one cost in which they differ, the front first.

    warning: why this cost compares nothing, so that no cell is on a front; empty where it does.
    """

    group: str
    name: str
    unit: str
    cells: tuple[Scored, ...]
    warning: str = ""

    @property
    def axis(self) -> str:
        """The label of the axis of costs, with its unit."""
        return f"{self.name}, {self.unit}"

    def x_range(self) -> tuple[float, float]:
        """(low, high) of the costs over seeds, but for the cells far from the others."""
        low, high = core_range(one.cost for one in self.cells)
        inside = [one for one in self.cells if low <= one.cost <= high]
        return min(one.low for one in inside), max(one.high for one in inside)

    def y_range(self) -> tuple[float, float]:
        """(low, high) of the scores, but for the cells far from the others, their spreads
        included.
        """
        low, high = core_range(one.mean for one in self.cells)
        ends = [end for one in self.cells if low <= one.mean <= high for end in one.one_std]
        return min(ends), max(ends)


def trades(table: Table) -> tuple[Trade, ...]:
    """Of every group and each cost in which its cells differ by more than its own spread."""
    found = []
    about_times = " ".join(uneven_time_warnings(table))
    for group, members in table.groups.items():
        for field, name, unit, factor in _COSTS:
            scored = [
                Scored(summary, *_cost_of(summary.costs, field, factor), summary.mean)
                for summary in members
                if summary.costs and summary.mean is not None
            ]
            if scored and min(one.high for one in scored) * _MIN_COST_RATIO < max(
                one.low for one in scored
            ):
                warning = about_times if field == "train_s" else ""
                cells = _with_front(scored, table.metric, has_front=not warning)
                found.append(Trade(group, name, unit, cells, warning))
    return tuple(found)


def _cost_of(costs: Costs, field: str, factor: float) -> tuple[float, float, float]:
    """(cost, least, most) in its unit."""
    low, high = costs.range_of(field)
    return getattr(costs, field) / factor, low / factor, high / factor


def _with_front(scored: Sequence[Scored], metric: Metric, has_front: bool) -> tuple[Scored, ...]:
    """The cells, those of the front first and then by their scores."""
    gains = [one.mean if metric.is_share else -one.mean for one in scored]
    spreads = [one.summary.std or 0.0 for one in scored]
    front = front_of(
        [(one.low, one.high) for one in scored],
        [(gain - std, gain + std) for gain, std in zip(gains, spreads, strict=True)],
    )
    marked = [
        (gain, replace(one, is_front=has_front and index in front))
        for index, (one, gain) in enumerate(zip(scored, gains, strict=True))
    ]
    return tuple(
        one for _, one in sorted(marked, key=lambda pair: (not pair[1].is_front, -pair[0]))
    )


@dataclass(frozen=True)
class CostPoint:
    """A cell's mean against its cost, with the place of its label. low, high: mean ± one standard
    deviation. left, right: the least and the most that it cost. is_beyond: outside of the axes, so
    that the point is drawn at their edge.
    """

    scored: Scored
    x: float
    y: float
    low: float | None
    high: float | None
    left: float
    right: float
    is_beyond: bool
    label_x: float
    label_y: float
    anchor: str

    @property
    def summary(self) -> CellSummary:
        """The cell's."""
        return self.scored.summary


@dataclass(frozen=True)
class CostFigure:
    """front: an SVG path along the Pareto front."""

    trade: Trade
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[CostPoint, ...]
    front: str
    num_left_out: int


def cost_figures(table: Table) -> tuple[CostFigure, ...]:
    """A figure for each group and each cost in which its cells differ."""
    return tuple(map(_cost_figure, trades(table)))


def _cost_figure(trade: Trade) -> CostFigure:
    cells = trade.cells[:MAX_CELLS]
    left, top, right, bottom = COST_INNER_PX
    x = scale_over(trade.x_range(), left, right)
    y = scale_over(trade.y_range(), bottom, top)
    occupied = [(x.at(one.cost), y.at(one.mean)) for one in cells]
    points = tuple(_cost_point(one, x, y, occupied) for one in cells)
    num_left_out = len(trade.cells) - len(cells)
    return CostFigure(trade, x.ticks(5), y.ticks(5), points, _front_path(points), num_left_out)


def _front_path(points: Iterable[CostPoint]) -> str:
    """Steps along the front, cheapest cell first; empty for fewer than two cells."""
    front = sorted((p for p in points if p.scored.is_front), key=lambda point: (point.x, -point.y))
    if len(front) < 2:
        return ""
    steps = " ".join(f"H{point.x:g} V{point.y:g}" for point in front[1:])
    return f"M{front[0].x:g},{front[0].y:g} {steps}"


def _cost_point(
    scored: Scored, x: Scale, y: Scale, occupied: list[tuple[float, float]]
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
        filter(_is_within_axes, candidates),
        key=lambda label: min([_clearance_px(label, mark) for mark in others], default=99.0),
    )
    occupied.append((label[0], label[1] - 4))
    ends = [y.at(end) for end in scored.one_std]
    low, high = ends if len(ends) == 2 else (None, None)
    is_beyond = not (x.has(scored.cost) and y.has(scored.mean))
    left, right = x.at(scored.low), x.at(scored.high)
    return CostPoint(scored, at_x, at_y, low, high, left, right, is_beyond, *label)


def _is_within_axes(label: tuple[float, float, str]) -> bool:
    """Does a label cross no edge of the plotting area?"""
    x, y, anchor = label
    before, after = {"start": (0, 1), "end": (1, 0), "middle": (0.5, 0.5)}[anchor]
    left, top, right, bottom = COST_INNER_PX
    is_wide_enough = left <= x - before * _LABEL_PX and x + after * _LABEL_PX <= right
    return is_wide_enough and top + _LABEL_HIGH_PX <= y <= bottom


def _clearance_px(label: tuple[float, float, str], mark: tuple[float, float]) -> float:
    """The distance from the middle of a label to another mark, up to what is enough."""
    x, y, anchor = label
    middle = x + {"start": 5, "end": -5, "middle": 0}[anchor]
    return min(_ENOUGH_PX, math.hypot(middle - mark[0], y - 4 - mark[1]))
