"""Where the marks of a report's figures stand: effect sizes, learning curves, accuracy against cost.

Numbers in, places out; the template draws them. Places across an effect's line are in per cent of its width, so that
it can be as wide as the page; in panels they are pixels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.report.compare import Curves
from trainer.report.scales import Scale, Tick, scale_over
from trainer.report.tables import CellSummary, Metric, Table

MOST_DRAWN = 60  # cells of one figure; all are in the table
CLEAR_P = 0.05  # from where on an effect is drawn as one

# ---- effect sizes


@dataclass(frozen=True)
class Effect:
    """One line: a difference and its interval, or the words that stand there instead.

    low, high: None without an interval. is_cut: does the interval go on beyond the axis on that side? is_clear: p below
    CLEAR_P after Holm's correction.
    """

    one: CellSummary
    at: float | None
    low: float | None = None
    high: float | None = None
    is_cut_low: bool = False
    is_cut_high: bool = False
    is_clear: bool = False


@dataclass(frozen=True)
class Forest:
    """The differences of a group. num_left_out: smaller ones than those drawn."""

    group: str
    base: str
    zero: float
    ticks: tuple[Tick, ...]
    effects: tuple[Effect, ...]
    num_left_out: int


def forest(group: str, cells: Sequence[CellSummary]) -> Forest | None:
    """The effects of a group; None where nothing is compared."""
    base = next((one for one in cells if one.cell.is_base), None)
    others = [one for one in cells if not one.cell.is_base]
    if base is None or not any(one.difference for one in others):
        return None
    if len(others) > MOST_DRAWN:
        largest = sorted(
            (one for one in others if one.difference), key=lambda one: -abs(one.difference.value)
        )[:MOST_DRAWN]
        shown = [one for one in others if any(one is other for other in largest)]
    else:
        shown = others
    scale = _effect_scale([one.difference for one in shown if one.difference])
    effects = tuple(_effect(one, scale) for one in shown)
    return Forest(
        group, base.cell.name, scale.at(0), scale.ticks(5), effects, len(others) - len(shown)
    )


def _effect_scale(differences: Sequence) -> Scale:
    """Wide enough for every difference; an interval far wider than the others is cut."""
    values = [0.0, *(one.value for one in differences)]
    halves = [(one.high - one.low) / 2 for one in differences if one.low is not None]
    room = max(
        (max(values) - min(values)) * 0.5, 1.2 * statistics.median(halves) if halves else 0.0
    )
    ends = [end for one in differences if one.low is not None for end in (one.low, one.high)]
    low = max(min(values + ends), min(values) - room)
    high = min(max(values + ends), max(values) + room)
    return scale_over((low, high), 2, 98, margin_share=0.02)


def _effect(one: CellSummary, scale: Scale) -> Effect:
    found = one.difference
    if found is None:
        return Effect(one, None)
    if found.low is None:
        return Effect(one, scale.at(found.value))
    cut = found.low < scale.low, found.high > scale.high
    is_clear = one.p_holm is not None and one.p_holm < CLEAR_P
    return Effect(
        one, scale.at(found.value), scale.at(found.low), scale.at(found.high), *cut, is_clear
    )


# ---- learning curves

PANEL_PX = (250, 160)
PANEL_INNER_PX = (42, 8, 242, 136)  # left, top, right, bottom of what is drawn in


@dataclass(frozen=True)
class Panel:
    """The curves of one cell, as SVG points. base: the mean of the group's base, for comparison."""

    one: CellSummary
    seeds: tuple[str, ...]
    band: str
    mean: str
    base: str


@dataclass(frozen=True)
class CurveFigure:
    """One quantity over the epochs, a panel for each cell, all on the same axes."""

    group: str
    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    panels: tuple[Panel, ...]
    num_left_out: int
    without: tuple[str, ...] = field(default=())


def curve_figures(table: Table, curves: Mapping[str, Curves]) -> tuple[CurveFigure, ...]:
    """Val top-1 and training loss of every group that has curves."""
    figures = []
    for group, cells in table.groups.items():
        for kind, title in (("val_top1", "Top-1 % of val"), ("train_loss", "Training loss, nats")):
            found = [(one, _lines(one, curves, kind)) for one in cells]
            if any(lines for _, lines in found):
                figures.append(_curve_figure(group, title, found))
    return tuple(figures)


def _lines(one: CellSummary, curves: Mapping[str, Curves], kind: str) -> list:
    found = [getattr(curves[row.run], kind) for row in one.rows if row.run in curves]
    return [points for points in found if points]


def _curve_figure(group: str, title: str, found: Sequence[tuple[CellSummary, list]]) -> CurveFigure:
    drawn = [(one, lines) for one, lines in found if lines]
    points = [point for _, lines in drawn for line in lines for point in line]
    left, top, right, bottom = PANEL_INNER_PX
    x = scale_over((x for x, _ in points), left, right, margin_share=0.02)
    y = scale_over((y for _, y in points), bottom, top)
    base = next((lines for one, lines in drawn if one.cell.is_base), [])
    base_mean = _svg([(at, middle) for at, _, middle, _ in _spread(base)], x, y)
    shown = drawn[:MOST_DRAWN]
    panels = tuple(_panel(one, lines, x, y, base_mean) for one, lines in shown)
    without = tuple(one.cell.name for one, lines in found if not lines)
    return CurveFigure(
        group, title, x.ticks(5), y.ticks(5), panels, len(drawn) - len(shown), without
    )


