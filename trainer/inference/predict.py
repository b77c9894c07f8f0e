"""A model's answers on images, into a file: resumable, whatever its format."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.base.disk import read_regular, why, write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_of
from trainer.base.settings import Settings
from trainer.data.workers import Watch
from trainer.inference.classifier import Classifier
from trainer.inference.images import batches_of

FORMATS = (".csv", ".json", ".parquet")
_LARGEST_BYTES = 2**34  # of a file of answers that is read whole


@dataclass(frozen=True)
class Answer:
    """Of one image: its best classes with their probabilities, best first; or what is wrong with
    the file.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def check_format(out: Path) -> None:
    """Raises UserError for a file name of another format, or parquet without its package."""
    if out.suffix not in FORMATS:
        *first, last = FORMATS
        ends = f"{', '.join(first)} or {last}"
        raise UserError(f"out={out}: unknown format", f"use a name that ends in {ends}")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  an extra
        except ImportError:
            raise UserError(
                f"out={out}: parquet needs pyarrow", "pip install pyarrow, or use out=<name>.csv"
            ) from None


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    settings: Settings,
    out: Path,
    top_k: int,
    batch_images: int,
    watch: Watch,
    each: Callable[[int], None] = lambda number: None,
) -> list[Answer]:
    """Ask about every image and write all answers to `out`, in the order of the paths.

    Answers are kept as they come in `<out>.part`, from where a later call goes on. each: called
    with the number of images after every batch, those of an earlier call first.

    Raises UserError for a part of another model or of other images, and what watch.check raises.
    """
    part = out.with_name(out.name + ".part")
    facts = {"facts": classifier.facts() | {"top_k": top_k, "precision": settings.precision}}
    answers = _answers_of(part, facts, paths)
    each(len(answers))
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _start(part, facts, answers)
        file = open(part, "a", encoding="utf-8")  # noqa: SIM115  closed below
    with file:
        left = paths[len(answers) :]
        for batch in _asked(classifier, left, settings, top_k, batch_images, watch):
            with _writing(out):
                file.writelines(_line(vars(answer)) for answer in batch)
                file.flush()
            answers += batch
            each(len(batch))
    with _writing(out):
        write_atomically(out, _content(out.suffix, answers, top_k))
        part.unlink()
    return answers


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({why(error)})", "use out=<another file>"
        ) from None


def _asked(
    classifier: Classifier,
    paths: Sequence[Path],
    settings: Settings,
    top_k: int,
    batch_images: int,
    watch: Watch,
) -> Iterator[list[Answer]]:
    """The answers of each batch of paths."""
    classifier = classifier.on(settings)
    batches = batches_of(paths, classifier.image, batch_images, settings.num_workers, watch)
    for number, (places, images, errors) in enumerate(batches):
        found = {place: Answer(str(paths[place]), error=error) for place, error in errors}
        if len(images):
            best = best_of(classifier.logits(images, settings), top_k)
            for place, probabilities, classes in zip(places.tolist(), *best, strict=True):
                names = tuple(classifier.class_name(one) for one in classes)
                found[place] = Answer(str(paths[place]), names, tuple(probabilities))
        first = number * batch_images
        yield [found[place] for place in range(first, min(first + batch_images, len(paths)))]


def best_of(logits: Tensor, top_k: int) -> tuple[list[list[float]], list[list[int]]]:
    """The largest softmax values [B, k] of logits [B, K] and their classes, largest first."""
    found = torch.softmax(logits.cpu().double(), 1).topk(min(top_k, logits.shape[1]), 1)
    return found.values.tolist(), found.indices.tolist()


def _answers_of(part: Path, facts: dict[str, Any], paths: Sequence[Path]) -> list[Answer]:
    """What an earlier call has found; empty where there was none."""
    try:
        lines = read_regular(part, _LARGEST_BYTES).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    held = []
    for line in itertools.takewhile(lambda line: line.endswith(b"\n"), lines):
        try:
            held.append(json_of(line))
        except ValueError:
            break
    given = json_of(json.dumps(facts))
    answers = [
        Answer(one["path"], tuple(one["classes"]), tuple(one["probabilities"]), one["error"])
        for one in held[1:]
    ]
    known = [str(path) for path in paths[: len(answers)]]
    if held and (held[0] != given or [answer.path for answer in answers] != known):
        raise UserError(
            f"{part}: the start of answers of another model, or on other images",
            "remove it, or use out=<another file>",
        )
    return answers


def _start(part: Path, facts: dict[str, Any], answers: Sequence[Answer]) -> None:
    lines = (_line(one) for one in (facts, *map(vars, answers)))
    write_atomically(part, "".join(lines).encode())


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _content(suffix: str, answers: Sequence[Answer], top_k: int) -> bytes:
    if suffix == ".json":
        return ("[\n" + ",\n".join(json.dumps(vars(one)) for one in answers) + "\n]\n").encode()
    number = max((len(answer.classes) for answer in answers), default=top_k)
    columns: dict[str, list] = {"path": [answer.path for answer in answers]}
    for place in range(number):
        columns[f"class_{place + 1}"] = [_at(answer.classes, place) for answer in answers]
        columns[f"probability_{place + 1}"] = [
            _at(answer.probabilities, place) for answer in answers
        ]
    columns["error"] = [answer.error for answer in answers]
    return _parquet(columns) if suffix == ".parquet" else _csv(columns)


def _at(values: Sequence, place: int):
    return values[place] if place < len(values) else None


def _csv(columns: dict[str, list]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{one:.6f}" if isinstance(one, float) else one for one in row)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _parquet(columns: dict[str, list]) -> bytes:
    import pyarrow  # an extra: see check_format
    import pyarrow.parquet

    kinds = {
        name: pyarrow.float64() if name.startswith("probability") else pyarrow.string()
        for name in columns
    }
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table(columns, schema=pyarrow.schema(kinds.items()))
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()
