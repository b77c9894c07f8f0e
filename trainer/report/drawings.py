"""Figures for papers and talks: effects, learning curves, scores against cost, as SVG, PDF or PNG.

Text stays text: SVG names its font, PDF embeds it. Colours are Okabe and Ito's, which colour-blind
readers tell apart, and every colour comes with a dash or a marker of its own. No clock is read:
the same rows give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.stats import Difference
from trainer.report.curve_figures import MAX_LINES, Quantity, quantities, spread_of
from trainer.report.curves import Curves
from trainer.report.effects import FactorEffect
from trainer.report.figures import (
    MAX_CELLS,
    SIGNIFICANT_P,
    Trade,
    effect_range,
    most_different,
    scale_over,
    trades,
)
from trainer.report.formats import cell_text, difference_text
from trainer.report.tables import CellSummary, Table
from trainer.report.view import make_view

FORMATS = ("svg", "pdf", "png")
_STYLE: Any = {  # matplotlib's stubs list every key
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "svg.fonttype": "none",  # text, not outlines
    "svg.hashsalt": "rsb",  # names in the file that do not change from call to call
    "pdf.fonttype": 42,  # whole TrueType fonts: publishers refuse Type 3
    "savefig.dpi": 300,
}
# Okabe and Ito 2008, black first: it is the base's
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_GREY = "#606060"
# of an effect without an interval, whose colour and shape no other mark has
_NO_INTERVAL: dict[str, Any] = {
    "marker": "s", "linestyle": "", "markersize": 4.5, "markerfacecolor": "white",
}  # fmt: skip
_NAME_CHARS = 34  # of a cell's name in one line


class NothingToDraw(UserError):
    """A table has not what a figure shows."""


def save_figure(
    table: Table, curves: Mapping[str, Curves], what: str, width_in: float, paths: Sequence[Path]
) -> None:
    """Draw a figure of a table and write it, each path in the format of its suffix.

    width_in: in inches; the height follows from what is drawn.

    Raises NothingToDraw, and UserError for a file that cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        figure = FIGURES[what](table, curves, width_in)
        for path in paths:
            file, kind = io.BytesIO(), path.suffix[1:]
            undated: dict[str, Any] = {
                "svg": {"Date": None},
                "pdf": {"CreationDate": None},
                "png": {},
            }
            figure.savefig(file, format=kind, metadata=undated[kind])
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, file.getvalue())
            except OSError as error:
                raise UserError(
                    f"out={path}: cannot be written ({error.strerror})", "name another"
                ) from None


# ---- effects


def draw_effects(table: Table, curves: Mapping[str, Curves], width_in: float) -> Figure:
    """The differences of all cells to the base of their group, and of a full design its main
    effects and interactions below them, with their intervals.
    """
    groups = [
        (group, cells)
        for group, cells in table.groups.items()
        if any(summary.difference for summary in cells)
    ]
    if not groups:
        raise NothingToDraw(
            f"{table.name}: no cell has a difference to its base", "run more of its cells"
        )
    forests = [forest for group, cells in groups for forest in _forests(table, group, cells)]
    rows = [sum(1 + _wrapped(one.name).count("\n") * 0.6 for one in f.lines) for f in forests]
    height_in = 0.19 * sum(rows) + 0.62 * len(rows) + 0.3
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[n + 1 for n in rows])
    used: set[str] = set()
    for panel, forest in zip(panels[:, 0], forests, strict=True):
        used |= _draw_forest(panel, forest.lines)
        panel.set_xlabel(forest.axis)
        if len(groups) > 1:
            panel.set_title(forest.group, loc="left", fontweight="bold")
    _legend(figure, [key for name, key in _effect_keys().items() if name in used], width_in)
    return figure


@dataclass(frozen=True)
class _ForestLine:
    """A line of a forest plot. text: the difference with its interval, or why there is none."""

    name: str
    difference: Difference | None
    p_holm: float | None
    text: str


@dataclass(frozen=True)
class _Forest:
    """What one panel shows. axis: the label of its differences."""

    group: str
    axis: str
    lines: tuple[_ForestLine, ...]


