"""The folder of an exported model: written whole and checked, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.base.disk import why, write_atomically
from trainer.base.errors import UserError
from trainer.base.provenance import package_version, versions
from trainer.base.settings import Settings
from trainer.inference.classifier import Classifier
from trainer.inference.export.card import CARD
from trainer.inference.export.compare import Agreement, as_exported, compare, ran_by
from trainer.inference.export.formats import Format, quantize_model, write_model
from trainer.inference.export.use_text import preprocessing, use_script

FACTS, SCRIPT, RECORD = "preprocessing.json", "use.py", "export.json"


def check_folder(out: Path, form: Format, again: bool) -> None:
    """Raises UserError where an exported model is there already."""
    taken = next((name for name in (form.file, FACTS, SCRIPT) if (out / name).exists()), None)
    if taken and not again:
        raise UserError(f"{out / taken}: is there already", "use again=1, or out=<another folder>")


def export(
    classifier: Classifier,
    form: Format,
    out: Path,
    batches: Callable[[], Iterable[Tensor]],
    settings: Settings,
    calibration: Sequence[np.ndarray] = (),
    card: str | None = None,
    each: Callable[[int], None] = lambda number: None,
) -> tuple[Agreement, Agreement | None]:
    """Write the model, its preprocessing and a script that uses them, if it answers on batches of
    images [B, C, px, px] uint8 as the classifier does. calibration: of Format.quantize; with it an
    int8 model is written. card: the text of README.md.

    Gives the agreement of the float model, and of the int8 one.

    Raises UserError.
    """
    with folder_for(out) as made:
        whole = made / ("float" if calibration else ".") / form.file
        whole.parent.mkdir(exist_ok=True)
        write_model(form, as_exported(classifier), example_of(classifier), whole)
        exported = ran_by(classifier, form.engine(whole))
        agreement, of_int8 = compare(classifier, exported, batches(), settings, each), None
        if not agreement.is_good:
            return agreement, None
        if calibration:
            quantize_model(form, whole, made / form.file, calibration)
            shutil.rmtree(whole.parent)
            exported = ran_by(classifier, form.engine(made / form.file))
            of_int8 = compare(classifier, exported, batches(), settings)
        record: dict[str, Any] = {"agreement": vars(agreement)}
        if of_int8:
            record |= {"int8": vars(of_int8), "calibration_images": len(calibration)}
        finish(classifier, form, made, out, record, card)
    return agreement, of_int8


def example_of(classifier: Classifier) -> Tensor:
    """Two images of a model's input, black."""
    image = classifier.image
    return torch.zeros(2, image.channels, image.test_px, image.test_px)


def finish(
    classifier: Classifier,
    form: Format,
    made: Path,
    out: Path,
    record: dict[str, Any],
    card: str | None,
) -> None:
    """Write what stands beside the model, then move all of it to where it belongs."""
    facts = preprocessing(classifier, form, form.file)
    (made / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    script = use_script(classifier, form)
    if script is not None:
        (made / SCRIPT).write_text(script, "utf-8")
    if card is not None:
        (made / CARD).write_text(card, "utf-8")
    packages = {name: package_version(name) for name in form.packages}
    record = record | {"versions": versions() | packages}
    (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        os.replace(path, out / path.name)


def add_to_record(out: Path, facts: dict[str, Any]) -> None:
    """Add what was found afterwards to the folder's record. Raises OSError."""
    record = json.loads((out / RECORD).read_text()) | facts
    write_atomically(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())


@contextlib.contextmanager
def folder_for(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, removed at the end. Raises UserError for what the disk says."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
            yield Path(made)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({why(error)})", "use out=<another folder>"
        ) from None