def _panel(one: CellSummary, lines: list, x: Scale, y: Scale, base: str) -> Panel:
    spread = _spread(lines)
    band = [(at, low) for at, low, _, _ in spread] + [
        (at, high) for at, _, _, high in reversed(spread)
    ]
    mean = _svg([(at, middle) for at, _, middle, _ in spread], x, y)
    seeds = tuple(_svg(line, x, y) for line in lines) if len(lines) > 1 else ()
    return Panel(
        one,
        seeds,
        _svg(band, x, y) if len(lines) > 1 else "",
        mean,
        "" if one.cell.is_base else base,
    )


def _spread(lines: list) -> list[tuple[float, float, float, float]]:
    """Where seeds have points: the least, the mean and the greatest of those that are still there."""
    by_x: dict[float, list[float]] = {}
    for line in lines:
        for at, value in line:
            by_x.setdefault(at, []).append(value)
    return [
        (at, min(values), statistics.fmean(values), max(values))
        for at, values in sorted(by_x.items())
    ]


def _svg(points, x: Scale, y: Scale) -> str:
    return " ".join(f"{x.at(at):g},{y.at(value):g}" for at, value in points)


# ---- accuracy against cost

COST_PX = (420, 300)
COST_INNER_PX = (56, 14, 404, 252)
_COSTS = (  # each with its name, its unit, and how many of the row's own make one
    ("train_s", "training time", "s", 1.0),
    ("peak_mem_mib", "peak memory", "MiB", 1.0),
    ("gmacs", "multiply-adds of one image", "G", 1.0),
    ("num_params", "parameters", "M", 1e6),
)
_LABEL_PX = ((9, 4), (-9, 4), (0, -9), (0, 17), (9, -7), (-9, -7), (9, 15), (-9, 15))


@dataclass(frozen=True)
class Point:
    """A cell's mean against its cost. low, high: one standard deviation around it. label_x, label_y: of its number."""

    one: CellSummary
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
    """title: the cost and its unit. front: the line along the cells that no other beats in both."""

    group: str
    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    front: str
    num_left_out: int


def cost_figures(table: Table) -> tuple[CostFigure, ...]:
    """A figure for each group and each cost in which its cells differ."""
    figures = []
    for group, cells in table.groups.items():
        known = [one for one in cells if one.costs and one.mean is not None]
        for key, name, unit, times in _COSTS:
            costs = [getattr(one.costs, key) / times for one in known]
            if len(known) > 1 and max(costs) > min(costs) * 1.005:
                figures.append(_cost_figure(group, name, unit, known, costs, table.metric))
    return tuple(figures)


def is_front(place: int, costs: Sequence[float], gains: Sequence[float]) -> bool:
    """Is no other both at least as cheap and as good, and better in one of the two?"""
    cost, gain = costs[place], gains[place]
    return not any(
        c <= cost and g >= gain and (c < cost or g > gain)
        for c, g in zip(costs, gains, strict=True)
    )


def _cost_figure(
    group: str, name: str, unit: str, cells: list[CellSummary], costs: list[float], metric: Metric
) -> CostFigure:
    gains = [one.mean if metric.is_share else -one.mean for one in cells]
    fronts = [is_front(place, costs, gains) for place in range(len(cells))]
    order = sorted(range(len(cells)), key=lambda place: (not fronts[place], -gains[place]))[
        :MOST_DRAWN
    ]
    left, top, right, bottom = COST_INNER_PX
    x = scale_over((costs[place] for place in order), left, right)
    y = scale_over((end for place in order for end in _ends(cells[place])), bottom, top)
    points, taken = [], [(x.at(costs[place]), y.at(cells[place].mean)) for place in order]
    for place in order:
        points.append(_point(cells[place], (costs[place], unit), fronts[place], x, y, taken))
    along = sorted(
        (point for point in points if point.is_front), key=lambda point: (point.x, -point.y)
    )
    front = " ".join(
        f"{'H' if step % 2 else 'V'}{value:g}"
        for point in along[1:]
        for step, value in ((1, point.x), (0, point.y))
    )
    path = f"M{along[0].x:g},{along[0].y:g} {front}" if len(along) > 1 else ""
    return CostFigure(
        group,
        f"{name}, {unit}",
        x.ticks(5),
        y.ticks(5),
        tuple(points),
        path,
        len(cells) - len(order),
    )


def _ends(one: CellSummary) -> tuple[float, ...]:
    return (one.mean,) if one.std is None else (one.mean - one.std, one.mean + one.std)


def _point(
    one: CellSummary, cost: tuple[float, str], front: bool, x: Scale, y: Scale, taken: list
) -> Point:
    """A point and, where there is room, its number."""
    at, up = x.at(cost[0]), y.at(one.mean)
    places = [
        (round(at + dx, 2), round(up + dy, 2), "start" if dx > 0 else "end" if dx < 0 else "middle")
        for dx, dy in _LABEL_PX
    ]
    best = max(
        places,
        key=lambda place: min(
            [_apart(place, other) for other in taken if other != (at, up)], default=99.0
        ),
    )
    taken.append((best[0], best[1] - 4))
    low, high = (y.at(end) for end in _ends(one)) if one.std is not None else (None, None)
    told = f"{cost[0]:,.0f}" if cost[0] >= 100 else f"{cost[0]:.3g}"
    return Point(one, f"{told} {cost[1]}", at, up, low, high, front, *best)


def _apart(label: tuple, other: tuple[float, float]) -> float:
    """How far a number's middle is from another mark, up to what is enough."""
    shift = {"start": 5, "end": -5, "middle": 0}[label[2]]
    return min(14.0, math.hypot(label[0] + shift - other[0], label[1] - 4 - other[1]))
