"""`rsb drill`: faults on purpose, in a table."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer.cli.options import app, user_errors


@app.command()
@user_errors
def drill(
    only: Annotated[
        str, typer.Option(help="Only faults of these kinds: kill,oom; absent: all.")
    ] = "",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Drills at a time; absent: one for each core.")
    ] = None,
) -> None:
    """Train on the digits under every fault of inject=, and compare with an undisturbed run. Exit 1
    where one is not as promised.

    It runs on the CPU, where the same means the same bits; on your own machines: rsb train
    --inject.
    """
    from trainer.base.settings import num_cores
    from trainer.runs import summary as show
    from trainer.tools.drill import chosen_drills, run_drills

    drills = chosen_drills(only)
    out = show.console()
    with show.progress(out, "drills", len(drills)) as each:
        found = run_drills(drills, jobs or num_cores(), each)
    out.print(drill_table(found))
    for seen in found:
        if seen.wrong:
            out.print(
                f"{seen.drill.name}: {'; '.join(seen.wrong)}; its last lines:",
                style="bold red",
                markup=False,
            )
            out.print("\n".join(seen.output.splitlines()[-15:]), markup=False, highlight=False)
    raise typer.Exit(1 if any(seen.wrong for seen in found) else 0)


def drill_table(found):
    """What was promised and what was seen of each drill, as a Rich table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("fault", "promised", "seen", "ok")
    for seen in found:
        mark = "[bold red]no[/]" if seen.wrong else "[green]yes[/]"
        table.add_row(
            escape(seen.drill.name),
            escape(seen.drill.promise),
            escape("; ".join((seen.facts, *seen.wrong))),
            mark,
        )
    return table
