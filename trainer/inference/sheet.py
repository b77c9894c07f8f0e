"""Pictures of a model's answers: the surest and the least sure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
from PIL import Image

from trainer.base.disk import write_atomically
from trainer.data.datasets.members import read_image
from trainer.inference.images import picture_of
from trainer.inference.predict import Answer

_COLUMNS, _ROWS = 6, 2  # of each half
_TILE_PX = 160


def write_sheet(path: Path, answers: Sequence[Answer]) -> None:
    """A PNG of the images that a model is surest of, and of those that it is least sure of, each
    with its class and probability.
    """
    known = sorted(
        (answer for answer in answers if answer.probabilities),
        key=lambda answer: -answer.probabilities[0],
    )
    number = min(_COLUMNS * _ROWS, (len(known) + 1) // 2)
    halves = [("surest", known[:number]), ("least sure", known[::-1][:number])]
    columns = min(_COLUMNS, number)
    rows = -(-number // columns)
    # at least as wide as the titles and the longest name
    size = max(3.2, columns * 1.6), 2 * rows * 1.95
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    for part, (title, shown) in zip(parts, halves, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontweight="bold")
        axes = part.subplots(rows, columns, squeeze=False).flat
        for place, axis in enumerate(axes):
            axis.set_axis_off()
            if place < len(shown):
                _draw(axis, shown[place])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())


def _draw(axis, answer: Answer) -> None:
    picture = picture_of(partial(read_image, Path(answer.path)))
    if picture is not None:
        axis.imshow(thumbnail(picture, _TILE_PX), interpolation="nearest")
    name = answer.classes[0]
    shown = name if len(name) <= 20 else f"{name[:19]}…"
    axis.set_title(f"{shown}\n{100 * answer.probabilities[0]:.1f} %", fontsize=8, parse_math=False)


def thumbnail(picture: Image.Image, side_px: int) -> Image.Image:
    """The middle square of a picture, resized."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    box = (left, top, left + side, top + side)
    return picture.resize((side_px, side_px), Image.Resampling.BICUBIC, box)
