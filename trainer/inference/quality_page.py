"""A folder that shows how good a model is: a page, its tables as CSV, its pictures as PNG."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from trainer.base.disk import write_atomically
from trainer.base.stats import wilson_pct
from trainer.base.terminal import readable
from trainer.inference.images import Pictures
from trainer.inference.quality import Judged
from trainer.inference.sheet import thumbnail

_MOST_CLASSES, _MOST_PAIRS, _MOST_IMAGES = 30, 15, 24
_NAMED_CLASSES = 30  # more have no room beside the matrix
_TILE_PX = 160


def write_quality(
    folder: Path, judged: Judged, images: Pictures, title: str, facts: Sequence[tuple]
) -> Path:
    """Write index.html, per_class.csv, confusion.csv, confusion.png and calibration.png; gives the
    page's path. facts: (name, value) pairs for its head. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [readable(name) for name in judged.classes]
    by_class = sorted(judged.by_class(), key=lambda one: (one[1] / one[2], one[0]))
    counts, shown = judged.confusion()
    pictures = {"confusion": _confusion(counts, shown, names), "calibration": _calibration(judged)}
    _write_csv(
        folder / "per_class.csv",
        ("class", "number", "right", "images", "accuracy_pct"),
        ((names[c], c, right, n, f"{100 * right / n:.4f}") for c, right, n in judged.by_class()),
    )
    _write_csv(
        folder / "confusion.csv",
        ("class", *(names[one] for one in shown)),
        ((names[one], *row) for one, row in zip(shown, counts.tolist(), strict=True)),
    )
    for name, content in pictures.items():
        write_atomically(folder / f"{name}.png", content)
    page = template("quality.html").render(
        title=title,
        facts=facts,
        scores=scores_line(judged),
        classes=[(names[one], right, number) for one, right, number in by_class],
        most=_MOST_CLASSES,
        pairs=[(names[a], names[b], n) for a, b, n in judged.confused_pairs(_MOST_PAIRS)],
        worst=[_tile(judged, images, names, place) for place in judged.worst(_MOST_IMAGES)],
        **{name: inline(content) for name, content in pictures.items()},
    )
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def scores_line(judged: Judged) -> str:
    """The scores in a line; Wilson's interval says what so few images tell of others like them."""
    number, classes = judged.num_images, len(judged.classes)
    low, high = wilson_pct(judged.num_top1, number)
    line = (
        f"top-1 {100 * judged.num_top1 / number:.2f} % ({judged.num_top1:,} of {number:,}, 95 %"
        f" interval {low:.1f} to {high:.1f} %)"
    )
    if classes > 5:
        line += f"  top-5 {100 * judged.num_top5 / number:.2f} % ({judged.num_top5:,})"
    per_class = np.mean([right / n for _, right, n in judged.by_class()])
    return (
        f"{line}  mean over classes {100 * per_class:.2f} %  calibration error"
        f" {100 * judged.calibration_error():.2f} %"
    )


def template(name: str) -> Template:
    """A page of the assets, that refuses what it is not given and escapes what it is."""
    assets = FileSystemLoader(Path(__file__).parent / "assets")
    environment = Environment(loader=assets, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(name)


def _tile(judged: Judged, images: Pictures, names: Sequence[str], place: int) -> tuple:
    picture, content = images.picture(place), io.BytesIO()
    if picture is not None:
        thumbnail(picture, _TILE_PX).save(content, "JPEG", quality=85)
    tile = inline(content.getvalue(), "jpeg") if picture is not None else ""
    right, taken = (names[numbers[place]] for numbers in (judged.labels, judged.predicted))
    return tile, right, taken, float(judged.sureness[place]), readable(images.name(place))


def inline(content: bytes, kind: str = "png") -> str:
    """A picture as the address that it has within a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _confusion(counts: np.ndarray, shown: np.ndarray, names: Sequence[str]) -> bytes:
    """Rows: the class; columns: what it was taken for; each row's shares."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    is_named = len(shown) <= _NAMED_CLASSES
    figure = matplotlib.figure.Figure(figsize=(6, 5.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="share of the class's images", fraction=0.046)
    axis.set_xlabel("taken for")
    axis.set_ylabel("class")
    if is_named:
        labels = [names[one] if len(names[one]) <= 14 else f"{names[one][:13]}…" for one in shown]
        axis.set_xticks(range(len(shown)), labels, rotation=90, parse_math=False)
        axis.set_yticks(range(len(shown)), labels, parse_math=False)
    return _png(figure)


def _calibration(judged: Judged) -> bytes:
    bins = judged.calibration()
    figure = matplotlib.figure.Figure(figsize=(5, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 100), (0, 100), color="gray", linestyle=":", label="as sure as right")
    sure, right = ([100 * one[place] for one in bins] for place in (0, 1))
    upper.plot(sure, right, marker="o", color="tab:blue", label="this model")
    upper.set_ylabel("right, %")
    upper.legend(loc="lower right")
    lower.hist(100 * judged.sureness, bins=15, range=(0, 100), color="tab:blue")
    lower.set_ylabel("images")
    lower.set_xlabel("probability of the answer, %")
    return _png(figure)


def _png(figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _write_csv(path: Path, header: Sequence, rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
