"""Plots of an LR finder's result: a matplotlib figure, and braille dots in the terminal."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console
from rich.text import Text

from trainer.lr_finder.rules import BaselineLosses, Curve, Spread, series, smoothed, smoothing_for
from trainer.notebook import NotebookFigure

# Okabe and Ito 2008, "Color universal design": told apart by every kind of colour vision.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#6E6E6E",
)
WIDTH_PX, DPI = 900, 100
_WORDS = {"train": "training micro-batches", "heldout": "held-out slice"}
_LEAST_HEIGHT = (
    0.05  # of the axis of losses, as a share of where they start: less would make hills of noise
)
_ROW_PX = 17  # between two rows of labels
_AROUND_PX = (
    108,
    100,
    # above the panels, for the title and three rows of labels; below them, for the axis and the
    # legend
)
_PLOT_ROWS, _LEAST_COLUMNS, _MOST_COLUMNS = 14, 30, 100
_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # of a braille letter, column by column: Unicode's order


def median_curve(curves: list[Curve], which: str) -> tuple[np.ndarray, np.ndarray]:
    """The median over ramps of their smoothed losses, at the values that at least half of them
    reached.
    """
    by_value: dict[float, list[float]] = {}
    for curve in curves:
        values, losses = series(curve, which)
        if len(values):
            for value, loss in zip(
                values.tolist(), smoothed(losses, smoothing_for(len(losses))).tolist(), strict=True
            ):
                by_value.setdefault(value, []).append(loss)
    reached = sorted(value for value, losses in by_value.items() if 2 * len(losses) >= len(curves))
    return np.array(reached), np.array([np.median(by_value[value]) for value in reached])


def baseline_of(baselines: BaselineLosses, which: str) -> float | None:
    """The level of one of the two curves."""
    return baselines.train if which == "train" else baselines.held_out


def draw(found):
    """A LRFinderResult as a matplotlib Figure, 900 px wide: losses above, then the rules over
    seeds, then the race.
    """
    suggestion = found.suggestion
    ratios = [3.0, 1.05, 1.25] if suggestion.candidates else [3.0, 1.05]
    height_px = _AROUND_PX[0] + _AROUND_PX[1] + 95 * sum(ratios)
    figure = NotebookFigure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI)
    place = {
        "left": 0.115,
        "right": 0.975,
        "top": 1 - _AROUND_PX[0] / height_px,
        "bottom": _AROUND_PX[1] / height_px,
    }
    panels = figure.subplots(
        len(ratios), 1, sharex=True, gridspec_kw={"height_ratios": ratios, "hspace": 0.14, **place}
    )
    _draw_losses(panels[0], found)
    _draw_rules(panels[1], suggestion)
    if suggestion.candidates:
        _draw_race(panels[2], found)
    for panel in panels:
        panel.set_axisbelow(True)
        panel.grid(visible=True, color="#E4E4E4", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        for value, colour, style, width, _ in marks(found):
            panel.axvline(value, color=colour, linestyle=style, linewidth=width, zorder=1.5)
        panel.yaxis.set_label_coords(-0.085, 0.5)
    panels[-1].set_xlabel(axis_name(found))
    figure.suptitle(title(found), fontsize=11, x=0.012, y=1 - 8 / height_px, ha="left", va="top")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=2,
        fontsize=8.5,
        frameon=False,
    )
    _label_marks(figure, panels[0], found)
    return figure


def title(found) -> str:
    """What was tested and what came out, in two lines."""
    plan, value = found.plan, found.suggestion.value
    what = (
        f"{plan.recipe.name}.v{plan.recipe.version} on {plan.model}, {plan.profile.name},"
        f" {plan.recipe.batch.images} images per step"
    )
    answer = "no reliable suggestion" if value is None else f"recommended {value:.3g}"
    return f"{what}\n{found.scalar.label}: {answer}"


def axis_name(found) -> str:
    return "learning rate" if found.scalar.is_rate else found.scalar.label


def is_even(values: np.ndarray) -> bool:
    """Are the values of a ramp evenly spaced, rather than in equal ratios?"""
    return bool(np.allclose(np.diff(values), (values[-1] - values[0]) / (len(values) - 1)))


def marks(found) -> list[tuple[float, str, str, float, str]]:
    """The values that stand out: (value, colour, line style, line width, label), the most important
    first.
    """
    suggestion, low, high = found.suggestion, found.values[0], found.values[-1]
    named = [
        (suggestion.value, GREEN, "-", 2.4, "recommended"),
        (found.scalar.own, "black", (0, (5, 2, 1, 2)), 1.3, "recipe"),
        (suggestion.stable, PURPLE, "--", 1.5, "largest stable"),
    ]
    return [
        (value, *look, f"{name} {value:.3g}")
        for value, *look, name in named
        if value is not None and low <= value <= high
    ]


def _draw_losses(panel, found) -> None:
    ramps = [curve for curve in found.suggestion.curves if curve.purpose == "ramp"]
    shown = {"both": ("train", "heldout")}.get(found.asked["curve"], (found.asked["curve"],))
    bottoms, tops = [], []
    for which, colour in (("train", BLUE), ("heldout", VERMILLION)):
        if which not in shown or not any(len(series(ramp, which)[1]) for ramp in ramps):
            continue
        for ramp in ramps:
            panel.plot(*series(ramp, which), color=colour, linewidth=0.7, alpha=0.35)
        values, losses = median_curve(ramps, which)
        label = f"{_WORDS[which]}, median of {len(ramps)}" if len(ramps) > 1 else _WORDS[which]
        panel.plot(values, losses, color=colour, linewidth=2.4, label=label)
        bottoms.append(losses.min())
        tops.append(float(np.median(losses[: max(1, len(losses) // 5)])))
    if bottoms:
        baselines = _draw_baselines(panel, found.suggestion.baselines, shown)
        bottoms, tops = [*bottoms, *baselines], [*tops, *baselines]
        height = max(max(tops) - min(bottoms), _LEAST_HEIGHT * abs(max(tops))) or 1.0
        panel.set_ylim(min(bottoms) - 0.12 * height, max(tops) + 0.45 * height)
    panel.set_ylabel("loss (nats)")
    if not is_even(found.values):
        panel.set_xscale("log")
    panel.set_xlim(found.values[0], found.values[-1])


def _draw_baselines(panel, baselines, shown: tuple[str, ...]) -> list[float]:
    """The levels of knowing nothing but the classes' shares: one line where both curves have the
    same.
    """
    levels = {
        which: baseline_of(baselines, which)
        for which in shown
        if baseline_of(baselines, which) is not None
    }
    if len(levels) == 2 and np.isclose(*levels.values(), rtol=0.01):
        levels = {"both": levels["train"]}
    for which, level in levels.items():
        colour = {"train": BLUE, "heldout": VERMILLION}.get(which, "black")
        panel.axhline(
            level,
            color=colour,
            linestyle=":",
            linewidth=1.4,
            label=f"baseline loss of a constant prediction: {level:.3g} nats",
        )
    return list(levels.values())


def _draw_rules(panel, suggestion) -> None:
    rows: dict[str, Spread | None] = {**suggestion.rules, "edge": suggestion.edge}
    for place, spread in enumerate(rows.values()):
        if spread:
            panel.plot(
                [spread.lowest, spread.highest],
                [place, place],
                color=GREY,
                linewidth=3.5,
                solid_capstyle="round",
                alpha=0.6,
            )
            panel.plot(
                [spread.median],
                [place],
                marker="o",
                markersize=6,
                color=ORANGE,
                markeredgecolor="black",
                linestyle="none",
            )
        else:
            look = {"fontsize": 8, "color": GREY, "va": "center", "backgroundcolor": "white"}
            panel.text(0.01, place, "no value", transform=panel.get_yaxis_transform(), **look)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    panel.set_ylim(len(rows) - 0.4, -0.6)


def _draw_race(panel, found) -> None:
    candidates = found.suggestion.candidates
    top = _race_top(found)
    for candidate in candidates:
        for loss in candidate.losses.values():
            is_in = loss <= top
            panel.plot(
                [candidate.value],
                [loss if is_in else top],
                color=GREEN if candidate.value == found.suggestion.value else GREY,
                marker="o" if is_in else "^",
                markersize=6,
                linestyle="none",
                markeredgecolor="black",
                markeredgewidth=0.6,
                clip_on=False,
            )
    means = [(one.value, min(float(np.mean(list(one.losses.values()))), top)) for one in candidates]
    panel.plot(*zip(*means, strict=True), color=GREY, linewidth=1, zorder=1)
    length = found.asked["lengths"]["num_race_steps"]
    panel.set_ylabel(f"candidates: held-out\nloss, {length} steps", fontsize=8.5)
    panel.margins(y=0.18)


def _race_top(found) -> float:
    """The highest loss that the race's panel shows: what is above it, or diverged, stands there as
    a triangle.
    """
    losses = [
        loss
        for one in found.suggestion.candidates
        for loss in one.losses.values()
        if math.isfinite(loss)
    ]
    starts = [
        curve.start_loss
        for curve in found.suggestion.curves
        if curve.purpose == "race" and curve.start_loss is not None
    ]
    if not losses:
        return max(starts, default=1.0)
    return max(min(max(losses), 1.2 * max(starts, default=max(losses))), min(losses))


def _label_marks(figure, panel, found) -> None:
    """A label above each marked line, in as many rows as it takes for no two to touch."""
    row_height = _ROW_PX / panel.get_window_extent().height
    placed = []
    for value, colour, _, _, label in marks(found):
        look = {
            "color": colour,
            "fontsize": 9,
            "fontweight": "bold",
            "ha": "center",
            "va": "bottom",
        }
        text = panel.text(value, 1.02, label, transform=panel.get_xaxis_transform(), **look)
        _keep_inside(figure, panel, text)
        row = 0
        while any(_touch(text.get_window_extent(), other.get_window_extent()) for other in placed):
            row += 1
            text.set_y(1.02 + row * row_height)
        placed.append(text)


def _keep_inside(figure, panel, text) -> None:
    """Shift a label that would stick out of the axes on one side."""
    box, axes = text.get_window_extent(), panel.get_window_extent()
    if box.x0 < axes.x0:
        text.set_ha("left")
    elif box.x1 > axes.x1:
        text.set_ha("right")


def _touch(one, other, gap_px: float = 6) -> bool:
    """Do two boxes overlap, or stand nearer than a gap?"""
    return (
        one.x0 < other.x1 + gap_px
        and other.x0 < one.x1 + gap_px
        and one.y0 < other.y1
        and other.y0 < one.y1
    )


def plot_columns(out: Console) -> int:
    """How many letters wide the plot is, beside its levels."""
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, out.width - 14))


def plot(found, num_columns: int) -> list[Text]:
    """The median curves over the ramp's values in braille dots, with lines where the value and the
    recipe's own one stand.
    """
    ramps = [curve for curve in found.suggestion.curves if curve.purpose == "ramp"]
    asked = found.asked["curve"]
    drawn = [
        (which, style)
        for which, style in (("train", "blue"), ("heldout", "red"))
        if asked in (which, "both")
    ]
    medians = [(which, style, *median_curve(ramps, which)) for which, style in drawn]
    medians = [one for one in medians if len(one[2])]
    if not medians:
        return [Text("no curve: the loss was NaN or infinite from the first step on")]
    low, high = _levels([losses for *_, losses in medians])
    column = _column_of(found.values, 2 * num_columns)
    grid = np.zeros((_PLOT_ROWS, num_columns), dtype=int)
    styles = [[""] * num_columns for _ in range(_PLOT_ROWS)]
    for _, style, values, losses in medians:
        _trace(grid, styles, [column(value) for value in values], losses, low, high, style)
    upright = {column(value) // 2: mark for value, mark in reversed(_marks(found))}
    lines = [
        _row(grid[row], styles[row], upright, _level(row, low, high)) for row in range(_PLOT_ROWS)
    ]
    return [
        *lines,
        _axis(found, column, num_columns),
        _legend([(which, style) for which, style, *_ in medians], found),
    ]


def _levels(curves: list[np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest loss shown: a little above where the curves start, whatever they
    end at.
    """
    low = min(float(losses.min()) for losses in curves)
    high = max(float(np.median(losses[: max(1, len(losses) // 5)])) for losses in curves)
    return low, high + 0.15 * ((high - low) or abs(high) or 1.0)


def _column_of(values: np.ndarray, num_dots: int):
    place = (lambda value: value) if is_even(values) else math.log
    first, last = place(float(values[0])), place(float(values[-1]))
    return lambda value: min(
        num_dots - 1, max(0, round((place(float(value)) - first) / (last - first) * (num_dots - 1)))
    )


def _trace(
    grid: np.ndarray,
    styles: list[list[str]],
    columns: list[int],
    losses: np.ndarray,
    low: float,
    high: float,
    style: str,
) -> None:
    """Put a line of dots into the grid; what is higher than it leaves at its top."""
    num_dots = 4 * len(grid)
    before = None
    for dot in range(columns[0], columns[-1] + 1):
        share = (high - float(np.interp(dot, columns, losses))) / (high - low)
        now = min(num_dots - 1, int(share * (num_dots - 1) + 0.5)) if share >= 0 else -1
        if now < 0 and before in (None, -1):
            continue
        start = now if before is None else before + (now > before) - (now < before)
        for from_top in range(
            max(0, min(start, now)), max(start, now) + 1
        ):  # a steep piece has no gaps
            grid[from_top // 4, dot // 2] |= _DOTS[dot % 2][from_top % 4]
            styles[from_top // 4][dot // 2] = style
        before = now


def _marks(found) -> list[tuple[float, tuple[str, str]]]:
    inside = found.values[0], found.values[-1]
    both = (found.suggestion.value, ("┃", "bold green")), (found.scalar.own, ("┊", "bold"))
    return [
        (value, mark)
        for value, mark in both
        if value is not None and inside[0] <= value <= inside[1]
    ]


def _level(row: int, low: float, high: float) -> str:
    return (
        f"{high - (high - low) * row / (_PLOT_ROWS - 1):9.4g}"
        if row in (0, _PLOT_ROWS // 2, _PLOT_ROWS - 1)
        else " " * 9
    )


def _row(
    dots: np.ndarray, styles: list[str], upright: dict[int, tuple[str, str]], level: str
) -> Text:
    line = Text(f"{level} │")
    for column, pattern in enumerate(dots):
        if pattern:
            line.append(chr(0x2800 + int(pattern)), styles[column])
        else:
            line.append(*upright.get(column, (" ", "")))
    return line


def _axis(found, column, num_columns: int) -> Text:
    """Powers of ten below the plot, as many as fit; on an evenly spaced ramp the two ends and the
    middle.
    """
    first, last = float(found.values[0]), float(found.values[-1])
    if is_even(found.values):
        ticks = [first, (first + last) / 2, last]
    else:
        ticks = [
            10.0**power
            for power in range(
                math.ceil(math.log10(first) - 1e-9), math.floor(math.log10(last) + 1e-9) + 1
            )
        ]
    letters = [" "] * (num_columns + 12)
    free_from = 0
    for tick in ticks:
        label = f"{tick:g}"
        start = max(0, 11 + column(tick) // 2 - len(label) // 2)
        if start >= free_from and start + len(label) <= len(letters):
            letters[start : start + len(label)] = label
            free_from = start + len(label) + 1
    return Text("".join(letters).rstrip())


def _legend(drawn: list[tuple[str, str]], found) -> Text:
    words = {"train": "loss on training micro-batches", "heldout": "loss on the held-out slice"}
    line = Text(" " * 11)
    for which, style in drawn:
        line.append("⠒⠒ ", style).append(f"{words[which]}   ")
    for value, (mark, style) in _marks(found):
        line.append(f"{mark} ", style).append(
            f"{'recommended' if mark == '┃' else 'recipe'} {value:.3g}   "
        )
    return line