def _forests(table: Table, group: str, cells: Sequence[CellSummary]) -> Iterator[_Forest]:
    """A group's cells against their base; then its main effects and interactions, if it has any."""
    what = f"points of {table.metric.label}" if table.metric.is_share else table.metric.heading
    base = next(one.cell.name for one in cells if one.cell.is_base)
    view = make_view(table)
    shown = most_different([one for one in cells if not one.cell.is_base], MAX_CELLS)
    lines = (
        _ForestLine(
            one.cell.name,
            one.difference,
            one.p_holm,
            cell_text(view, one, "difference" if one.difference else "mean"),
        )
        for one in shown
    )
    axis = f"difference to {_wrapped(base, 2 * _NAME_CHARS)}, {what}"
    yield _Forest(group, axis, tuple(lines))
    effects = [one for one in table.effects if one.group == group][:MAX_CELLS]
    if any(one.difference for one in effects):
        effect_lines = tuple(_effect_line(one, table) for one in effects)
        yield _Forest(group, f"main effects and interactions, {what}", effect_lines)


def _effect_line(effect: FactorEffect, table: Table) -> _ForestLine:
    text = difference_text(effect.difference, table.metric) if effect.difference else "no value"
    name = f"{effect.factors}: {effect.name}"
    return _ForestLine(name, effect.difference, effect.p_holm, text)


