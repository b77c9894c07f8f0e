"""Plots of an LR finder's result: a matplotlib figure, and braille dots in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogFormatter, MaxNLocator
from rich.console import Console
from rich.text import Text

from trainer.lr_finder.rules import (
    RULES,
    BaselineLosses,
    Curve,
    Spread,
    is_even,
    series,
    start_of,
)
from trainer.notebook import NotebookFigure

# Okabe and Ito 2008, "Color universal design": told apart by every kind of colour vision.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, GREY = "#CC79A7", "#6E6E6E"
WIDTH_PX, DPI = 900, 100
_WORDS = {"train": "training micro-batches", "heldout": "the held-out slice"}
_COLOURS, _STYLES = {"train": BLUE, "heldout": VERMILLION}, {"train": "blue", "heldout": "red"}
_MARKS: dict[
    str, Any
] = {  # colour, line style and line width in the picture; letter and style in the terminal
    "recommended": (GREEN, "-", 2.4, "┃", "bold green"),
    "recipe": ("black", (0, (5, 2, 1, 2)), 1.3, "┊", "bold"),
    "largest stable": (PURPLE, "--", 1.5, None, None),
}
# of the axis of losses, as a share of where they start: less would make hills of noise
_LEAST_HEIGHT = 0.05
# of that axis: what is below the cut, what is above it, between two labels
_LINEAR_SHARE, _LOG_SHARE, _LEAST_BETWEEN = 0.7, 0.3, 0.07
_ROW_PX = 17  # between two rows of labels
# for the title and three rows of labels; for the axis and the legend
_ABOVE_PX, _BELOW_PX = 108, 100
_PLOT_ROWS, _LEAST_COLUMNS, _MOST_COLUMNS = 14, 30, 100
# of a braille letter, column by column: Unicode's order
_DOTS = (0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80)


class PlainLogFormatter(LogFormatter):
    """Labels of a logarithmic axis as plain numbers: matplotlib's powers want fonts of mathematics,
    which not every machine has.
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick; empty for one that has none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def median_curve(curves: list[Curve], which: str) -> tuple[np.ndarray, np.ndarray]:
    """The median over ramps of their losses as measured, at the values that at least half of them
    reached.
    """
    by_value: dict[float, list[float]] = {}
    for curve in curves:
        values, losses = series(curve, which)
        for value, loss in zip(values.tolist(), losses.tolist(), strict=True):
            by_value.setdefault(value, []).append(loss)
    reached = sorted(value for value, losses in by_value.items() if 2 * len(losses) >= len(curves))
    return np.array(reached), np.array([np.median(by_value[value]) for value in reached])


def baseline_of(baselines: BaselineLosses, which: str) -> float | None:
    """The level of one of the two curves."""
    return baselines.train if which == "train" else baselines.held_out


