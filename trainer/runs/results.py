"""The store: one JSON file per finished or diverged run, written once; merging two stores is copying files."""

from __future__ import annotations

import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from trainer.base.component import NonNegative, Page
from trainer.base.errors import UserError
from trainer.base.names import inside, one_name, plain_text
from trainer.runs.checkpoint import write_atomically

LARGEST_ROW_KIB = 1024
RERUN_SUFFIX = re.compile(r"(?<=-[0-9a-f]{6})-\d+$")  # what again=1 appends to a run's name


class RowError(UserError):
    """A row that is asked for is not there, or its file is damaged."""


def _is_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


# A row may come from anybody: its names stay in their folders, its texts are texts, its numbers are ones to reckon with.
Name = Annotated[str, AfterValidator(one_name)]
Text = Annotated[str, AfterValidator(plain_text)]
Time = Annotated[str, AfterValidator(_is_time)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Percent = Annotated[float, Field(ge=0, le=100)]
Amount = Annotated[NonNegative, Field(le=1e15)]


class RowDeviation(Page):
    """One departure of a run from its page: the value at `path` before and after, and who changed it."""

    path: Text
    before: Text
    after: Text
    origin: Text


class Row(Page):
    """The whole truth of a run.

    digest: of the page as published; deviations: every departure of this run from it. data_fingerprint: of the files
    or arrays trained on. Scores are of the last evaluation, in percent of num_val_images; loss_nats is the recipe's
    loss against unsmoothed targets. scored: the weights that the scores belong to, the model's own or their average;
    other_top1_pct: of the ones not scored, where the run kept an average. bitwise: may a rerun on this machine be
    compared bit for bit? changes: what a resumed run found otherwise than the process before it (device, precision,
    threads, versions), each with its step, and where
    memory ran out; the row's own values are those of the last process. injected: faults on purpose (inject=) that touched its
    result or its speed; with the first it stays out of the store. weights_sha256: of the scored weights, see `weights_digest`.
    """

    run: Name
    recipe: Name
    version: Annotated[int, Field(ge=1, le=9999)]
    digest: Text
    model: Name
    data: Name
    data_fingerprint: Text
    split: Text
    seed: Count
    deviations: tuple[RowDeviation, ...]
    ablation: Text | None = None
    cell: Text | None = None
    status: Literal["finished", "diverged"]
    scored: Literal["model", "average"]
    top1_pct: Percent | None
    top5_pct: Percent | None
    loss_nats: float | None
    other_top1_pct: Percent | None
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
    peak_mem_mib: Amount
    precision: Text
    loader: Text
    num_workers: Count
    num_threads: Annotated[Count, Field(ge=1, le=4096)]
    world_size: Annotated[Count, Field(ge=1)]
    bitwise: bool
    changes: tuple[Text, ...] = ()
    injected: tuple[Text, ...] = ()
    activation_checkpointing: bool = False
    compiled: bool = False
    weights_sha256: Text | None
    device: Text
    versions: dict[Text, Text]
    commit: Text | None
    dirty: bool | None
    finished_utc: Time

    def as_json(self) -> bytes:
        """The row as its file holds it."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def rows_folder(results: Path) -> Path:
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
        raise RowError(f"{path}: the row of {row.run}; a file that is named after it would do")
    return row


def read_row_file(path: Path) -> Row:
    """The row in a file.

    Raises RowError for a damaged file, FolderError for a link that leads out of the file's folder.
    """
    inside(path.parent, path.name, "row")
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_ROW_KIB * 1024:
            raise ValueError(f"no file, or one of more than {LARGEST_ROW_KIB} KiB")
        return Row.model_validate_json(path.read_text(encoding="utf-8"))
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
