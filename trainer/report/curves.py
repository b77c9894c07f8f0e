"""Learning curves: of a run folder, kept beside the rows, and plotted as text.

`<results>/<ablation>.curves.jsonl` has one line per run that has a row, thinned, so that the report
renders the same where the run folders are not. The run folder's curves come first; a line of the
file counts only for the row whose weights it names.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.base.commands import command
from trainer.base.disk import read_regular, write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_file, json_of
from trainer.base.scores import main_score
from trainer.report.rows import Stores, folders_of
from trainer.report.tables import SeedResult, Table
from trainer.runs.append_only_log import LARGEST_METRICS_BYTES
from trainer.runs.results import Row, RowError

MAX_POINTS = 120  # per curve: more than a panel of the report has pixels to tell apart
_KINDS = ("train_loss", "val_top1")

Points = tuple[tuple[float, float], ...]  # (epoch, value), by epoch


@dataclass(frozen=True)
class Curves:
    """By epoch: the training loss in nats, and of the scored weights the main score of val in
    percent, whatever it is; files have it under the name of top-1.
    """

    train_loss: Points
    val_top1: Points


def read_curves(folder: Path, row: Row) -> Curves | None:
    """The curves of a run folder; None where it is not on this machine.

    Raises RowError for a damaged line. A last line without its end is still being written and
    ignored.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    losses, scores = [], []
    content = read_regular(path, LARGEST_METRICS_BYTES)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.endswith(b"}"):
            continue
        try:
            record = json_of(line)
            if "loss_nats" in record:
                losses.append((float(record["epoch"]), float(record["loss_nats"])))
            if record.get("weights") == row.scored:
                scores.append((float(record["epoch"]), float(_main(record))))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise RowError(
                f"{path}:{number}: not a metrics record; without this file there are no curves"
            ) from None
    return Curves(_finite(losses), _finite(scores))


def _main(record: Mapping) -> float:
    """Raises KeyError where it has no score."""
    found = main_score(record)
    if found is None:
        raise KeyError("no score")
    return found[1]


def _finite(points: Iterable[tuple[float, float]]) -> Points:
    return tuple((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))


def thin(points: Points, is_mean: bool) -> Points:
    """At most MAX_POINTS of a curve, evenly spaced, the last one included.

    is_mean: a point becomes the mean of the window that it ends, as fits a noisy loss; else it
    keeps its own value.
    """
    stride = -(-len(points) // MAX_POINTS) or 1
    first_end = len(points) % stride or stride
    thinned = []
    for end in range(first_end, len(points) + 1, stride):
        window = points[max(0, end - stride) : end] if is_mean else points[end - 1 : end]
        thinned.append((window[-1][0], float(f"{statistics.fmean(y for _, y in window):.6g}")))
    return tuple(thinned)


# ---- kept beside the rows


def curves_path(results: Path, name: str) -> Path:
    """The file of the stored curves of an ablation's rows."""
    return results / f"{name}.curves.jsonl"


def find_curves(results: Stores, table: Table) -> dict[str, Curves]:
    """The curves of a table's rows by run: from the run folder if it is here, else as stored."""
    kept, found = {}, {}
    for store in reversed(folders_of(results)):
        kept.update(read_kept(store, table.name))
    for result in (result for summary in table.cells for result in summary.seeds):
        row = result.row
        if row is None:
            continue
        curves = _folder_curves(result)
        if curves and (curves.train_loss or curves.val_top1):
            found[row.run] = Curves(
                thin(curves.train_loss, is_mean=True), thin(curves.val_top1, is_mean=False)
            )
        elif row.run in kept and kept[row.run][0] == row.weights_sha256:
            found[row.run] = kept[row.run][1]
    return found


def _folder_curves(result: SeedResult) -> Curves | None:
    """None also for the folder of another run with the same name."""
    if result.folder is None or result.row is None:
        return None
    try:
        stored = json_file(result.folder / "row.json")["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_same = stored == result.row.weights_sha256
    return read_curves(result.folder, result.row) if is_same else None


def keep_curves(results: Path, table: Table, curves: Mapping[str, Curves]) -> Path | None:
    """Write the curves of a table's rows; no file where there are none."""
    rows = {row.run: row for summary in table.cells for row in summary.rows}
    path = curves_path(results, table.name)
    if not curves:
        path.unlink(missing_ok=True)
        return None
    lines = []
    for run in sorted(curves):
        points = {kind: getattr(curves[run], kind) for kind in _KINDS}
        record = {"run": run, "weights_sha256": rows[run].weights_sha256} | points
        lines.append(json.dumps(record) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines).encode())
    return path


def read_kept(results: Path, name: str) -> dict[str, tuple[str | None, Curves]]:
    """Kept curves by run, each with the digest of the weights that they led to.

    Raises UserError for a damaged file.
    """
    path = curves_path(results, name)
    if not path.exists():
        return {}
    kept = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json_of(line)
            points = (tuple((float(x), float(y)) for x, y in record[kind]) for kind in _KINDS)
            kept[record["run"]] = record["weights_sha256"], Curves(*points)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a run's curves ({error}); delete the file, "
                f"{command('table')} writes it again"
            ) from None
    return kept


# ---- as text


def text_plot(curves: Mapping[str, Points], width: int = 64, height: int = 12) -> list[str]:
    """Curves as lines of text, each drawn with its one-letter name; * where two meet."""
    points = [point for line in curves.values() for point in line]
    if not points:
        return []
    left, right = _range(x for x, _ in points)
    low, high = _range(y for _, y in points)
    grid = [[" "] * width for _ in range(height)]
    step = (right - left) / (width - 1)
    for letter, line in curves.items():
        for column in range(width):
            y = _interpolate(line, left + step * column, step)
            if y is not None:
                level = round((high - y) / (high - low) * (height - 1))
                grid[level][column] = letter if grid[level][column] == " " else "*"
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} │{''.join(row).rstrip()}"
        for label, row in zip(labels, grid, strict=True)
    ]
    epochs = f"{left:.4g}".ljust(width - len(f"{right:.4g}")) + f"{right:.4g}"
    return [*lines, f"{' ' * margin} └{'─' * width}", f"{' ' * margin}  {epochs}  epoch"]


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Minimum and maximum; a single value is in the middle of a range of 1."""
    values = list(values)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _interpolate(line: Points, x: float, step: float) -> float | None:
    """The curve at x, linear between its points; None outside.

    A single point counts at the nearest column.
    """
    if len(line) == 1:
        return line[0][1] if abs(line[0][0] - x) <= 0.5001 * step else None
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return None