def median_curves(found) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The median of the curves that the rules read, "train" before "heldout", as far as there are
    any.
    """
    medians = {
        which: median_curve(_ramps(found), which)
        for which in _WORDS
        if found.asked["curve"] in (which, "both")
    }
    return {which: median for which, median in medians.items() if len(median[0])}


def _ramps(found) -> list[Curve]:
    return [curve for curve in found.suggestion.curves if curve.purpose == "ramp"]


def draw(found) -> NotebookFigure:
    """A LRFinderResult as a matplotlib Figure, 900 px wide: losses above, then the rules over
    seeds, then the candidates.
    """
    suggestion = found.suggestion
    ratios = [3.0, 1.05, 1.25] if suggestion.candidates else [3.0, 1.05]
    below_px = _BELOW_PX + _ROW_PX * any(one.is_cut for one in suggestion.candidates)
    height_px = _ABOVE_PX + below_px + 95 * sum(ratios)
    figure = NotebookFigure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI)
    grid = {"height_ratios": ratios, "hspace": 0.14, "left": 0.115, "right": 0.975}
    grid |= {"top": 1 - _ABOVE_PX / height_px, "bottom": below_px / height_px}
    panels = figure.subplots(len(ratios), 1, sharex=True, gridspec_kw=grid)
    _draw_losses(panels[0], found)
    _draw_rules(panels[1], found)
    if suggestion.candidates:
        _draw_candidates(panels[2], found)
    for panel in panels:
        panel.set_axisbelow(True)
        panel.grid(visible=True, color="#E4E4E4", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        for name, value in marks(found).items():
            colour, style, width, *_ = _MARKS[name]
            panel.axvline(value, color=colour, linestyle=style, linewidth=width, zorder=1.5)
        if suggestion.value is not None and suggestion.interval:
            ends = suggestion.interval.lowest, suggestion.interval.highest
            panel.axvspan(*ends, color=GREEN, alpha=0.15, linewidth=0, zorder=0.5)
        panel.yaxis.set_label_coords(-0.085, 0.5)
    panels[-1].set_xlabel(axis_name(found))
    figure.suptitle(title(found), fontsize=11, x=0.012, y=1 - 8 / height_px, ha="left", va="top")
    drawn = [line for panel in panels for line in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=drawn, loc="lower center", ncols=2, fontsize=8.5, frameon=False)
    _label_marks(panels[0], found)
    return figure


def title(found) -> str:
    """What was tested and what came out, in two lines."""
    plan, value = found.plan, found.suggestion.value
    answer = "no reliable suggestion"
    if value is not None:
        answer = f"recommended {value:.3g}{interval_text(found.suggestion.interval)}"
    return (
        f"{plan.recipe.name}.v{plan.recipe.version} on {plan.model}, {plan.profile.name},"
        f" {plan.recipe.batch.images} images per step\n{found.scalar.label}: {answer}"
    )


def interval_text(interval: Spread | None) -> str:
    """What single seeds say, after the value: `, 0.012 to 0.018 over 3 seeds`; empty for one."""
    if interval is None or interval.num_seeds < 2:
        return ""
    return f", {interval.lowest:.3g} to {interval.highest:.3g} over {interval.num_seeds} seeds"


def axis_name(found) -> str:
    """The label of the axis of values."""
    return "learning rate" if found.scalar.is_rate else found.scalar.label


def marks(found) -> dict[str, float]:
    """The values that stand out and lie on the axis, by name, the most important first."""
    named = found.suggestion.value, found.scalar.own, found.suggestion.stable
    return {
        name: value
        for name, value in zip(_MARKS, named, strict=True)
        if value is not None and found.values[0] <= value <= found.values[-1]
    }


def _draw_losses(panel, found) -> None:
    ramps, medians = _ramps(found), median_curves(found)
    for which, median in medians.items():
        for ramp in ramps:
            panel.plot(*series(ramp, which), color=_COLOURS[which], linewidth=0.7, alpha=0.35)
        label = f"{_WORDS[which]}, median of {len(ramps)}" if len(ramps) > 1 else _WORDS[which]
        panel.plot(*median, color=_COLOURS[which], linewidth=2.4, label=label)
    if medians:
        baselines = _draw_baselines(panel, found.suggestion.baselines, list(medians))
        axis = LossAxis.of([losses for _, losses in medians.values()], baselines)
        panel.set_yscale("function", functions=(axis.place, axis.loss_at))
        panel.set_ylim(axis.low, axis.top)
        panel.set_yticks(axis.ticks(), [f"{tick:g}" for tick in axis.ticks()])
        panel.minorticks_off()
        if axis.is_broken:
            panel.axhspan(axis.cut, axis.top, color="#F1F1F1", linewidth=0, zorder=0)
            look = {"fontsize": 8, "color": GREY, "va": "top", "backgroundcolor": "#F1F1F1"}
            said = "here the scale is logarithmic, and rules count a loss as that of the start"
            place = 0.012, 0.965
            panel.text(*place, said, transform=panel.transAxes, **look)
    panel.set_ylabel("loss (nats)")
    if not is_even(found.values):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(PlainLogFormatter())
        panel.xaxis.set_minor_formatter(PlainLogFormatter(labelOnlyBase=False))
    panel.set_xlim(found.values[0], found.values[-1])


@dataclass(frozen=True)
class LossAxis:
    """Where a loss stands on the upright axis, from 0 at `low` to 1 at `top`: linear up to `cut`,
    logarithmic above, so that both a valley and an explosion can be read.

    cut: the level of the curves' beginning with some room, where rules cut them. It is the top
    where no curve goes far beyond.
    """

    low: float
    cut: float
    top: float

    @classmethod
    def of(cls, curves: Sequence[np.ndarray], others: Sequence[float] = ()) -> LossAxis:
        """For curves [m] of losses, and levels that must be seen too."""
        least = min([*(float(losses.min()) for losses in curves), *others])
        start = max([*(start_of(losses) for losses in curves), *others])
        most = max(float(losses.max()) for losses in curves)
        height = max(start - least, _LEAST_HEIGHT * abs(start)) or 1.0
        low, cut = least - 0.12 * height, start + 0.15 * height
        if most <= cut + 0.3 * height:
            return cls(low, max(cut, most), max(cut, most))
        return cls(low, cut, cut + 1.5 * (most - cut))

    @property
    def is_broken(self) -> bool:
        """Are there losses above the cut, so that the axis has a second part?"""
        return self.top > self.cut

    @property
    def _heights(self) -> float:
        """The broken part in units of the linear one's height."""
        return (self.top - self.cut) / (self.cut - self.low)

    def place(self, losses):
        """[n] losses to places on the axis."""
        linear = (np.asarray(losses, dtype=float) - self.low) / (self.cut - self.low)
        if not self.is_broken:
            return linear
        above = np.log1p(np.maximum(linear - 1, 0)) / math.log1p(self._heights)
        return np.where(linear <= 1, _LINEAR_SHARE * linear, _LINEAR_SHARE + _LOG_SHARE * above)

    def loss_at(self, places):
        """[n] places to losses: the other way round."""
        places = np.asarray(places, dtype=float)
        linear = places / _LINEAR_SHARE if self.is_broken else places
        if self.is_broken:
            share = np.maximum(places - _LINEAR_SHARE, 0) / _LOG_SHARE
            linear = np.where(linear <= 1, linear, 1 + np.expm1(share * math.log1p(self._heights)))
        return self.low + linear * (self.cut - self.low)

    def ticks(self) -> list[float]:
        """Even ones in the linear part, powers of ten above it, none near another."""
        even = MaxNLocator(6).tick_values(self.low, self.cut)
        ticks = [float(tick) for tick in even if self.low <= tick <= self.cut]
        powers = [10.0**power for power in range(-9, 39)] if self.is_broken else []
        for tick in powers:
            is_free = self.place(tick) - self.place(ticks[-1]) > _LEAST_BETWEEN
            if self.cut < tick <= self.top and is_free:
                ticks.append(tick)
        return ticks


