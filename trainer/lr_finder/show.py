"""What `lr-find` prints: progress, the curve in the terminal, the rules, the value and what trains with it."""

from __future__ import annotations

import math
import time

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trainer.lr_finder.files import median_curve
from trainer.lr_finder.pictures import is_even
from trainer.lr_finder.rules import Curve, Spread
from trainer.lr_finder.trial import Watch
from trainer.runs import summary as show

_WORDS = {"ramp": "ramp", "probe": "probe of a constant value", "race": "race of a candidate"}
_PLOT_ROWS, _LEAST_COLUMNS, _MOST_COLUMNS = 14, 30, 100
_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # of a braille letter, column by column: Unicode's order


def head(out: Console, bench) -> None:
    """The lines above a range test: page, deviations, batch, range, how long it will be."""
    plan, lengths, scalar = bench.plan, bench.lengths, bench.scalar
    out.print(f"[bold]{plan.recipe.name}.v{plan.recipe.version}[/] {escape(plan.recipe.title)}")
    out.print(f"{plan.model} on {escape(plan.profile.name)}", highlight=False)
    show.deviations(out, plan)
    out.print(show.batch_line(plan))
    own = "off" if scalar.own is None else f"{scalar.own:g}"
    way = "in equal steps" if is_even(bench.values) else "in equal ratios"
    out.print(
        f"{scalar.label} from {bench.values[0]:g} to {bench.values[-1]:g} {way}; the page has {own}",
        markup=False,
    )
    left, held = bench.data.train.num_images, bench.data.val.num_images
    out.print(
        f"held out: {held} of {left + held} training images; the validation split is not looked at"
    )
    out.print(
        f"{lengths.num_seeds} ramps of {lengths.num_ramp_steps} steps, up to {lengths.num_probes} probes of "
        f"{lengths.num_probe_steps} and {lengths.num_candidates + lengths.num_repeats} trials of {lengths.num_race_steps} in the "
        f"race: at most {lengths.most_steps:,} steps"
    )
    settings = bench.settings
    out.print(f"{settings.device}, {settings.precision}, {settings.num_threads} threads")


class Lines(Watch):
    """A bar while trials run, where the output is a terminal; and one line for each that is over."""

    def __init__(self, out: Console, most_steps: int) -> None:
        self.out, self.num_trials, self._facts = out, 0, ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._task = self._bar.add_task("", total=most_steps, facts="")
        self._started_s = time.monotonic()

    def __enter__(self) -> Lines:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def start(self, seed: int, purpose: str, num_steps: int) -> None:
        self._started_s = time.monotonic()
        self._bar.update(self._task, description=f"{purpose}, seed {seed}")

    def step(self, value: float, loss_nats: float) -> None:
        self._bar.update(self._task, advance=1, facts=f"{value:.2e}  loss {loss_nats:.4f}")

    def end(self, curve: Curve, was_kept: bool) -> None:
        self.num_trials += 1
        self.out.print(
            trial_line(curve, None if was_kept else time.monotonic() - self._started_s),
            markup=False,
        )


def trial_line(curve: Curve, seconds: float | None) -> str:
    """One trial in a line. seconds: None where it was found in the folder."""
    took = "was there" if seconds is None else f"{seconds:.1f} s"
    end = {"ramp": "", "diverged": ", diverged", "not a number": ", then the loss was no number"}[
        curve.ended
    ]
    name = f"{_WORDS[curve.purpose]}, seed {curve.seed}"
    if not len(curve.losses):
        return f"{name:34} no step{end}  ({took})"
    what = {
        "ramp": f"up to {curve.values[-1]:.3g}",
        "probe": f"at {curve.values[-1]:.3g}",
        "race": f"up to {curve.values.max():.3g}",
    }[curve.purpose]
    held_out = f"  held-out {curve.held_out[1][-1]:.4f}" if len(curve.held_out[1]) else ""
    return f"{name:34} {len(curve.losses):4} steps {what:14} loss {curve.losses[-1]:.4f}{held_out}{end}  ({took})"


