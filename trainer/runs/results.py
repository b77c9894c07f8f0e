"""The store: one JSON file per finished or diverged run, written once; merging two stores is
copying files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from trainer.base.component import NonNegative, StrictModel
from trainer.base.disk import read_regular, write_atomically
from trainer.base.errors import UserError
from trainer.base.names import inside, one_name, plain_text
from trainer.base.scores import CLASSIFICATION, score_label

LARGEST_ROW_KIB = 1024


class RowError(UserError):
    """A row that is asked for is not there, or its file is damaged."""


def _is_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _exact_json(value: Any) -> Any:
    """The value as JSON has it, sequences as lists. Raises ValueError for what JSON cannot hold, or
    no printable text.
    """
    if isinstance(value, dict):
        return {plain_text(key): _exact_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_exact_json(part) for part in value]
    if isinstance(value, str):
        return plain_text(value)
    if (
        value is None
        or isinstance(value, bool | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise ValueError(
        f"holds {value!r}, which is no JSON; write null, true, numbers, text, lists or mappings"
    )


# A row may come from anybody: its names stay in their folders, its texts are texts, its numbers are
# ones to reckon with.
Name = Annotated[str, AfterValidator(one_name)]
Text = Annotated[str, AfterValidator(plain_text)]
Time = Annotated[str, AfterValidator(_is_time)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ExactJson = Annotated[dict[str, Any], AfterValidator(_exact_json)]
Percent = Annotated[float, Field(ge=0, le=100)]
Amount = Annotated[NonNegative, Field(le=1e15)]


FOUND_ORIGINS = ("memory", "data", "weights")  # of deviations that the plan does not have


class RowDeviation(StrictModel):
    """One deviation of a run from its recipe: the value at `path` before and after, and who changed
    it: `set`, `profile` or `file`; `memory` that ran out, `data` stored with other pixels, or
    `weights` of another shape.
    """

    path: Text
    before: Text
    after: Text
    origin: Text


class SizeScore(StrictModel):
    """What a finished run's scored weights score on its validation images at another size than the
    recipe's test_px, by the recipe's own crop share and interpolation.
    """

    test_px: Count
    top1_pct: Percent
    top5_pct: Percent
    loss_nats: float | None


class Row(StrictModel):
    """The whole truth of a run.

    digest: of the recipe as published. resolved_recipe: what ran, complete and exact, floats by
    their shortest exact text; None in rows of the first edition, and so is bad_images. deviations:
    every deviation from the recipe, rounded for reading: nothing is worked out from them. plugins:
    sha256 of each file of components of the user's own, by its path. data_fingerprint: of the files
    or arrays trained on: names, labels and sizes of files. content_sha256: of their very bytes;
    None in older rows. ignored_files: that lay among them and were not read, counted by split and
    extension. Scores are of the last evaluation, in percent of num_val_images; loss_nats is the
    recipe's loss against unsmoothed targets. train_s: without evaluations and, since there is
    compile_s, without compiling. peak_mem_mib: in use; reserved_mem_mib: held by torch's allocator
    of a GPU, and None on a CPU. scored: the weights that the scores belong to, the model's own or
    their average; other_top1_pct: of the ones not scored, where the run kept an average. task: what
    was learned. top1_pct, top5_pct: None for another task than classification, whose scores are in
    scores_pct, by their names in metrics.jsonl, the main one first, its other weights' in
    other_top1_pct too; class_pct: of each class by its name, None where no image has it.
    majority_pct: the main score of always answering the class that training has most of; None in
    older rows.
    bitwise: may a rerun on this machine be compared bit for bit? changes: what a resumed run found
    otherwise than the process before it (device, precision, threads, versions, code), each with its
    step, and where memory ran out; the row's own values are those of the last process. step_s: the
    median seconds of an optimizer step, evaluations left out; step_spread_share: the middle half of
    the steps lies within so much of it; load_per_core: the machine's load average by its cores, the
    run's own included: above 1 processes wait for a core. All three are None in older rows.
    curves_incomplete: lines of metrics.jsonl were lost on the disk while the run was stopped.
    injected: faults on purpose (inject=) that touched its result or its speed; with the first it
    stays out of the store. num_top1_by_epoch: images right at the end of every epoch, of the scored
    weights; empty in older rows, and where one is not known; score_by_epoch_pct: the main score,
    where it is no share of the images. best_epoch: whose weights are kept beside the last ones
    (keep=best); chosen on val, so that epoch's score is no result. test_sizes: scores at further
    image sizes (test_px=), beside the result and no part of it. eval_batch: images at once in an
    evaluation. numa: how each rank was bound to the cores near its GPU, by our launcher. stop_if:
    what would have ended the run early (off_track), so that its score is of a run that was not.
    weights_sha256: of the scored weights, see `weights_digest`. parent: the run
    whose weights it started from (weights=<run>), parent_sha256: the digest of its last weights, if
    it were those. teacher: the model whose answers it learned (distill), teacher_sha256: of the
    file of its weights, teacher_run: the run that they are of, if they are one's.
    """

    run: Name
    recipe: Name
    version: Annotated[int, Field(ge=1, le=9999)]
    digest: Text
    model: Name
    data: Name
    data_fingerprint: Text
    content_sha256: Sha256 | None = None
    ignored_files: dict[Text, Count] = {}
    split: Text
    seed: Count
    deviations: tuple[RowDeviation, ...]
    resolved_recipe: ExactJson | None = None
    bad_images: Literal["fail", "skip"] | None = None
    plugins: dict[Text, Sha256] = {}
    ablation: Text | None = None
    cell: Text | None = None
    status: Literal["finished", "diverged"]
    scored: Literal["model", "average"]
    task: Text = CLASSIFICATION
    top1_pct: Percent | None
    top5_pct: Percent | None
    scores_pct: dict[Text, Percent] = {}
    class_pct: dict[Text, Percent | None] = {}
    loss_nats: float | None
    other_top1_pct: Percent | None
    majority_pct: Percent | None = None
    num_top1_by_epoch: tuple[Count, ...] = ()
    score_by_epoch_pct: tuple[Percent, ...] = ()
    best_epoch: Count | None = None
    test_sizes: tuple[SizeScore, ...] = ()
    eval_batch: Annotated[Count, Field(ge=1)] = 128
    num_val_images: Annotated[Count, Field(ge=1)]
    num_replaced_images: Count
    epochs: Count
    steps: Count
    batch_images: Count
    norm_images: Count
    num_params: Count
    gmacs: Amount
    images_per_s: Amount
    train_s: Amount
    step_s: Amount | None = None
    step_spread_share: Amount | None = None
    load_per_core: Amount | None = None
    compile_s: Amount = 0.0
    peak_mem_mib: Amount
    reserved_mem_mib: Amount | None = None
    precision: Text
    loader: Text
    num_workers: Count
    num_threads: Annotated[Count, Field(ge=1, le=4096)]
    world_size: Annotated[Count, Field(ge=1)]
    numa: Text = "off"
    bitwise: bool
    changes: tuple[Text, ...] = ()
    curves_incomplete: bool = False
    injected: tuple[Text, ...] = ()
    stop_if: Text = ""
    activation_checkpointing: bool = False
    compiled: bool = False
    compile_mode: Text = "default"
    cuda_graphs: bool = False
    half_group_norm: bool = False
    weights_sha256: Text | None
    parent: Name | None = None
    parent_sha256: Text | None = None
    teacher: Text | None = None
    teacher_sha256: Sha256 | None = None
    teacher_run: Name | None = None
    device: Text
    versions: dict[Text, Text]
    commit: Text | None
    dirty: bool | None
    finished_utc: Time

    @property
    def percentages(self) -> dict[str, float | None]:
        """The scores by their names in metrics.jsonl, the main one first."""
        if self.task == CLASSIFICATION:
            return {"top1_pct": self.top1_pct, "top5_pct": self.top5_pct}
        return dict(self.scores_pct)

    @property
    def is_counted(self) -> bool:
        """Is the main score a share of the val images, each right or wrong?"""
        return self.task == CLASSIFICATION

    @property
    def main_pct(self) -> float | None:
        """The score that rows are compared by; None where there is none."""
        return next(iter(self.percentages.values()), None)

    @property
    def main_label(self) -> str:
        """Its name for a reader."""
        return score_label(next(iter(self.percentages), "score"))

    @property
    def by_epoch_pct(self) -> tuple[float, ...]:
        """The main score at the end of every epoch; empty where one is not known."""
        counts = self.num_top1_by_epoch
        return self.score_by_epoch_pct or tuple(100 * n / self.num_val_images for n in counts)

    def as_json(self) -> bytes:
        """The row as its file holds it."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def touches_result(injected: Iterable[str]) -> bool:
    """Has one of the faults that a row names moved its result? `slow` moves its speed alone."""
    return any(not fault.startswith("slow@") for fault in injected)