def _draw_forest(panel: Axes, lines: Sequence[_ForestLine]) -> set[str]:
    """One line per difference; what lies beyond the axis is an arrow at its edge, with its value.
    Gives those of _effect_keys that were drawn.
    """
    used = set()
    found = [one.difference for one in lines if one.difference]
    scale = scale_over(effect_range(found), 0, 1, margin_share=0.03)
    panel.set_xlim(scale.low, scale.high)
    panel.set_ylim(len(lines) - 0.4, -0.6)
    panel.axvline(0, color="#808080", linewidth=0.8, zorder=1)
    panel.set_yticks(range(len(lines)), [_wrapped(one.name) for one in lines])
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    for y, line in enumerate(lines):
        difference = line.difference
        if difference is None:
            panel.text(
                0.5, y, line.text, transform=panel.get_yaxis_transform(),
                ha="center", va="center", style="italic", color=_GREY,
            )  # fmt: skip
            continue
        value, colour = difference.value, _COLOURS[1]
        if difference.interval:
            ends = [min(max(end, scale.low), scale.high) for end in difference.interval]
            panel.plot(ends, [y, y], color=colour, solid_capstyle="butt")
        low, high = difference.interval or (value, value)
        for is_cut, at, marker in ((low < scale.low, 0, "<"), (high > scale.high, 1, ">")):
            if is_cut:
                used.add("beyond")
                _draw_arrow(panel, at, y, marker)
        if not scale.has(value):
            side = "left" if value < scale.low else "right"
            panel.annotate(
                line.text.replace("-", "−"), (0 if side == "left" else 1, y),
                xycoords=panel.get_yaxis_transform(), textcoords="offset points",
                xytext=(9 if side == "left" else -9, 0), ha=side, va="center", color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            continue
        if difference.interval:
            is_clear = line.p_holm is not None and line.p_holm < SIGNIFICANT_P
            used.add("clear" if is_clear else "unclear")
            hollow: dict[str, Any] = {} if is_clear else {"markerfacecolor": "white"}
            panel.plot(value, y, "o", color=colour, markersize=4.5, **hollow)
        else:
            used.add("no interval")
            _draw_without_interval(panel, y, difference, is_right=scale.at(value) > 0.5)
    return used


def _draw_arrow(panel: Axes, at: int, y: int, marker: str) -> None:
    """An arrow just inside of an edge: beyond it are the names. at: 0 or 1, of the axis' length."""
    assert isinstance(panel.figure, Figure)
    inwards = ScaledTranslation((3 if at == 0 else -3) / 72, 0, panel.figure.dpi_scale_trans)
    panel.plot(
        at, y, marker, color=_COLOURS[1], markersize=4, clip_on=False,
        transform=panel.get_yaxis_transform() + inwards,
    )  # fmt: skip


def _draw_without_interval(panel: Axes, y: int, difference: Difference, is_right: bool) -> None:
    """A mark that is not taken for one whose interval is too narrow to see: grey, hollow, and it
    says beside it why it has none. is_right: it is in the right half, and its words go left.
    """
    panel.plot(difference.value, y, color=_GREY, **_NO_INTERVAL)
    panel.annotate(
        "n = 1" if difference.kind == "single" else "does not vary", (difference.value, y),
        xytext=(-6 if is_right else 6, 0), textcoords="offset points", fontsize=6, color=_GREY,
        ha="right" if is_right else "left", va="center_baseline",
    )  # fmt: skip


def _effect_keys() -> dict[str, Artist]:
    mark: dict[str, Any] = {"color": _COLOURS[1], "markersize": 4.5}
    hollow = mark | {"markerfacecolor": "white"}
    return {
        "clear": Line2D([], [], marker="o", label=f"p < {SIGNIFICANT_P} (Holm)", **mark),
        "unclear": Line2D([], [], marker="o", label=f"p ≥ {SIGNIFICANT_P}", **hollow),
        "no interval": Line2D([], [], label="no interval", color=_GREY, **_NO_INTERVAL),
        "beyond": Line2D([], [], marker=">", linestyle="", label="beyond the axis", **mark),
    }


# ---- learning curves


def draw_curves(table: Table, curves: Mapping[str, Curves], width_in: float) -> Figure:
    """All cells by epoch, means over seeds with the range over seeds; each loss on its own axis."""
    found = quantities(table, curves)
    if not found:
        raise NothingToDraw(
            f"{table.name}: no row has curves", "name the folder of its run folders by runs="
        )
    styles = _styles(table)
    num_columns = 2 if width_in >= 4 and len(found) > 1 else 1
    figure, panels = _grid(len(found), num_columns, width_in, 1.95)
    for panel, quantity in zip(panels, found, strict=True):
        _draw_quantity(panel, quantity, styles)
        if len(table.groups) > 1:
            panel.set_title(quantity.group, loc="left", fontweight="bold")
    drawn = {summary.cell.name for quantity in found for summary, _ in quantity.lines}
    keys = [
        Line2D([], [], label=_wrapped(name), color=colour, linestyle=dash)
        for name, (colour, dash, _) in styles.items()
        if name in drawn
    ]
    _legend(figure, keys, width_in)
    return figure


def _draw_quantity(panel: Axes, quantity: Quantity, styles: Mapping[str, tuple]) -> None:
    y = scale_over(quantity.y_range(), 0, 1)
    panel.set_xlim(0, math.ceil(quantity.last_epoch()))
    panel.set_ylim(y.low, y.high)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel(quantity.axis)
    beyond = []
    for summary, lines in quantity.lines:
        if summary.cell.name not in styles:
            continue
        colour, dash, _ = styles[summary.cell.name]
        spread = spread_of(lines)
        epochs, lows, means, highs = zip(*spread, strict=True)
        panel.plot(epochs, means, color=colour, linestyle=dash)
        if len(lines) > 1:
            panel.fill_between(epochs, lows, highs, color=colour, alpha=0.13, linewidth=0)
        if not y.has(means[-1]):
            beyond.append(f"{summary.cell.name} ends at {means[-1]:.4g}")
    if beyond:
        text = "\n".join(textwrap.wrap(f"beyond the axis: {'; '.join(beyond)}", 44))
        panel.set_title(text, fontsize=6.5, loc="right", color="#404040")


# ---- scores against cost


def draw_costs(table: Table, curves: Mapping[str, Curves], width_in: float) -> Figure:
    """The mean score of all cells against each cost in which they differ."""
    found = trades(table)
    if not found:
        raise NothingToDraw(
            f"{table.name}: its cells differ in no cost by more than its spread",
            "use what=effects or what=curves",
        )
    styles = _styles(table)
    num_columns = 2 if width_in >= 4 and len(found) > 1 else 1
    figure, panels = _grid(len(found), num_columns, width_in, 2.05)
    for panel, trade in zip(panels, found, strict=True):
        _draw_trade(panel, trade, styles)
        panel.set_xlabel(trade.axis)
        if trade.warning:
            panel.set_title("times do not compare", fontsize=6.5, loc="right", color="#404040")
        panel.set_ylabel(table.metric.heading)
        if len(table.groups) > 1:
            panel.set_title(trade.group, loc="left", fontweight="bold")
    drawn = {one.summary.cell.name for trade in found for one in trade.cells}
    keys: list[Artist] = [
        Line2D([], [], label=_wrapped(name), color=colour, marker=marker, linestyle="")
        for name, (colour, _, marker) in styles.items()
        if name in drawn
    ]
    if any(one.summary.std is None for trade in found for one in trade.cells):
        hollow: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "white"}
        keys.append(Line2D([], [], label="hollow: one seed", color=_GREY, **hollow))
    if any(sum(one.is_front for one in trade.cells) > 1 for trade in found):
        keys.append(Line2D([], [], label="Pareto front", color=_GREY, linewidth=0.8))
    _legend(figure, keys, width_in)
    return figure


