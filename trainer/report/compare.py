"""Two runs side by side: where their rows differ, and how they learned."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.base.errors import did_you_mean
from trainer.base.json_text import json_of
from trainer.base.names import why_no_name
from trainer.recipe import tree
from trainer.runs.results import Row, RowError, read_row, read_row_file

_MOST_NAMES = 2_000  # among which the nearest is looked for

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Difference:
    """One thing that two rows say differently. section: what it belongs to. change: b - a, empty where no number."""

    section: str
    name: str
    a: str
    b: str
    change: str = ""


@dataclass(frozen=True)
class Curves:
    """How a run learned, by epoch: the training loss in nats, and the val top-1 in per cent of the weights scored."""

    train_loss: Points
    val_top1: Points


def find_row(name: str, results: Path, runs: Path) -> Row:
    """The row of a run: by its name in the store or under runs, or by its folder.

    Raises RowError for a run that has none.
    """
    for folder in (Path(name), runs / name):
        if name and os.path.isfile(folder / "row.json"):
            return read_row_file(folder / "row.json")
    row = read_row(results, name) if why_no_name(name) is None else None
    if row is None:
        known = sorted(path.stem for path in (results / "rows").glob("*.json"))
        near = (
            did_you_mean(name, known[:_MOST_NAMES])
            or f"; {len(known)} rows lie in {results / 'rows'}"
        )
        raise RowError(f"run {name}: there is no such row{near}")
    return row


def differences(a: Row, b: Row) -> tuple[Difference, ...]:
    """Where two rows differ, the most telling first; their names and dates are left out."""
    found = [*_listed("run", _IDENTITY, a, b), *_deviations(a, b), *_listed("score", _SCORES, a, b)]
    found += [*_listed("cost", _COSTS, a, b), *_listed("machine", _MACHINE, a, b), *_versions(a, b)]
    return tuple(found)


_IDENTITY: dict[str, Callable[[Row], object]] = {
    "page": lambda row: f"{row.recipe}.v{row.version} ({row.digest})",
    "model": lambda row: row.model,
    "data": lambda row: f"{row.data} ({row.data_fingerprint[:12]})",
    "val images": lambda row: f"{row.num_val_images} of {row.split}",
    "seed": lambda row: str(row.seed),
}
_SCORES: dict[str, Callable[[Row], object]] = {
    "status": lambda row: row.status,
    "scored": lambda row: row.scored,
    "top-1 %": lambda row: row.top1_pct,
    "top-5 %": lambda row: row.top5_pct,
    "loss nats": lambda row: row.loss_nats,
    "top-1 % of the weights not scored": lambda row: row.other_top1_pct,
    "weights": lambda row: (row.weights_sha256 or "none")[:12],
}
_COSTS: dict[str, Callable[[Row], object]] = {
    "steps": lambda row: row.steps,
    "train s": lambda row: row.train_s,
    "images/s": lambda row: row.images_per_s,
    "peak MiB": lambda row: row.peak_mem_mib,
    "parameters": lambda row: row.num_params,
    "GMACs": lambda row: row.gmacs,
    "images replaced": lambda row: row.num_replaced_images,
}
_MACHINE: dict[str, Callable[[Row], object]] = {
    "device": lambda row: row.device,
    "precision": lambda row: row.precision,
    "threads": lambda row: str(row.num_threads),
    "workers": lambda row: str(row.num_workers),
    "loader": lambda row: row.loader,
    "ranks": lambda row: str(row.world_size),
    "commit": lambda row: (row.commit or "none")[:12],
    "uncommitted changes": lambda row: {True: "yes", False: "no", None: "not known"}[row.dirty],
    "changes while it ran": lambda row: "; ".join(row.changes) or "none",
}


def _listed(
    section: str, facts: Mapping[str, Callable[[Row], object]], a: Row, b: Row
) -> Iterator[Difference]:
    for name, of in facts.items():
        of_a, of_b = of(a), of(b)
        if of_a != of_b:
            yield Difference(section, name, _shown(of_a), _shown(of_b), _change(of_a, of_b))


def _deviations(a: Row, b: Row) -> Iterator[Difference]:
    """What the runs do differently, by their exact recipes where both rows hold one.

    Else by what they tell: for a path that one of them leaves alone, what its page says where the other tells.
    """
    if a.resolved_recipe is not None and b.resolved_recipe is not None:
        for path, *values in tree.differences(
            tree.from_json(a.resolved_recipe), tree.from_json(b.resolved_recipe)
        ):
            if path.partition(".")[0] not in tree.ABOUT:
                yield Difference(
                    "deviation", path, *(tree.shown(value, exact=True) for value in values)
                )
        told = [
            [change for change in row.deviations if change.origin == "memory"] for row in (a, b)
        ]
    else:
        told = [row.deviations for row in (a, b)]
    of_a, of_b = ({change.path: change.after for change in changes} for changes in told)
    before = {
        change.path: change.before for changes in reversed(told) for change in reversed(changes)
    }
    is_same_page = (a.recipe, a.version, a.digest) == (b.recipe, b.version, b.digest)
    for path in sorted(set(of_a) | set(of_b)):
        left_alone = before[path] if is_same_page else "as its page"
        found = of_a.get(path, left_alone), of_b.get(path, left_alone)
        if found[0] != found[1]:
            yield Difference("deviation", path, *found)


def _versions(a: Row, b: Row) -> Iterator[Difference]:
    for name in sorted(set(a.versions) | set(b.versions)):
        found = a.versions.get(name, "none"), b.versions.get(name, "none")
        if found[0] != found[1]:
            yield Difference("machine", f"version of {name}", *found)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _change(a: object, b: object) -> str:
    """b - a of two numbers."""
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        return ""
    return f"{b - a:+,}" if isinstance(a, int) and isinstance(b, int) else f"{b - a:+,.4g}"


def read_curves(folder: Path, row: Row) -> Curves | None:
    """The curves of a run's folder, None where it is not here.

    Raises RowError for a line that is none; one that is just being written is left out.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    losses, scores = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.endswith(b"}"):
            continue
        try:
            found = json_of(line)
            if "loss_nats" in found:
                losses.append((float(found["epoch"]), float(found["loss_nats"])))
            if found.get("weights") == row.scored:
                scores.append((float(found["epoch"]), float(found["top1_pct"])))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise RowError(
                f"{path}:{number}: no line of a run's curves; remove this file from the folder"
            ) from None
    return Curves(_points(losses), _points(scores))