def rows_folder(results: Path) -> Path:
    """Where a store keeps its rows."""
    return results / "rows"


def row_path(results: Path, run: str) -> Path:
    """The file of a run's row. Raises FolderError for a name that is none."""
    inside(rows_folder(results), run, "run")
    return inside(rows_folder(results), f"{run}.json", "run")


def store_row(results: Path, row: Row) -> Path:
    """Write a row under its run's name, atomically."""
    path = row_path(results, row.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, row.as_json())
    return path


def read_row(results: Path, run: str) -> Row | None:
    """The row of a run, or None where it has none yet.

    Raises RowError for a damaged file, FolderError for a name that is none.
    """
    path = row_path(results, run)
    row = read_row_file(path) if path.exists() else None
    if row is not None and row.run != run:
        raise RowError(f"{path}: the row of {row.run}; use a file that is named after it")
    return row


def read_row_file(path: Path) -> Row:
    """The row in a file.

    Raises RowError for a damaged file, FolderError for a link that leads out of the file's folder.
    """
    inside(path.parent, path.name, "row")
    try:
        return Row.model_validate_json(read_regular(path, LARGEST_ROW_KIB * 1024).decode())
    except (ValueError, OSError) as error:
        raise RowError(
            f"{path}: not a row of this suite ({_first(error)}); move it away and run again"
        ) from None


def _first(error: Exception) -> str:
    """The first thing that is wrong, in one line."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"])))
    return str(error).splitlines()[0]