def _draw_baselines(panel, baselines: BaselineLosses, shown: Sequence[str]) -> list[float]:
    """The levels of knowing nothing but the classes' shares: one line where both curves have the
    same.
    """
    found = {which: baseline_of(baselines, which) for which in shown}
    levels = {which: level for which, level in found.items() if level is not None}
    if len(levels) == 2 and np.isclose(levels["train"], levels["heldout"], rtol=0.01):
        levels = {"both": levels["train"]}
    for which, level in levels.items():
        label = f"baseline loss of a constant prediction: {level:.3g} nats"
        colour = _COLOURS.get(which, "black")
        panel.axhline(level, color=colour, linestyle=":", linewidth=1.4, label=label)
    return list(levels.values())


def _draw_rules(panel, found) -> None:
    suggestion = found.suggestion
    has_level = any(baseline_of(suggestion.baselines, which) for which in median_curves(found))
    rows: dict[str, Spread | None] = {**suggestion.rules, "edge": suggestion.edge}
    line = {"color": GREY, "linewidth": 3.5, "solid_capstyle": "round", "alpha": 0.6}
    dot = {"color": ORANGE, "markersize": 6, "markeredgecolor": "black"}
    for place, (name, spread) in enumerate(rows.items()):
        if spread:
            panel.plot([spread.lowest, spread.highest], [place, place], **line)
            panel.plot([spread.median], [place], "o", **dot)
        else:
            look = {"fontsize": 8, "color": GREY, "va": "center", "backgroundcolor": "white"}
            is_below = has_level and name in RULES and not name.startswith("edge")
            why = ": only points below the dotted baseline count" if is_below else ""
            at = {"transform": panel.get_yaxis_transform()}
            panel.text(0.01, place, f"no value{why}", **at, **look)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    panel.set_ylim(len(rows) - 0.4, -0.6)