def _draw_trade(panel: Axes, trade: Trade, styles: Mapping[str, tuple]) -> None:
    """A marker per cell with one standard deviation over seeds and the range of its cost, hollow
    where one seed has no spread; one beyond the axes stands at their edge with its values.
    """
    x, y = scale_over(trade.x_range(), 0, 1), scale_over(trade.y_range(), 0, 1)
    panel.set_xlim(x.low, x.high)
    panel.set_ylim(y.low, y.high)
    for one in trade.cells:
        if one.summary.cell.name not in styles:
            continue
        colour, _, marker = styles[one.summary.cell.name]
        at = min(max(one.cost, x.low), x.high), min(max(one.mean, y.low), y.high)
        hollow: dict[str, Any] = {"markerfacecolor": "white"} if one.summary.std is None else {}
        panel.plot(
            *at, marker=marker, color=colour, markersize=5, clip_on=False, zorder=3, **hollow
        )
        if at != (one.cost, one.mean):
            side = "left" if x.at(one.cost) < 0.5 else "right"
            panel.annotate(
                f"{one.mean:.4g} at {one.cost_text} {trade.unit}", at, fontsize=6, color=colour,
                xytext=(6 if side == "left" else -6, 4), textcoords="offset points", ha=side,
            )  # fmt: skip
            continue
        panel.plot([one.cost] * len(one.one_std), one.one_std, color=colour, linewidth=0.8)
        panel.plot([one.low, one.high], [one.mean] * 2, color=colour, linewidth=0.8)
    front = sorted((one for one in trade.cells if one.is_front), key=lambda one: one.cost)
    if len(front) > 1:
        panel.step(
            [one.cost for one in front], [one.mean for one in front],
            where="post", color=_GREY, linewidth=0.8, zorder=1,
        )  # fmt: skip


# ---- what they share

FIGURES: dict[str, Callable[[Table, Mapping[str, Curves], float], Figure]] = {
    "effects": draw_effects,
    "curves": draw_curves,
    "cost": draw_costs,
}


def explanation(table: Table, what: str) -> str:
    """What the bars and bands of a figure are, in one line."""
    return {"effects": _of_effects, "curves": _of_curves, "cost": _of_costs}[what](table)


def _of_effects(table: Table) -> str:
    if not table.num_compared:
        return "no bars: nothing here has a spread over seeds to make an interval of"
    over = f"Bonferroni over {table.num_compared}" if table.num_compared > 1 else "Student's t"
    line = (
        f"bars: confidence intervals of the differences, at 95 % together ({over}); filled: "
        f"p < {SIGNIFICANT_P} (Holm)"
    )
    num_effects = sum(effect.p_holm is not None for effect in table.effects)
    if num_effects:
        line += (
            "; main effects are averages over the other factors' levels, their bars at 95 % "
            f"together (Bonferroni over {num_effects})"
        )
    return line


def _of_curves(table: Table) -> str:
    return "lines: means over seeds; bands: from the lowest to the highest seed"


def _of_costs(table: Table) -> str:
    return (
        "marks: means over seeds; bars: one standard deviation of the score, the lowest to the "
        "highest cost over seeds"
    )


def _styles(table: Table) -> dict[str, tuple[str, Any, str]]:
    """(colour, dash, marker) by the cell's name, the same in every figure: black for bases, the
    others each of their own; at most MAX_LINES of a group.
    """
    styles = {}
    for cells in table.groups.values():
        others = _other_styles()
        for summary in most_different(cells, MAX_LINES):
            is_base = summary.cell.is_base
            styles[summary.cell.name] = ("#000000", "-", "o") if is_base else next(others)
    return styles


def _other_styles() -> Iterator[tuple[str, Any, str]]:
    colours = _COLOURS[1:]
    for number in range(MAX_LINES):
        dash = _DASHES[number // len(colours) % len(_DASHES)]
        yield colours[number % len(colours)], dash, _MARKERS[1 + number % (len(_MARKERS) - 1)]


def _grid(number: int, num_columns: int, width_in: float, row_in: float) -> tuple[Figure, list]:
    """A figure with so many panels, row by row; a last row that is not full stays so."""
    num_rows = -(-number // num_columns)
    figure = Figure(figsize=(width_in, row_in * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, num_columns)
    return figure, [figure.add_subplot(grid[divmod(index, num_columns)]) for index in range(number)]


def _legend(figure: Figure, keys: Sequence[Artist], width_in: float) -> None:
    """A legend below the panels, in as many columns as fit; the figure grows by its height."""
    for num_columns in range(min(6, len(keys)), 0, -1):
        legend = figure.legend(
            handles=keys, loc="outside lower center", ncols=num_columns, frameon=False,
            handlelength=2.2, columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= width_in * figure.dpi or num_columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()


def _wrapped(name: str, width: int = _NAME_CHARS) -> str:
    """A name in lines, its dollar signs no mathematics."""
    lines = textwrap.wrap(" ".join(name.split()).replace("$", r"\$"), width)
    return "\n".join(lines)
