"""What the command watch shows: a table that is drawn again, and a page that loads itself again."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.base.commands import command
from trainer.base.disk import UnfitFile, open_regular, write_atomically
from trainer.base.errors import UserError, did_you_mean, printable
from trainer.base.plural import counted, duration
from trainer.base.terminal import open_terminal, readable
from trainer.runs.own_runs import DAMAGED, KILLED, RUNNING, STALE, score_text
from trainer.runs.watch import WatchedRun, watched_runs

_HEADS = ("run", "state", "epochs", "loss", "top-1 %", "images/s", "wait", "left", "last line")
_STYLES = {RUNNING: "green", STALE: "bold red", KILLED: "red", DAMAGED: "red", "diverged": "red"}
_LINES_AROUND = 6  # of a terminal: head, frame, prompt
_NUM_LOG_LINES, _NUM_LOG_BYTES = 12, 8192  # of the log of a run that is watched alone
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>runs</title>
<meta http-equiv="refresh" content="{refresh_s}">
<meta name="viewport" content="width=device-width">
<style>body{{font:15px system-ui,sans-serif;margin:2em;color-scheme:light dark}}
div{{overflow-x:auto}}table{{border-collapse:collapse}}td,th{{padding:.3em .8em;text-align:left;
border-bottom:1px solid #8885;white-space:nowrap;font-variant-numeric:tabular-nums}}</style>
<h1>{title}</h1><p>{now}, again every {refresh_s} s</p>
<div><table><tr>{heads}</tr>{rows}</table></div>{log}</html>
"""


def watch(
    runs: Path,
    results: Path,
    run: str,
    once: bool,
    page: str,
    every_s: float,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Show the runs, those of lr-find too, until Ctrl-C; once where that is asked for, or the
    output is no terminal and there is no page to keep up to date.

    run: only this one, with the end of its log. page: a file that is written each time, "1" for
    watch.html in `runs`. Raises UserError for a run that is not there.
    """
    out = open_terminal()
    path = None if not page else runs / "watch.html" if page == "1" else Path(page)
    once = once or not (out.is_terminal or path)

    def look() -> Group:
        found = _wanted(watched_runs(runs, results), run, runs)
        log = _end_of_log(runs / Path(run).name) if run else ""
        if path is not None:
            _write(path, found, log, every_s)
        return _shown(found, log, runs, out)

    if once:
        out.print(look())
    else:
        _keep_showing(look, out, every_s, wait)
    if path is not None:
        out.print(printable(f"page   {path}"), markup=False)


def _keep_showing(
    look: Callable[[], Group], out: Console, every_s: float, wait: Callable[[float], None]
) -> None:
    try:
        with Live(look(), console=out, auto_refresh=False) as live:
            while True:
                wait(every_s)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return


def _write(path: Path, found: Sequence[WatchedRun], log: str, every_s: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page_of(found, log, every_s).encode())
    except OSError as error:
        raise UserError(f"page={path}: cannot write there ({error.strerror})") from None


def _wanted(found: list[WatchedRun], run: str, runs: Path) -> list[WatchedRun]:
    """All, or the one of a name or folder. Raises UserError where it is not there."""
    if not run:
        return found
    name = Path(run).name
    wanted = [one for one in found if one.own.run == name]
    if not wanted:
        near = did_you_mean(name, [one.own.run for one in found])
        raise UserError(f"run={run}: no run folder in {runs}{near}", "runs lists yours")
    return wanted


def _shown(found: Sequence[WatchedRun], log: str, runs: Path, out: Console) -> Group:
    if not found:
        hint = command(recipe="A3", model="resnet18")
        return Group(Text(printable(f"no run in {runs}; `{hint}`")))
    # a table that is higher than the terminal would lose its end, which is the latest
    most = max(1, out.size.height - _LINES_AROUND) if out.is_terminal else len(found)
    table = Table(*_HEADS)
    for one in found[-most:]:
        table.add_row(*map(Text, _cells(one)), style=_STYLES.get(one.state))
    left_out = len(found) - most
    more = [Text(f"and {left_out} older ones: runs lists all")] if left_out > 0 else []
    return Group(table, *more, *([Text(log)] if log else []))


def _cells(one: WatchedRun) -> tuple[str, ...]:
    own = one.own
    epochs = "" if own.epochs is None else f"{own.epochs:g}"
    if own.num_trials is not None:
        epochs = counted(own.num_trials, "trial")
    if own.epochs is not None and own.epochs_done is not None:
        epochs = f"{own.epochs_done:g} of {own.epochs:g} ({one.done_share or 0:.0%})"
    return (
        readable(own.run),
        one.state,
        epochs,
        _number(one.loss_nats, "{:.4f}"),
        score_text(own),
        _number(one.images_per_s, "{:.0f}"),
        _number(one.wait_share, "{:.0%}"),
        "" if one.left_s is None else duration(one.left_s),
        "" if one.silent_s is None else f"{duration(one.silent_s)} ago",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _end_of_log(folder: Path) -> str:
    """The last lines of a run's log.txt; nothing where it cannot be read."""
    try:
        with open_regular(folder / "log.txt") as file:
            file.seek(max(0, file.seek(0, 2) - _NUM_LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, UnfitFile):
        return ""
    return readable("\n".join(lines[-_NUM_LOG_LINES:]))


def page_of(found: Sequence[WatchedRun], log: str, every_s: float) -> str:
    """The same as a page of its own, which loads itself again."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(one)) + "</tr>"
        for one in reversed(found)
    )
    running = sum(one.state == RUNNING for one in found)
    return _PAGE.format(
        refresh_s=max(1, round(every_s)),
        title=f"{running} of {len(found)} runs running",
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        heads="".join(f"<th>{head}</th>" for head in _HEADS),
        rows=rows,
        log=f"<pre>{html.escape(log)}</pre>" if log else "",
    )
