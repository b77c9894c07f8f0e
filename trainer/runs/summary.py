"""What the commands print: tables and lines, no decisions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from trainer.base.commands import command
from trainer.base.cores import load_per_core
from trainer.base.devices import is_tried
from trainer.base.plural import counted
from trainer.base.scores import score_label
from trainer.base.settings import Settings
from trainer.base.tensorboard import tensorboard_command
from trainer.base.terminal import open_terminal
from trainer.data.check import (
    DataReport,
    duplicates,
    duplicates_table,
    report_table,
    rotated_note,
)
from trainer.data.dataset import OpenedData
from trainer.data.image_folder import STAND_INS
from trainer.engine.precise_norm import statistics_note
from trainer.models import zoo
from trainer.models.build import assemble, check_model_name
from trainer.models.edit.replacement import Replacement
from trainer.recipe.explain import ExplainedValue as Explained
from trainer.recipe.plan import Plan
from trainer.recipe.schema import Recipe
from trainer.runs.best_weights import BEST_FILE
from trainer.runs.export import is_timms
from trainer.runs.plan_lines import (
    batch_line,
    decay_line,
    growth_line,
    lr_per_epoch,
    lr_table,
    model_facts,
    sparkline,
    teacher_cost,
    teacher_facts,
)
from trainer.runs.plan_notes import (
    busy_note,
    channel_note,
    few_steps_note,
    normalization_note,
    precision_note,
    scaling_note,
    warmup_note,
    weights_note,
)
from trainer.runs.rescore import images_off, most_moved
from trainer.runs.results import Row, row_path, touches_result
from trainer.runs.row import deviation_of_data, deviation_rows
from trainer.tasks.teacher import Teacher


def console() -> Console:
    """The terminal, as every command but those of tables has it."""
    return open_terminal()


def plan_in_brief(
    out: Console,
    plan: Plan,
    settings: Settings,
    swaps: Sequence[Replacement] = (),
    teacher: Teacher | None = None,
) -> None:
    """The lines that stand above a run: recipe, deviations, what is changed in the model, batch,
    length, machine.
    """
    recipe = plan.recipe
    out.print(f"[bold]{recipe.name}.v{recipe.version}[/] {escape(recipe.title)}")
    out.print(f"{plan.model} on {escape(plan.profile.name)}, seed {plan.seed}")
    deviations(out, plan)
    weights_note(out, plan)
    normalization_note(out, plan)
    replaced_lines(out, recipe, swaps)
    warmup_note(out, plan)
    few_steps_note(out, plan)
    scaling_note(out, plan)
    channel_note(out, plan)
    if settings.device == "cpu":
        busy_note(out, load_per_core())
    if teacher is not None:
        out.print(f"taught by {teacher_facts(plan, teacher)}", markup=False)
    out.print(batch_line(plan))
    per_epoch = counted(plan.steps_per_epoch, "step")
    total = counted(plan.num_steps, "step")
    out.print(f"{counted(recipe.epochs, 'epoch')} x {per_epoch} = {total}")
    workers = "loading in the main process"
    if settings.num_workers:
        workers = counted(settings.num_workers, "worker")
    threads = counted(settings.num_threads, "thread")
    bound = "" if settings.numa == "off" else f", ranks bound by numa={settings.numa}"
    out.print(f"{settings.device}, {settings.precision}, {threads}, {workers}{bound}")
    if not is_tried(settings.device):
        out.print(
            f"note: device={settings.device} is untried: no run of ours has been made on one;"
            " device=cpu trains without it",
            style="yellow",
        )
    if settings.test_px:
        sizes, share = ", ".join(map(str, settings.test_px)), recipe.image.test_crop_share
        out.print(
            f"scored at {sizes} px too at the end, by the recipe's own crop share {share:g}:"
            f" the result is at {recipe.image.test_px} px"
        )
    precision_note(out, plan, settings.precision)


def deviations(out: Console, plan: Plan) -> None:
    """One line for each deviation from the recipe."""
    if not plan.deviations:
        out.print("deviations  none: the recipe as it stands")
    for change in deviation_rows(plan):
        line = f"deviation  {change.path}: {change.before} -> {change.after}  ({change.origin})"
        out.print(line, style="yellow", markup=False)


def changed_images(out: Console, data) -> None:
    """One line where images are not read as they are in their files."""
    for change in deviation_of_data(data):
        line = f"deviation  {change.path}: {change.before} -> {change.after}"
        out.print(line, style="yellow", markup=False)


def majority_line(out: Console, share_pct: float | None) -> None:
    """The score of always answering the most frequent class, where the labels are known."""
    if share_pct is not None:
        out.print(f"majority class: top-1 {share_pct:.1f} % by always answering it", markup=False)


def ignored_lines(out: Console, ignored: Mapping[str, int]) -> None:
    """Which files of the data set are not read, counted by split and extension."""
    if ignored:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())
        out.print(
            f"ignored    files that are no images here: {kinds}", style="yellow", markup=False
        )


def stand_in_line(out: Console, split: str) -> None:
    """Which split the scores are of, where none is called val. split: its name, or empty."""
    if split in STAND_INS:
        line = (
            f"validation is {split}/: there is no val/; what is chosen by its score is tuned to it"
        )
        out.print(f"note: {line}", style="yellow", markup=False)


def module_replacements(plan: Plan) -> tuple[Replacement, ...]:
    """What the recipe changes in timm's model, tried out; nothing is built where timm alone does
    it, weights and all.

    Raises UserError where the recipe and the model do not fit.
    """
    section = plan.recipe.model
    if section is None or (is_timms(plan) and section.start is None and section.pretrained is None):
        return ()
    check_model_name(plan.model)
    return assemble(plan)[1]


def replaced_lines(out: Console, recipe: Recipe, swaps: Sequence[Replacement]) -> None:
    """One line for each part of the model section; what `auto` chose stands out."""
    parts = tuple(recipe.model.parts()) if recipe.model else ()
    for swap in swaps:
        is_auto = any(part.chooses for key, part in parts if key == swap.part)
        line = (
            str(swap)
            if swap.places
            else f"{swap.part}: nothing replaced: {swap.note or swap.after}"
        )
        out.print(
            f"{'auto' if is_auto else 'replaced':9}  {line}",
            style="yellow" if is_auto else None,
            markup=False,
        )


def off_note(out: Console, rows: Sequence[Explained]) -> None:
    """How to write what a table shows as off."""
    if any(row.value is None for row in rows):
        out.print(
            'off: not there; a recipe leaves the key out, and set="key=null" turns it off',
            markup=False,
        )


def plan_in_full(
    out: Console,
    plan: Plan,
    model,
    swaps: Sequence[Replacement],
    teacher: Teacher | None = None,
) -> None:
    """All of a plan that a reader would check before spending hours. model, swaps: as `assemble`
    gives them. teacher: as `open_teacher`.
    """
    recipe = plan.recipe
    out.print(
        f"[bold]{recipe.name}.v{recipe.version}[/] {escape(recipe.title)}  digest"
        f" {plan.page_digest}"
    )
    out.print(f"{plan.model} on {escape(plan.profile.name)}, seed {plan.seed}")
    deviations(out, plan)
    weights_note(out, plan)
    normalization_note(out, plan)
    replaced_lines(out, recipe, swaps)
    table = Table(show_header=False, box=None, pad_edge=False)
    epochs, moved_px = counted(recipe.epochs, "epoch"), recipe.image.test_translate_px
    for name, value in {
        "steps": f"{plan.num_steps:,} = {epochs} x {plan.steps_per_epoch:,}",
        "batch": batch_line(plan),
        "images seen": (
            f"{plan.draws_per_epoch * recipe.epochs:,} = {recipe.epochs} x {plan.draws_per_epoch:,}"
        ),
        "unique images per epoch": (
            ("at most " if recipe.sampling else "")
            + f"{plan.unique_per_epoch:,} of {plan.profile.num_train:,}"
            + (f", classes by sampling {recipe.sampling.name}" if recipe.sampling else "")
            + (f" (each up to {recipe.repeats} times)" if recipe.repeats else "")
        ),
        "weight decay": decay_line(plan, model),
        "last step of an epoch": counted(plan.window_images(plan.steps_per_epoch - 1), "image"),
        "image": (
            f"{growth_line(plan)} for training, {recipe.image.test_px} px for testing"
            + (" (with the mirror image)" if recipe.image.test_flip else "")
            + (f" (moved by {moved_px} px too)" if moved_px else "")
        ),
        "model": model_facts(plan, model),
        "teacher": None
        if teacher is None
        else f"{teacher_facts(plan, teacher)}; {teacher_cost(plan, model, teacher)}",
    }.items():
        if value is not None:
            table.add_row(name, value)
    out.print(table)
    out.print(statistics_note(model, plan), markup=False)
    out.print(lr_table(plan))
    out.print(f"learning rate, epoch 0 to {recipe.epochs}: {sparkline(lr_per_epoch(plan))}")
    scaling_note(out, plan)
    warmup_note(out, plan)
    few_steps_note(out, plan)
    channel_note(out, plan)


def row(out: Console, row: Row, settings: Settings, plan: Plan) -> None:
    """The last lines of a run."""
    is_stored = not touches_result(row.injected)
    path = (
        row_path(settings.results, row.run) if is_stored else settings.runs / row.run / "row.json"
    )
    if row.status == "diverged":
        out.print(
            f"{row.run}: diverged after {counted(row.steps, 'step')}; row {path}",
            style="bold red",
            markup=False,
        )
        return
    other = (
        f" ({'model' if row.scored == 'average' else 'average'} {row.other_top1_pct:.2f} %)"
        if row.other_top1_pct
        else ""
    )
    out.print(f"run    {row.run}", markup=False)
    has_top5 = plan.profile.num_classes > 5  # else it says nothing
    more = {name: one for name, one in row.percentages.items() if has_top5 or name != "top5_pct"}
    out.print(
        f"{row.main_label}  {row.main_pct:.2f} %{other}"
        + "".join(f"  {score_label(name)} {one:.2f} %" for name, one in list(more.items())[1:])
        + f"  of {row.num_val_images} val images"
        + ("" if row.majority_pct is None else f"  (majority class {row.majority_pct:.1f} %)"),
        style="bold",
    )
    if row.majority_pct is not None and (row.main_pct or 0) <= row.majority_pct:
        out.print(
            "note: no better than always answering the most frequent class; train longer, or find a"
            f" rate: {command('lr-find')}",
            style="yellow",
            markup=False,
        )
    for at_px in row.test_sizes:
        top5 = f"  top-5 {at_px.top5_pct:.2f} %" if plan.profile.num_classes > 5 else ""
        out.print(f"       at {at_px.test_px} px  top-1 {at_px.top1_pct:.2f} %{top5}")
    if row.best_epoch is not None and row.by_epoch_pct:
        best_pct = row.by_epoch_pct[row.best_epoch - 1]
        out.print(
            f"best   epoch {row.best_epoch} had {best_pct:.2f} %, chosen on val and so no result:"
            f" {settings.runs / row.run / BEST_FILE}",
            markup=False,
        )
    out.print(
        f"time   {row.train_s:.0f} s of training, {row.images_per_s:.0f} images/s", markup=False
    )
    out.print(f"row    {path}", markup=False)
    out.print(
        f"model  {settings.runs / row.run}  ({opening(settings.runs / row.run, plan)})",
        markup=False,
    )
    out.print(f"curves {tensorboard_command(settings.runs)}", markup=False)


def opening(folder, plan: Plan) -> str:
    """The line of Python that opens a finished run's model."""
    if is_timms(plan):
        first = "import trainer.models.zoo, then " if zoo.has_model(plan.model) else ""
        return f"timm: {first}create_model('local-dir:{folder}', pretrained=True)"
    return f"not timm's alone: trainer.runs.run_folder.open_model('{folder}')"


