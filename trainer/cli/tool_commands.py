"""What the commands drill and matrix do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from trainer.base.disk import write_atomically
from trainer.base.settings import check_writable, num_cores
from trainer.runs import summary
from trainer.tools.drill import DrillResult, chosen_drills, run_drills
from trainer.tools.matrix import chosen_models, chosen_recipes, fill, matrix_markdown

_NUM_TAIL_LINES = 15


def drill(only: str, jobs: int | None) -> bool:
    """Run the fault-injection tests and print a table of them; did all hold their promise?"""
    drills = chosen_drills(only)
    out = summary.console()
    with summary.progress(out, "drills", len(drills)) as advance:
        found = run_drills(drills, jobs or num_cores(), advance)
    out.print(drill_table(found))
    failed = [result for result in found if result.failures]
    for result in failed:
        line = f"{result.drill.name}: {'; '.join(result.failures)}; last lines of its output:"
        out.print(line, style="bold red", markup=False)
        tail = "\n".join(result.output.splitlines()[-_NUM_TAIL_LINES:])
        out.print(tail, markup=False, highlight=False)
    return not failed


def drill_table(results: Sequence[DrillResult]) -> Table:
    """The expected and the observed outcome of each fault-injection test."""
    table = Table("fault", "expected", "observed", "ok")
    for result in results:
        observed = "; ".join((result.observed, *result.failures))
        texts = map(escape, (result.drill.name, result.drill.promise, observed))
        table.add_row(*texts, "[bold red]no[/]" if result.failures else "[green]yes[/]")
    return table


def matrix(models: str, recipes: str, results: Path) -> None:
    """Print the compatibility matrix of some models and recipes, and store it where it is whole."""
    rows, columns = chosen_recipes(recipes), chosen_models(models)
    is_whole, out = not models and not recipes, summary.console()
    if is_whole:
        check_writable("results", results)
    with summary.progress(out, "cells", len(rows) * len(columns)) as advance:
        text = matrix_markdown(list(fill(rows, columns, advance)))
    out.print(text, markup=False)
    if is_whole:
        write_atomically(results / "matrix.md", text.encode())