def _draw_candidates(panel, found) -> None:
    candidates, top = found.suggestion.candidates, _highest_shown(found)
    dot = {"markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.6, "clip_on": False}
    for candidate in candidates:
        for loss in candidate.losses.values():
            marker = "o" if loss <= top else "^"
            panel.plot([candidate.value], [min(loss, top)], marker, color=GREY, **dot)
    values, line = [one.value for one in candidates], {"color": GREY, "linewidth": 1, "zorder": 1}
    is_cut = any(one.is_cut for one in candidates)
    label = "candidates: mean" if is_cut else None
    panel.plot(values, [min(one.mean, top) for one in candidates], label=label, **line)
    if is_cut:
        counted = [min(one.counted, top) for one in candidates]
        panel.plot(values, counted, label="candidates: counted as", linestyle="--", **line)
    length = found.asked["lengths"]["num_race_steps"]
    panel.set_ylabel(f"candidates: held-out\nloss, {length} steps", fontsize=8.5)
    panel.margins(y=0.18)


def _highest_shown(found) -> float:
    """The highest loss that the candidates' panel shows: what is above it, or diverged, stands
    there as a triangle.
    """
    all_losses = [loss for one in found.suggestion.candidates for loss in one.losses.values()]
    losses = [loss for loss in all_losses if math.isfinite(loss)]
    starts = [
        curve.start_loss
        for curve in found.suggestion.curves
        if curve.purpose == "race" and curve.start_loss is not None
    ]
    if not losses:
        return max(starts, default=1.0)
    return max(min(max(losses), 1.2 * max(starts, default=max(losses))), min(losses))


def _label_marks(panel, found) -> None:
    """A label above each marked line, in as many rows as it takes for no two to touch."""
    axes = panel.get_window_extent()
    placed: list[Any] = []
    look = {"fontsize": 9, "fontweight": "bold", "ha": "center", "va": "bottom"}
    look["transform"] = panel.get_xaxis_transform()
    for name, value in marks(found).items():
        text = panel.text(value, 1.02, f"{name} {value:.3g}", color=_MARKS[name][0], **look)
        box = text.get_window_extent()
        if box.x0 < axes.x0:  # it would stick out
            text.set_ha("left")
        elif box.x1 > axes.x1:
            text.set_ha("right")
        row = 0
        while any(text.get_window_extent().padded(6, 0).overlaps(other) for other in placed):
            row += 1
            text.set_y(1.02 + row * _ROW_PX / axes.height)
        placed.append(text.get_window_extent())


def plot_columns(out: Console) -> int:
    """How many letters wide the plot is, beside its levels."""
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, out.width - 14))


