"""`plan --ablation`: an ablation's cells, the runs that have a row, how long the rest takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.ablation.cells import Cell, command, plan_of_cell
from trainer.ablation.questions import question_of
from trainer.ablation.spec import Ablation, load_ablation
from trainer.ablation.throughput import Throughput, measure_throughput, shape_of
from trainer.base.cores import BUSY_LOAD, load_per_core
from trainer.base.errors import UserError
from trainer.base.plural import counted, duration, plural
from trainer.base.settings import Settings, make_settings
from trainer.base.stats import ALPHA, MOST_SEEDS, published_spread_pct, seeds_needed
from trainer.data.dataset import open_data
from trainer.data.profile import data_folder
from trainer.models.build import assemble
from trainer.recipe.explain import diff_rows
from trainer.recipe.plan import Plan
from trainer.recipe.tree import shown
from trainer.report.rows import by_cell, find_rows
from trainer.report.tables import METRICS, summarize
from trainer.report.tables import Table as TableOfRows
from trainer.runs import summary as show
from trainer.runs.chance import chance_warning
from trainer.runs.plan_notes import FEWEST_FULL_STEPS, num_full_steps
from trainer.runs.results import Row

MAX_DIFFERENCES = 8  # listed in a cell's line; two recipes may differ in dozens
BOUND_S = 4.0  # of measuring one shape


def print_plan(
    out: Console,
    name: str,
    data_dir: Path | None,
    machine: Mapping[str, Any],
    results: Path,
    num_measured: int,
) -> None:
    """Print all that a user should check before an ablation takes hours. machine: device, precision
    and workers as given.

    Raises UserError for an invalid ablation file, or a model of a cell that cannot be built.
    """
    ablation = load_ablation(name)
    question = question_of(ablation)
    rows = by_cell(question, find_rows(results, [question]))
    print_head(out, ablation, summarize(question, rows, METRICS["top1"]))
    check_models(ablation)
    for group in groups_of(ablation):
        print_group(out, ablation, group, rows)
    missing = [(cell, seed) for cell, seed in ablation.runs if rows[cell.name, seed] is None]
    num_stored = len(rows) - len(missing)
    out.print()
    line = (
        f"{counted(len(rows), 'run')}: {num_stored} with a row in {results}, {len(missing)} to run"
    )
    out.print(Text(line), soft_wrap=False)
    if missing:
        first = command(*missing[0])
        out.print(Text(f"command of the first: {first}"), soft_wrap=False)
    if num_measured and missing:
        print_hours(out, missing, data_dir, machine, num_measured)


def print_head(out: Console, ablation: Ablation, table: TableOfRows) -> None:
    """Question, source, and what all cells share. table: of the rows there are."""
    page = ablation.page
    budget = "the recipe's epochs on its data"
    if page.budget and page.budget.epochs:
        budget = counted(page.budget.epochs, "epoch")
    elif page.budget:
        budget = f"{page.budget.share:g} of the recipe's epochs"
    fields = {
        "question": page.question,
        "source": page.source,
        "design": page.design.name.replace("_", " "),
        "base": f"{page.recipe} with {', '.join(page.models)} on {', '.join(page.data)}",
        "budget": budget,
        "seeds": f"{', '.join(map(str, page.seeds))}; {planned_seeds(ablation, table)}",
    }
    out.print(f"[bold]{page.name}[/] {escape(page.title)}", soft_wrap=False)
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in ((name, value) for name, value in fields.items() if value):
        grid.add_row(name, Text(value))
    out.print(grid, soft_wrap=False)


def planned_seeds(ablation: Ablation, table: TableOfRows) -> str:
    """How many seeds the smallest difference of interest needs: as the table of the rows has it,
    and before there are any by the published spread, so that a design can be changed while that is
    free.
    """
    points = ablation.page.smallest_points
    found = [summary.needed for summary in table.cells if summary.needed]
    by = "as the table of the rows has it"
    if found:
        numbers = sorted(
            MOST_SEEDS + 1 if one.num_seeds is None else one.num_seeds for one in found
        )
    else:
        num_images = min(cell.planned.profile.num_val for cell in ablation.cells)
        alpha = ALPHA / max(1, sum(not cell.is_base for cell in ablation.cells))
        std = published_spread_pct(num_images)
        numbers = [seeds_needed(points, std, is_paired=False, alpha=alpha) or MOST_SEEDS + 1]
        by = f"by RSB's spread, scaled to {num_images:,} val images"
    ends = [
        f"more than {MOST_SEEDS:,}" if number > MOST_SEEDS else f"{number:,}"
        for number in dict.fromkeys((numbers[0], numbers[-1]))
    ]
    return (
        f"seeds needed: {' to '.join(ends)} a cell, to show a difference of {points:g}"
        f" {plural('point', points)} (smallest_points), {by}"
    )


def groups_of(ablation: Ablation) -> list[list[Cell]]:
    """The cells by group, the base of each first."""
    names = dict.fromkeys(cell.group for cell in ablation.cells)
    return [[cell for cell in ablation.cells if cell.group == name] for name in names]


def check_models(ablation: Ablation) -> None:
    """Build the model of every cell, equal ones once: an error has its cell's line.

    Raises ConfigError.
    """
    tried = set()
    for cell in ablation.cells:
        shape = shape_of(cell.planned)
        if shape not in tried:
            try:
                assemble(cell.planned)
            except UserError as error:
                raise ablation.located(error, cell) from None
        tried.add(shape)


def print_group(
    out: Console,
    ablation: Ablation,
    cells: Sequence[Cell],
    rows: Mapping[tuple[str, int], Row | None],
) -> None:
    """The table of one group: what each cell changes, its published score, its rows."""
    is_cumulative = ablation.page.design.name == "cumulative"
    out.print()
    heading = (
        f"[bold]{escape(cells[0].group)}[/]: {counted(len(cells), 'cell')}, {steps_line(cells)}"
    )
    out.print(heading, soft_wrap=False)
    stored = [row for cell in cells for seed in ablation.seeds if (row := rows[cell.name, seed])]
    for line in expectations(cells, stored):
        out.print(Padding(Text(line, style="yellow"), (0, 0, 0, 2)), soft_wrap=False)
    shared = shared_deviations(cells)
    if shared:
        line = f"in every cell, overrides of its recipe: {'; '.join(in_short(shared))}"
        out.print(Padding(Text(line, style="yellow"), (0, 0, 0, 2)), soft_wrap=False)
    has_scores = any(cell.published is not None for cell in cells)
    against = "added to the previous" if is_cumulative else "difference from the base"
    table = Table("cell", against, *(["published"] if has_scores else []), "rows", pad_edge=False)
    for column in table.columns[:2]:
        column.overflow = "fold"
    for column in table.columns[2:]:
        column.no_wrap = True
    for number, cell in enumerate(cells):
        before = cells[number - 1] if is_cumulative else cells[0]
        score = [f"{cell.published:g}" if cell.published is not None else ""] if has_scores else []
        found = [rows[cell.name, seed] for seed in ablation.seeds]
        table.add_row(Text(cell.name), Text(difference(before, cell)), *score, done(found))
    out.print(table, soft_wrap=False)
    for source in dict.fromkeys(cell.published_source for cell in cells if cell.published_source):
        out.print(Text(f"published: {source}"), soft_wrap=False)


def expectations(cells: Sequence[Cell], rows: Sequence[Row]) -> Iterator[str]:
    """What the scores of cells will not show, and those of their rows do not."""
    worths = [num_full_steps(cell.planned) for cell in cells]
    known = [worth for worth in worths if worth is not None and worth < FEWEST_FULL_STEPS]
    if len(known) == len(cells):
        yield (
            f"note: expect about chance in every cell: its steps are worth {max(known):.2g} at most"
            " at the peak rate; train for more epochs"
        )
    if found := chance_warning(rows):
        yield f"note: {found}"


def steps_line(cells: Sequence[Cell]) -> str:
    """The length of the cells in steps and epochs."""
    steps = _from_to((cell.planned.num_steps for cell in cells), "step")
    return f"{steps} each, {_from_to((cell.planned.recipe.epochs for cell in cells), 'epoch')}"


def _from_to(counts: Iterable[int], word: str) -> str:
    """The least and the most, once where they are the same, of what."""
    ordered = sorted(counts)
    ends = dict.fromkeys(f"{count:,}" for count in (ordered[0], ordered[-1]))
    return f"{' to '.join(ends)} {plural(word, ordered[-1])}"


def shared_deviations(cells: Sequence[Cell]) -> list[tuple[str, Any]]:
    """The deviations that the runs of all cells share: (path, value)."""
    final = [{change.path: change for change in cell.planned.deviations} for cell in cells]
    return [
        (path, change.after)
        for path, change in final[0].items()
        if change.before != change.after
        and all(path in other and other[path].after == change.after for other in final)
    ]


def in_short(changes: Iterable[tuple[str, Any]]) -> list[str]:
    """Changes as `path value`; of a component that is replaced, the new name alone."""
    changes = [change for path, value in changes for change in _apart(path, value)]
    named = {path.removesuffix(".name"): value for path, value in changes if path.endswith(".name")}
    kept = [(path, value) for path, value in changes if path.rpartition(".")[0] not in named]
    named |= {path: value["name"] if isinstance(value, dict) else value for path, value in kept}
    return [
        f"{path} {'on' if path.endswith(f'.{value}') else shown(value, exact=True)}"
        for path, value in named.items()
    ]


def _apart(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A section split into its parts; a component stays one."""
    if isinstance(value, dict) and "name" not in value:
        for key, part in value.items():
            yield from _apart(f"{path}.{key}", part)
    else:
        yield path, value


