"""What the command figure does."""

from __future__ import annotations

from pathlib import Path

import typer

from trainer.base.commands import command
from trainer.base.errors import UserError, did_you_mean
from trainer.report.curves import find_curves
from trainer.report.drawings import FIGURES, FORMATS, explanation, save_figure
from trainer.report.figures import trades
from trainer.report.rows import open_table, stores_of
from trainer.report.tables import find_metric

_SIZES_IN = (2.0, 20.0)


def draw(
    ablation: str,
    what: str,
    size_in: float,
    format_: str,
    out: str,
    metric: str,
    runs: Path,
    results: str,
) -> None:
    """Write a figure of an ablation and say where it is. Raises UserError."""
    if not ablation:
        raise UserError(
            "figure: ablation= missing", f"add ablation=<name>; {command('table')} lists them"
        )
    _check_choice("what", what, FIGURES)
    if not _SIZES_IN[0] <= size_in <= _SIZES_IN[1]:
        raise UserError(
            f"size={size_in:g}: not a width between {_SIZES_IN[0]:g} and {_SIZES_IN[1]:g} inches",
            "use size=5.5 for a column of a paper",
        )
    stores = stores_of(results)
    table = open_table(ablation, stores, runs, find_metric(metric))
    name = f"{table.name}.{what}" + (f".{metric}" if metric != "top1" else "")
    paths = _paths(stores[0] / name, format_, out)
    save_figure(table, find_curves(stores, table), what, size_in, paths)
    typer.echo(explanation(table, what))
    if what == "cost":
        for line in dict.fromkeys(trade.warning for trade in trades(table) if trade.warning):
            typer.echo(f"warning: {line}")
    typer.echo(f"stored {', '.join(map(str, paths))}")


def _paths(default: Path, format_: str, out: str) -> list[Path]:
    """The files to write: out as it is, or the default one with the suffix of each format."""
    kinds = format_.replace(",", " ").split()
    for kind in kinds:
        _check_choice("format", kind, FORMATS)
    if not out:
        return [Path(f"{default}.{kind}") for kind in kinds or FORMATS]
    suffix = Path(out).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        return [Path(f"{out}.{kind}") for kind in kinds or FORMATS]
    if kinds not in ([], [suffix]):
        raise UserError(
            f"out={out}: is not {format_}", f"leave out format=, or end out= in .{kinds[0]}"
        )
    return [Path(out).with_suffix(f".{suffix}")]


def _check_choice(option: str, given: str, known) -> None:
    if given not in known:
        raise UserError(
            f"{option}={given}: unknown{did_you_mean(given, known)}", f"valid: {', '.join(known)}"
        )