@dataclass(frozen=True)
class Bar:
    """Work under way, shown by a bar. Called after each piece, or with the number of pieces."""

    out: Console
    shown: Progress
    task: TaskID

    def __call__(self, number: int = 1) -> None:
        self.shown.advance(self.task, number)

    def say(self, line: str) -> None:
        """Print a line on standard output; where the bar is on the same terminal, above it."""
        both_seen = self.out.is_terminal and self.shown.console.is_terminal
        out = self.shown.console if both_seen else self.out
        out.print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(out: Console, what: str, total: int) -> Iterator[Bar]:
    """A bar on standard error while work is done."""
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=open_terminal(stderr=True), transient=True) as shown:
        yield Bar(out, shown, shown.add_task(what, total=total))


def rescored(out: Console, row: Row, scores, digest: str, settings: Settings) -> bool:
    """The row's score beside the one found now; are they the same, to what may have moved where it
    was found? And are the weights the row's? digest: of those found.
    """
    most = most_moved(row, settings)
    off = images_off(row, scores)
    is_same = scores.num_images == row.num_val_images and off <= most
    for when, found, number in (
        ("row", row.percentages, row.num_val_images),
        ("now", scores.percentages(), scores.num_images),
    ):
        shown = (f"{score_label(name)} {found[name]:.4f} %" for name in scores.told())
        out.print(f"{when}  {'  '.join(shown)}  of {number} images")
    allowed = f", of {most} allowed on {settings.device} in {settings.precision}" if most else ""
    told = f"{'' if is_same else 'not '}the same" + (
        f" ({off} image{'s' * (off != 1)} off{allowed})" if off else ""
    )
    out.print(told, style="bold green" if is_same else "bold red", markup=False)
    is_rows = digest == row.weights_sha256
    if not is_rows:
        line = f"not the row's weights: {digest[:12]}, the row has {row.weights_sha256}"
        out.print(line[:200], style="bold red", markup=False)
    return is_same and is_rows


def data_reports(out: Console, data: OpenedData, reports: Mapping[str, DataReport]) -> bool:
    """Both splits' reports, and what is in both; would a run meet no bad image?"""
    for split, report in reports.items():
        out.print(report_table(report, split))
    is_sound = all(report.is_sound for report in reports.values())
    if both := duplicates(**reports):
        out.print(duplicates_table(both))
    if note := rotated_note(*reports.values()):
        out.print(note, style="yellow", markup=False)
    ignored_lines(out, data.ignored)
    stand_in_line(out, data.split)
    out.print(
        (
            "sound: training meets no bad image"
            if is_sound
            else (
                "not sound: training would stop at a bad image, and learn from what is left of a"
                " damaged one; mend the files, or use bad_images=skip for up to 1 % bad ones in"
                " train"
            )
        ),
        style="bold",
    )
    return is_sound