def result(out: Console, found) -> None:
    """The whole answer: the plot, the rules, the race, the value and why, the batch it holds for, the command."""
    suggestion = found.suggestion
    out.print()
    for line in plot(found, plot_columns(out)):
        out.print(line, soft_wrap=False, no_wrap=True)
    out.print()
    out.print(rules_table(found))
    if suggestion.candidates:
        out.print(race_table(found))
    smoothing = ", ".join(f"{which} {share:.2f}" for which, share in suggestion.smoothing.items())
    out.print(
        f"smoothing: each point of the moving average keeps this share of the one before it: {smoothing}",
        markup=False,
    )
    if suggestion.stable is not None or suggestion.unstable is not None:
        out.print(stable_line(found), markup=False)
    out.print()
    if suggestion.value is None:
        out.print(suggestion.reason, style="bold yellow", markup=False, highlight=False)
    else:
        own = "" if found.scalar.own is None else f" (the page has {found.scalar.own:.3g})"
        out.print(
            f"{found.scalar.label} {suggestion.value:.3g}{own}: {suggestion.reason}",
            style="bold green",
            markup=False,
            highlight=False,
        )
        for line in batch_lines(found):
            out.print(line, markup=False)
    if found.folder:
        out.print(
            f"files  {found.folder}: curve.png, curve.svg, curve.csv, suggestion.json, tensorboard",
            markup=False,
        )
    if found.command:
        out.print(f"train  {found.command}", style="bold", markup=False, highlight=False)


def rules_table(found) -> Table:
    """What each rule finds: the median over seeds, the lowest and the highest."""
    table = Table("rule", "median", "lowest", "highest", "seeds", box=None, pad_edge=False)
    for name, spread in {
        **found.suggestion.rules,
        "edge (loss turns up)": found.suggestion.edge,
    }.items():
        table.add_row(name, *_cells(spread))
    return table


def _cells(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return ("-", "-", "-", "0")
    return (
        *(f"{value:.3g}" for value in (spread.median, spread.lowest, spread.highest)),
        str(spread.num_seeds),
    )


def race_table(found) -> Table:
    """What the race measured: each candidate's last held-out loss, by seed."""
    candidates = found.suggestion.candidates
    seeds = sorted({seed for one in candidates for seed in one.losses})
    table = Table(
        "race: held-out loss at the end",
        *(f"seed {seed}" for seed in seeds),
        box=None,
        pad_edge=False,
    )
    for one in candidates:
        cells = {
            seed: f"{loss:.4f}" if math.isfinite(loss) else "broke off"
            for seed, loss in one.losses.items()
        }
        is_best = one.value == found.suggestion.value
        table.add_row(
            f"{one.value:.3g}",
            *(cells.get(seed, "") for seed in seeds),
            style="bold green" if is_best else None,
        )
    return table


def stable_line(found) -> str:
    """Between which constant values a short run begins to grow."""
    stable, unstable = found.suggestion.stable, found.suggestion.unstable
    if stable is None:
        return f"largest stable constant value: below {unstable:.3g}, the smallest that was probed"
    return f"largest stable constant value: {stable:.3g}" + (
        "" if unstable is None else f"; {unstable:.3g} grows"
    )


def batch_lines(found) -> list[str]:
    """For which batch a learning rate holds, and what the page's own rule makes of it for others."""
    if not found.scalar.is_rate:
        return []
    recipe, value = found.plan.recipe, found.suggestion.value
    images, rule = recipe.batch.images, recipe.lr.scaling
    line = f"holds for {images} images per step, over however many ranks and micro-batches"
    if rule is None:
        return [f"{line}; the page has no rule for another batch"]
    lr = recipe.lr.model_copy(update={"peak": value})
    others = ", ".join(
        f"{count} images {lr.scaled(images, count):.3g}"
        for count in (images // 2, 2 * images, 4 * images)
        if count
    )
    return [f"{line}; by the page's {rule} rule: {others}"]


def plot_columns(out: Console) -> int:
    """How many letters wide the plot is, beside its levels."""
    return min(_MOST_COLUMNS, max(_LEAST_COLUMNS, out.width - 14))


def plot(found, num_columns: int) -> list[Text]:
    """The median curves over the ramp's values in braille dots, with lines where the value and the page's own one stand."""
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
        return [Text("no curve: the loss was no number from the first step on")]
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
    """The lowest and the highest loss shown: a little above where the curves start, whatever they end at."""
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
    """Powers of ten below the plot, as many as fit; on an evenly spaced ramp the two ends and the middle."""
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
            f"{'recommended' if mark == '┃' else 'the page'} {value:.3g}   "
        )
    return line