def _points(pairs) -> Points:
    return tuple((x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y))


def plot(
    curves: Mapping[str, Sequence[tuple[float, float]]], width: int = 64, height: int = 12
) -> list[str]:
    """Curves as lines of text, each drawn with its one letter, * where they meet; empty where there is no point.

    curves: points by letter, x rising.
    """
    points = [point for line in curves.values() for point in line]
    if not points:
        return []
    (left, right), (low, high) = _range(x for x, _ in points), _range(y for _, y in points)
    grid = [[" "] * width for _ in range(height)]
    for letter, line in curves.items():
        for column in range(width):
            step = (right - left) / (width - 1)
            y = _at(line, left + step * column, step)
            if y is not None:
                place = round((high - y) / (high - low) * (height - 1))
                grid[place][column] = letter if grid[place][column] == " " else "*"
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} │{''.join(row).rstrip()}"
        for label, row in zip(labels, grid, strict=True)
    ]
    foot = f"{left:.4g}".ljust(width - len(f"{right:.4g}")) + f"{right:.4g}"
    return [*lines, f"{' ' * margin} └{'─' * width}", f"{' ' * margin}  {foot}  epoch"]


def _range(values) -> tuple[float, float]:
    """The least and the greatest; one value alone stands in the middle of a range."""
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _at(line: Sequence[tuple[float, float]], x: float, step: float) -> float | None:
    """The curve at x, straight between its points; None beside them. One point alone is seen at its nearest column."""
    if len(line) == 1:
        return line[0][1] if abs(line[0][0] - x) <= 0.5001 * step else None
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return None