def plot(found, num_columns: int) -> list[Text]:
    """The median curves over the ramp's values in braille dots, with lines where the value and the
    recipe's own one stand.
    """
    medians = median_curves(found)
    if not medians:
        return [Text("no curve: the loss was NaN or infinite from the first step on")]
    levels = LossAxis.of([losses for _, losses in medians.values()])
    column = _column_of(found.values, 2 * num_columns)
    grid = np.zeros((_PLOT_ROWS, num_columns), dtype=int)
    styles = [[""] * num_columns for _ in range(_PLOT_ROWS)]
    for which, (values, losses) in medians.items():
        columns = [column(value) for value in values]
        _trace(grid, styles, columns, levels.place(losses), _STYLES[which])
    upright = {
        column(value) // 2: _MARKS[name][3:] for name, value in reversed(_plotted(found).items())
    }
    lines = [
        _row(grid[row], styles[row], upright, _level(row, levels)) for row in range(_PLOT_ROWS)
    ]
    return [*lines, _axis(found.values, column, num_columns), _legend(list(medians), found)]


def _plotted(found) -> dict[str, float]:
    """The marks that have a letter in the terminal."""
    return {name: value for name, value in marks(found).items() if _MARKS[name][3]}


def _column_of(values: np.ndarray, num_dots: int) -> Callable[[float], int]:
    """Where on the axis of the terminal's plot a value stands."""
    place = float if is_even(values) else math.log
    ends = place(values[0]), place(values[-1])
    return lambda value: round(float(np.interp(place(value), ends, (0, num_dots - 1))))


def _trace(
    grid: np.ndarray,
    styles: list[list[str]],
    columns: list[int],
    places: np.ndarray,
    style: str,
) -> None:
    """Put a line of dots into the grid. places: [n] of the axis, 0 at the bottom and 1 at the
    top.
    """
    num_dots = 4 * len(grid)
    before = None
    for dot in range(columns[0], columns[-1] + 1):
        share = 1 - float(np.interp(dot, columns, places))
        now = min(num_dots - 1, max(0, int(share * (num_dots - 1) + 0.5)))
        start = now if before is None else before + (now > before) - (now < before)
        # a steep piece has no gaps
        for from_top in range(min(start, now), max(start, now) + 1):
            grid[from_top // 4, dot // 2] |= _DOTS[dot % 2][from_top % 4]
            styles[from_top // 4][dot // 2] = style
        before = now


def _level(row: int, levels: LossAxis) -> str:
    shown = [0, _PLOT_ROWS // 2, _PLOT_ROWS - 1]
    if levels.is_broken:
        shown.append(round((1 - _LINEAR_SHARE) * (_PLOT_ROWS - 1)))
    if row not in shown:
        return " " * 9
    return f"{float(levels.loss_at(1 - row / (_PLOT_ROWS - 1))):9.4g}"


def _row(dots: np.ndarray, styles: list[str], upright: dict[int, Any], level: str) -> Text:
    line = Text(f"{level} │")
    for column, pattern in enumerate(dots):
        if pattern:
            line.append(chr(0x2800 + int(pattern)), styles[column])
        else:
            line.append(*upright.get(column, (" ", "")))
    return line


def _axis(values: np.ndarray, column: Callable[[float], int], num_columns: int) -> Text:
    """Powers of ten below the plot, as many as fit; on an evenly spaced ramp the two ends and the
    middle.
    """
    first, last = float(values[0]), float(values[-1])
    ticks = [first, (first + last) / 2, last]
    if not is_even(values):
        low, high = math.log10(first) - 1e-9, math.log10(last) + 1e-9
        ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    letters = [" "] * (num_columns + 12)
    free_from = 0
    for tick in ticks:
        label = f"{tick:g}"
        start = max(0, 11 + column(tick) // 2 - len(label) // 2)
        if start >= free_from and start + len(label) <= len(letters):
            letters[start : start + len(label)] = label
            free_from = start + len(label) + 1
    return Text("".join(letters).rstrip())


def _legend(drawn: Sequence[str], found) -> Text:
    line = Text(" " * 11)
    for which in drawn:
        line.append("⠒⠒ ", _STYLES[which]).append(f"loss on {_WORDS[which]}   ")
    for name, value in _plotted(found).items():
        letter, style = _MARKS[name][3:]
        line.append(f"{letter} ", style).append(f"{name} {value:.3g}   ")
    return line
