"""A model's answers where they are pictures, as masks are: files beside one another in a folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.base.disk import why, write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.base.settings import Settings
from trainer.data.decode import BadImage, read_image
from trainer.runs.run_folder import open_model, plan_of_run
from trainer.tasks import task_of


def answers_with_pictures(folder: Path) -> bool:
    """Are the answers of a run's model pictures?"""
    return plan_of_run(folder).recipe.of_task.answers_with_pictures


def write_pictures(
    folder: Path,
    paths: Sequence[Path],
    root: Path,
    settings: Settings,
    out: Path,
    each: Callable[[int], None] = lambda number: None,
) -> list[str]:
    """Ask the model of a run about every image and write its pictures into a folder, where an image
    lies below `root`: one line for each image. What a program reads goes into answers.json and
    answers.csv there.

    Raises UserError for a disk that takes none; an image that cannot be read has that as its line.
    """
    plan, model = plan_of_run(folder), open_model(folder)
    task = task_of(plan, settings)
    model = model.to(settings.device)
    classes = json_file(folder / "config.json")["label_names"]
    lines, answers = [], []
    for path in paths:
        stem = out / (path.relative_to(root).with_suffix("") if root.is_dir() else path.stem)
        try:
            image = read_image(path, plan.profile.channels)
        except BadImage as error:
            lines.append(str(error))
            each(1)
            continue
        if not isinstance(image, Image.Image):
            raise UserError(
                f"{path}: {plan.profile.channels} channels: pictures are of three or one"
            )
        answer = task.predict(model, image, classes)
        assert answer is not None, "a task whose answers are pictures"
        for end, picture in answer.pictures.items():
            _write(stem.with_name(stem.name + end), _png(picture))
        lines.append(f"{path}: {answer.line}")
        answers += [{"path": str(path), **one} for one in answer.answers]
        each(1)
    if answers:
        _write(out / "answers.json", json_lines(answers))
        _write(out / "answers.csv", csv_of(answers))
    return lines


def json_lines(answers: Sequence[dict[str, Any]]) -> bytes:
    """A JSON list with one answer a line."""
    return ("[\n" + ",\n".join(map(json.dumps, answers)) + "\n]\n").encode()


def csv_of(answers: Sequence[dict[str, Any]]) -> bytes:
    """A table with a column for each key, of the first answer; a list has a column for each of its
    values.
    """
    flat = [
        {
            f"{key}_{place + 1}" if isinstance(value, list) else key: part
            for key, value in answer.items()
            for place, part in enumerate(value if isinstance(value, list) else [value])
        }
        for answer in answers
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({why(error)})", "use out=<another folder>"
        ) from None
