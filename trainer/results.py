"""The store: one JSON file per finished or diverged run, written once; merging two stores is copying files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from trainer.checkpoint import write_atomically
from trainer.errors import UserError
from trainer.ingredients.base import Page


class RowError(UserError):
    """A row that is asked for is not there, or its file is damaged."""


class RowDeviation(Page):
    """One departure of a run from its page: the value at `path` before and after, and who changed it."""

    path: str
    before: str
    after: str
    origin: str


class Row(Page):
    """The whole truth of a run.

    digest: of the page as published; deviations: every departure of this run from it. data_fingerprint: of the files
    or arrays trained on. Scores are of the last evaluation, in percent of num_val_images; loss_nats is the recipe's
    loss against unsmoothed targets. scored: the weights that the scores belong to, the model's own or their average;
    other_top1_pct: of the ones not scored, where the run kept an average. bitwise: may a rerun on this machine be
    compared bit for bit? changes: what a resumed run found otherwise than the process before it (device, precision,
    threads, versions), each with its step; the row's own values are those of the last process. weights_sha256: of the scored weights, see `weights_digest`.
    """

    run: str
    recipe: str
    version: int
    digest: str
    model: str
    data: str
    data_fingerprint: str
    split: str
    seed: int
    deviations: tuple[RowDeviation, ...]
    ablation: str | None = None
    cell: str | None = None
    status: Literal["finished", "diverged"]
    scored: Literal["model", "average"]
    top1_pct: float | None
    top5_pct: float | None
    loss_nats: float | None
    other_top1_pct: float | None
    num_val_images: int
    num_replaced_images: int
    epochs: int
    steps: int
    batch_images: int
    norm_images: int
    num_params: int
    gmacs: float
    images_per_s: float
    train_s: float
    peak_mem_mib: float
    precision: str
    loader: str
    num_workers: int
    num_threads: int
    world_size: int
    bitwise: bool
    changes: tuple[str, ...] = ()
    weights_sha256: str | None
    device: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    finished_utc: str

    def as_json(self) -> bytes:
        """The row as its file holds it."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def row_path(results: Path, run: str) -> Path:
    return results / "rows" / f"{run}.json"


def store_row(results: Path, row: Row) -> Path:
    """Write a row under its run's name, atomically."""
    path = row_path(results, row.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, row.as_json())
    return path


def read_row(results: Path, run: str) -> Row | None:
    """The row of a run, or None where it has none yet.

    Raises RowError for a damaged file.
    """
    path = row_path(results, run)
    return read_row_file(path) if path.exists() else None


def read_row_file(path: Path) -> Row:
    """The row in a file.

    Raises RowError for a damaged file.
    """
    try:
        return Row.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise RowError(f"{path}: not a row of this suite ({first}); move it away and run again") from None
