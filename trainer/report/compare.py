"""Two rows side by side, everything in which they differ; and two cells of an ablation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.base.errors import UserError, did_you_mean
from trainer.base.names import why_no_name
from trainer.base.plural import counted
from trainer.base.scores import score_label
from trainer.base.stats import Difference, compare_cells
from trainer.recipe import tree
from trainer.recipe.check import ABOUT
from trainer.report.notes import ROW_FACTS
from trainer.report.tables import CellSummary, Table
from trainer.runs.results import FOUND_ORIGINS, Row, RowError, read_row, read_row_file

_MAX_SUGGESTIONS = 2_000  # names searched for the closest one


@dataclass(frozen=True)
class RowDifference:
    """One property in which two rows differ.

    section: its heading. change: b - a, empty for what is no number.
    """

    section: str
    name: str
    a: str
    b: str
    change: str = ""


def find_row(name: str, results: Path, runs: Path) -> Row:
    """The row of a run: by its name in the store or under runs, or by its folder.

    Raises RowError for a run that has none.
    """
    for folder in (Path(name), runs / name):
        if name and os.path.isfile(folder / "row.json"):
            return read_row_file(folder / "row.json")
    row = read_row(results, name) if why_no_name(name) is None else None
    if row is None:
        store = results / "rows"
        known = sorted(path.stem for path in store.glob("*.json"))
        stored = f"; {store} has {counted(len(known), 'row')}"
        hint = did_you_mean(name, known[:_MAX_SUGGESTIONS]) or stored
        raise RowError(f"run {name}: no such row{hint}")
    return row


@dataclass(frozen=True)
class CellContrast:
    """Two cells of an ablation. difference: b - a, by itself and corrected for nothing; None where
    one of them has no value.
    """

    a: CellSummary
    b: CellSummary
    difference: Difference | None


def compare_two_cells(table: Table, a: str, b: str) -> CellContrast:
    """The contrast of any two cells of a table, by their names.

    Raises UserError for a name that no cell has, for a cell and itself, and for cells that are
    scored on different data.
    """
    one, other = (_find_cell(table, name, option) for name, option in ((a, "a"), (b, "b")))
    if one is other:
        raise UserError(f"a={a} b={b}: the same cell", "name two cells")
    if one.cell.data != other.cell.data:
        raise UserError(
            f"a={a} b={b}: scored on {one.cell.data} and on {other.cell.data}",
            "compare cells on the same data",
        )
    return CellContrast(one, other, compare_cells(other.values, one.values))


def _find_cell(table: Table, name: str, option: str) -> CellSummary:
    cells = {summary.cell.name: summary for summary in table.cells}
    if name not in cells:
        raise UserError(
            f"{option}={name}: no cell of {table.name}{did_you_mean(name, cells)}",
            f"valid: {'; '.join(cells)}",
        )
    return cells[name]


def row_differences(a: Row, b: Row) -> tuple[RowDifference, ...]:
    """All differences but names and dates, the most important first.

    What is no measure of the other is listed without a change: scores on other data, values of
    another loss.
    """
    scores = _differing("score", {**_SCORES, **_of_tasks(a, b)}, a, b)
    if not have_same_data(a, b):
        scores = (replace(one, change="") for one in scores)
    elif not have_same_loss(a, b):
        scores = (replace(one, change="") if one.name == _LOSS else one for one in scores)
    return (
        *_differing("run", {name: ROW_FACTS[name] for name in _RUN}, a, b),
        *_differing("run", {"seed": lambda row: str(row.seed)}, a, b),
        *_differing_deviations(a, b),
        *scores,
        *_differing("cost", _COSTS, a, b),
        *_differing("machine", {name: ROW_FACTS[name] for name in _MACHINE}, a, b),
        *_differing_versions(a, b),
    )


def have_same_data(a: Row, b: Row) -> bool:
    """Are two rows scored on the same images, so that their scores compare?"""
    scored_on = [(row.data_fingerprint, row.split, row.num_val_images) for row in (a, b)]
    return scored_on[0] == scored_on[1]


def have_same_loss(a: Row, b: Row) -> bool:
    """Are the losses of two rows values of one function? False where that is not known: rows
    without their exact recipe, of different recipes.
    """
    if a.resolved_recipe is not None and b.resolved_recipe is not None:
        return a.resolved_recipe.get("loss") == b.resolved_recipe.get("loss")
    changes = [
        {one.path: one.after for one in row.deviations if one.path.partition(".")[0] == "loss"}
        for row in (a, b)
    ]
    return _have_same_recipe(a, b) and changes[0] == changes[1]


def _have_same_recipe(a: Row, b: Row) -> bool:
    return (a.recipe, a.version, a.digest) == (b.recipe, b.version, b.digest)


_LOSS = "loss nats"
_RUN = (
    "recipe", "model", "data", "scored on", "epochs", "steps", "images per step",
    "images per norm sample",
)  # fmt: skip
_MACHINE = (
    "device", "precision", "threads", "loader", "ranks", "bitwise reproducible", "commit",
    "changed during training",
)  # fmt: skip
_Properties = Mapping[str, Callable[[Row], object]]
_SCORES: _Properties = {
    "status": lambda row: row.status,
    "scored weights": lambda row: row.scored,
    "top-1 %": lambda row: row.top1_pct,
    "top-5 %": lambda row: row.top5_pct,
    _LOSS: lambda row: row.loss_nats,
    "score % of the other weights": lambda row: row.other_top1_pct,
    "weights sha256": lambda row: (row.weights_sha256 or "none")[:12],
}
_COSTS: _Properties = {
    "train s": lambda row: row.train_s,
    "step s, median": lambda row: row.step_s,
    "load per core": lambda row: row.load_per_core,
    "images/s": lambda row: row.images_per_s,
    "peak MiB": lambda row: row.peak_mem_mib,
    "parameters": lambda row: row.num_params,
    "GMACs": lambda row: row.gmacs,
    "images replaced": lambda row: row.num_replaced_images,
}


def _of_tasks(*rows: Row) -> _Properties:
    """The scores that tasks other than classification give a row."""
    names = dict.fromkeys(name for row in rows for name in row.scores_pct)

    def of(name: str) -> Callable[[Row], object]:
        return lambda row: row.scores_pct.get(name)

    return {f"{score_label(name)} %": of(name) for name in names}


def _differing(section: str, properties: _Properties, a: Row, b: Row) -> Iterator[RowDifference]:
    for name, value_of in properties.items():
        in_a, in_b = value_of(a), value_of(b)
        if in_a != in_b:
            yield RowDifference(section, name, _text(in_a), _text(in_b), _change(in_a, in_b))


def _differing_deviations(a: Row, b: Row) -> Iterator[RowDifference]:
    """What the runs do differently: by their exact recipes where both rows hold one.

    Else by their deviations; where one run has none, the other's record of the recipe's value,
    which is unknown where the recipes differ. What memory or data changed is in deviations alone.
    """
    if a.resolved_recipe is not None and b.resolved_recipe is not None:
        recipes = tree.from_json(a.resolved_recipe), tree.from_json(b.resolved_recipe)
        for path, *values in tree.differences(*recipes):
            if path.partition(".")[0] not in ABOUT:
                shown = (tree.shown(value, exact=True) for value in values)
                yield RowDifference("deviation", path, *shown)
        changes = [[one for one in row.deviations if one.origin in FOUND_ORIGINS] for row in (a, b)]
    else:
        changes = [list(row.deviations) for row in (a, b)]
    in_a, in_b = ({one.path: one.after for one in row_changes} for row_changes in changes)
    recipe_values = {one.path: one.before for each in reversed(changes) for one in reversed(each)}
    for path in sorted(set(in_a) | set(in_b)):
        unchanged = recipe_values[path] if _have_same_recipe(a, b) else "as in its recipe"
        before, after = in_a.get(path, unchanged), in_b.get(path, unchanged)
        if before != after:
            yield RowDifference("deviation", path, before, after)


def _differing_versions(a: Row, b: Row) -> Iterator[RowDifference]:
    for name in sorted(set(a.versions) | set(b.versions)):
        values = a.versions.get(name, "none"), b.versions.get(name, "none")
        if values[0] != values[1]:
            yield RowDifference("machine", f"version of {name}", *values)


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _change(a: object, b: object) -> str:
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        return ""
    return f"{b - a:+,}" if isinstance(a, int) and isinstance(b, int) else f"{b - a:+,.4g}"
