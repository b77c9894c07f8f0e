"""Learning curves of an ablation's runs, kept beside its rows, so that its report is the same where no run folder is.

`<results>/<ablation>.curves.jsonl`: one line for each run that has a row, thinned. What a run folder has is taken from
it; what is only in the file stays, as long as it is the row's own: of the same run and the same weights.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_file, json_of
from trainer.report.compare import Curves, Points, read_curves
from trainer.report.tables import Table
from trainer.runs.results import Row

MOST_POINTS = 120  # of one line: more than a panel of a report has pixels to tell apart
_KINDS = ("train_loss", "val_top1")


def curves_path(results: Path, name: str) -> Path:
    return results / f"{name}.curves.jsonl"


def find_curves(results: Path, table: Table) -> dict[str, Curves]:
    """The curves of a table's rows by run: of their run folders where those are here, else as they were kept."""
    kept, found = read_kept(results, table.name), {}
    for result in (result for one in table.cells for result in one.seeds if result.row):
        row = result.row
        curves = (
            read_curves(result.folder, row)
            if result.folder and _is_of(result.folder, row)
            else None
        )
        if curves and (curves.train_loss or curves.val_top1):
            found[row.run] = Curves(
                thin(curves.train_loss, is_mean=True), thin(curves.val_top1, is_mean=False)
            )
        elif row.run in kept and kept[row.run][0] == row.weights_sha256:
            found[row.run] = kept[row.run][1]
    return found


def keep_curves(results: Path, table: Table, curves: Mapping[str, Curves]) -> Path | None:
    """Write the curves of a table's rows; no file where there are none."""
    rows = {row.run: row for one in table.cells for row in one.rows}
    path = curves_path(results, table.name)
    if not curves:
        path.unlink(missing_ok=True)
        return None
    lines = []
    for run in sorted(curves):
        points = {kind: getattr(curves[run], kind) for kind in _KINDS}
        lines.append(
            json.dumps({"run": run, "weights_sha256": rows[run].weights_sha256} | points) + "\n"
        )
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
            found = json_of(line)
            points = (tuple((float(x), float(y)) for x, y in found[kind]) for kind in _KINDS)
            kept[found["run"]] = found["weights_sha256"], Curves(*points)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: no curves of a run ({error}); remove the file, make table writes it anew"
            ) from None
    return kept


def _is_of(folder: Path, row: Row) -> bool:
    """Is it this row's own folder, not that of another run of the same name?"""
    try:
        return json_file(folder / "row.json")["weights_sha256"] == row.weights_sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def thin(points: Points, is_mean: bool) -> Points:
    """At most MOST_POINTS of a curve, evenly over it, the last one included.

    is_mean: a point stands for the mean of those before it; else for itself, as scores do.
    """
    stride = -(-len(points) // MOST_POINTS) or 1
    first = len(points) % stride or stride
    ends = range(first, len(points) + 1, stride)
    chosen = []
    for end in ends:
        part = points[max(0, end - stride) : end] if is_mean else points[end - 1 : end]
        chosen.append((part[-1][0], float(f"{statistics.fmean(y for _, y in part):.6g}")))
    return tuple(chosen)