def difference(before: Cell, cell: Cell) -> str:
    """How a cell's recipe differs from another's, in short."""
    if cell.is_base:
        return f"the base, {_recipe_name(cell.planned)}"
    rows = diff_rows(before.planned.recipe, cell.planned.recipe)
    lines = in_short((row.path, row.b) for row in rows)
    name = _recipe_name(cell.planned)
    recipe = "" if _recipe_name(before.planned) == name else f"recipe {name}: "
    rest = len(lines) - MAX_DIFFERENCES
    return recipe + "; ".join(lines[:MAX_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")


def _recipe_name(plan: Plan) -> str:
    return f"{plan.recipe.name}.v{plan.recipe.version}"


def done(rows: Sequence[Row | None]) -> str:
    """How many of a cell's seeds have a row, such as `2 of 3`."""
    found = [row for row in rows if row is not None]
    num_diverged = sum(row.status == "diverged" for row in found)
    return f"{len(found)} of {len(rows)}" + (f", {num_diverged} diverged" if num_diverged else "")


def print_hours(
    out: Console, missing: Sequence[tuple[Cell, int]], data_dir: Path | None,
    machine: Mapping[str, Any], num_measured: int,
) -> None:  # fmt: skip
    """Print how long the missing runs will take here, one after another, and the basis of that."""
    cells = list({cell.name: cell for cell, _ in missing}.values())
    try:
        opened = {
            cell.data: open_data(cell.planned.profile, data_folder(cell.data, data_dir))
            for cell in cells
        }
    except UserError as error:
        out.print(f"no time estimate: {error}", markup=False, soft_wrap=False)
        return
    in_memory = all(data.train.is_in_memory for data in opened.values())
    settings = make_settings(**machine, in_memory=in_memory)
    load = load_per_core() or 0.0  # before: measuring is a load itself
    throughputs = measured(cells, settings, opened, num_measured)
    seconds = {cell.name: throughputs[shape_of(cell.planned)].run_s(cell.planned) for cell in cells}
    table = Table("to run", "seeds", "s/step", "minutes/run", pad_edge=False)
    table.columns[0].overflow = "fold"
    for cell in cells:
        seeds = ", ".join(str(seed) for one, seed in missing if one.name == cell.name)
        step_s = throughputs[shape_of(cell.planned)].step_s
        table.add_row(Text(cell.name), seeds, f"{step_s:.3g}", f"{seconds[cell.name] / 60:.1f}")
    out.print()
    out.print(table, soft_wrap=False)
    is_busy = load > BUSY_LOAD
    total = duration(sum(seconds[cell.name] for cell, _ in missing))
    total = f"about {total}" if is_busy else total
    line = f"{counted(len(missing), 'run')} to do, {total} one after another"
    out.print(line, style="bold", soft_wrap=False)
    out.print(basis(throughputs, settings), soft_wrap=False, markup=False)
    if is_busy:
        line = (
            f"note: measured on a busy machine ({load:.1f} processes a core in the last minute):"
            " alone it takes less time"
        )
        out.print(line, style="yellow", soft_wrap=False, markup=False)


def measured(
    cells: Sequence[Cell], settings: Settings, opened: Mapping, num_measured: int
) -> dict[str, Throughput]:
    """The throughput of every shape among the cells."""
    plans = {shape_of(cell.planned): cell for cell in cells}
    with show.progress(show.console(), "measuring", len(plans)) as each:
        throughputs = {}
        for shape, cell in plans.items():
            plan = plan_of_cell(cell, cell.planned.seed)
            throughputs[shape] = measure_throughput(
                plan, settings, opened[cell.data], num_measured, BOUND_S
            )
            each()
    return throughputs


def basis(throughputs: Mapping[str, Throughput], settings: Settings) -> str:
    """The basis of an estimate, as a sentence."""
    steps = _from_to((one.num_steps for one in throughputs.values()), "step")
    return (
        f"estimated from {steps} and one batch of val for each of "
        f"{counted(len(throughputs), 'kind')} of cells, measured now on {settings.device}, "
        f"{settings.precision}, {counted(settings.num_threads, 'thread')}; included: the start "
        "of each run; not included: the program's own, checkpoints, export"
    )
