"""What the commands predict and eval do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from trainer.base.disk import why
from trainer.base.errors import UserError
from trainer.base.settings import Settings, make_settings, sizes_of
from trainer.data.evaluation import EvaluationStream
from trainer.data.transforms import fill_of
from trainer.data.workers import Watch, items_of, whole
from trainer.engine.state import algorithms_kept, set_algorithms
from trainer.inference.classifier import Classifier, of_run, of_weights, shown_otherwise
from trainer.inference.images import (
    Pictures,
    SetPictures,
    find_images,
    find_labelled,
    labelled_batches,
)
from trainer.inference.knn import score_nearest
from trainer.inference.pictures import answers_with_pictures, write_pictures
from trainer.inference.predict import check_format
from trainer.inference.predict import predict as run_prediction
from trainer.inference.quality import judge
from trainer.inference.quality_page import scores_line, write_quality
from trainer.inference.real_labels import read_real, real_top1
from trainer.inference.sheet import write_sheet
from trainer.models.trained import num_logits
from trainer.runs import summary
from trainer.runs.rescore import data_of_run
from trainer.runs.results import read_row_file
from trainer.runs.run_folder import find_run_folder

__all__ = ["Asked", "evaluate", "make_settings", "nearest", "predict", "predict_pictures"]

_MOST_LINES = 20  # about single images


@dataclass(frozen=True)
class Asked:
    """Which model is meant, and how it is to be shown images; empty or None: as it was trained."""

    run: str
    model: str
    weights: str
    runs: Path
    test_px: str
    crop: float | None
    interpolation: str

    def folder_of_pictures(self) -> Path | None:
        """The folder of the run, if its answers are pictures. Raises UserError."""
        if not self.run or self.model or self.weights:
            return None
        folder = find_run_folder(self.run, self.runs)
        if not answers_with_pictures(folder):
            return None
        if self.test_px or self.crop or self.interpolation:
            raise UserError(f"run={self.run}: is asked as it was evaluated", "leave test_px= out")
        return folder

    def at_one_size(self, with_maps: bool = False) -> tuple[Classifier, Path | None]:
        """The model and its run's folder, where it is of one. with_maps: see of_run. Raises
        UserError.
        """
        if len(sizes_of(self.test_px)) > 1:
            raise UserError(f"test_px={self.test_px}: more than one size", "use one")
        return self.at_sizes(with_maps)[0]

    def at_sizes(self, with_maps: bool = False) -> list[tuple[Classifier, Path | None]]:
        """The model at every size of test_px ("224 256"), each with its run's folder, where it is
        of one. Raises UserError.
        """
        if bool(self.run) == bool(self.model or self.weights):
            raise UserError("which model?", "use run=<a run>, or model=<of timm> weights=<a file>")
        if not self.run and not (self.model and self.weights):
            missing = "weights" if self.model else "model"
            raise UserError(f"{missing}=: not given", "use model=<of timm> weights=<a file>")
        sizes = sizes_of(self.test_px) or (None,)
        folder = find_run_folder(self.run, self.runs) if self.run else None
        classifier = of_run(folder, with_maps) if folder else of_weights(self.model, self.weights)
        changes = {"crop_share": self.crop, "interpolation": self.interpolation or None}
        return [(shown_otherwise(classifier, changes | {"test_px": px}), folder) for px in sizes]


def predict(
    models: list[tuple[Classifier, Path | None]],
    images: Path,
    out: Path,
    top_k: int,
    batch_images: int,
    settings: Settings,
    with_sheet: bool,
    again: bool,
    check: Callable[[], None],
) -> None:
    """Ask about every image at each size, write the answers and say where they are: of several
    sizes, a file for each, `<out>-224px.csv`. Raises UserError.
    """
    check_format(out)
    places = [out.with_name(f"{out.stem}-{one.image.test_px}px{out.suffix}") for one, _ in models]
    places = places if len(models) > 1 else [out]
    sheets = [place.with_name(f"{place.stem}.sheet.png") for place in places]
    # the sizes that a stopped command has done, as the start of another one's answers shows
    is_begun = [place.with_name(f"{place.name}.part").exists() for place in places]
    num_done = is_begun.index(True) if any(is_begun) and not again else 0
    for path in (*places[num_done:], *(sheets[num_done:] if with_sheet else ())):
        if path.exists() and not again:
            raise UserError(f"{path}: is there already", "use again=1, or out=<another file>")
    paths = [path for path in find_images(images) if path not in sheets]
    asked = list(zip(models, places, sheets, strict=True))
    for (classifier, _), place, sheet in asked[num_done:]:
        _predict(
            classifier, paths, place, sheet if with_sheet else None, top_k, batch_images,
            settings, check,
        )  # fmt: skip


def _predict(
    classifier: Classifier,
    paths: list[Path],
    out: Path,
    sheet: Path | None,
    top_k: int,
    batch_images: int,
    settings: Settings,
    check: Callable[[], None],
) -> None:
    """The answers of a model at one size. sheet: the file of a picture, None for none."""
    console = summary.console()
    watch = Watch(check, partial(console.print, markup=False))
    with summary.progress(console, "images", len(paths)) as each, algorithms_kept():
        set_algorithms(settings)
        answers = run_prediction(classifier, paths, settings, out, top_k, batch_images, watch, each)
    num_bad = sum(answer.error is not None for answer in answers)
    console.print(f"answers  {out}: {len(answers):,} images", markup=False)
    if num_bad:
        line = f"{num_bad} of them cannot be read: the column error says why"
        console.print(line, style="yellow", markup=False)
    if sheet is not None and num_bad < len(answers):
        try:
            write_sheet(sheet, answers)
        except OSError as error:
            raise UserError(f"{sheet}: cannot be written ({why(error)})", "use sheet=0") from None
        console.print(f"picture  {sheet}", markup=False)


def predict_pictures(
    folder: Path,
    images: Path,
    out: Path,
    settings: Settings,
    again: bool,
    check: Callable[[], None],
) -> None:
    """Write a run's pictures of every image into a folder and say where. Raises UserError."""
    out, console = out.with_suffix(""), summary.console()
    if out.exists() and not again:
        raise UserError(f"{out}: is there already", "use again=1, or out=<another folder>")
    paths = find_images(images)
    with summary.progress(console, "images", len(paths)) as bar, algorithms_kept():
        set_algorithms(settings)

        def each(number: int) -> None:
            check()
            bar(number)

        lines = write_pictures(folder, paths, images, settings, out, each)
    for line in lines[:_MOST_LINES]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"pictures  {out}: of {len(lines):,} images", markup=False)


def evaluate(
    models: list[tuple[Classifier, Path | None]],
    data: str,
    data_dir: Path | None,
    page: Path | None,
    real: Path | None,
    among_present: bool,
    with_mirrored: bool,
    batch_images: int,
    settings: Settings,
    again: bool,
    check: Callable[[], None],
) -> None:
    """Score a model at each size, by ReaL's labels too where they are given, and write the page of
    the last one. Raises UserError.
    """
    if page is not None and (page / "index.html").exists() and not again:
        raise UserError(f"{page}: holds a page already", "use again=1, or page=<another folder>")
    out, real_labels = summary.console(), read_real(real) if real else None
    for classifier, folder in models:
        batches, pictures, labels = _labelled(
            classifier, folder, data, data_dir, batch_images, settings, Watch(check)
        )
        among = sorted(set(labels)) if among_present else None
        image = classifier.image
        mirrored = ", mirrored too" if with_mirrored or classifier.test_flip else ""
        if classifier.test_translate_px:
            mirrored += f", moved by {classifier.test_translate_px} px too"
        shown = (
            f"{classifier.name} at {image.test_px} px (crop {image.crop_share:g},"
            f" {image.interpolation}{mirrored})"
        )
        with summary.progress(out, "images", len(labels)) as each, algorithms_kept():
            set_algorithms(settings)
            judged = judge(classifier, batches, settings, with_mirrored, among, each)
        out.print(f"{shown}  {scores_line(judged)}", markup=False)
        if real_labels is not None:
            names = [pictures.name(place) for place in range(len(labels))]
            right, number = real_top1(judged, names, real_labels)
            share = 100 * right / max(1, number)
            out.print(f"ReaL  top-1 {share:.2f} % of {number:,} images with labels", markup=False)
    if page is None:
        return
    facts = [
        ("model", shown),
        ("weights", classifier.weights_sha256),
        ("images", Path(data).name if data else "the run's validation images"),
    ]
    if among is not None:
        facts.append(("answers", f"only the {len(among)} classes that have images"))
    try:
        path = write_quality(page, judged, pictures, f"{classifier.name}: evaluation", facts)
    except OSError as error:
        raise UserError(
            f"{page}: cannot be written ({why(error)})", "use page=<elsewhere>"
        ) from None
    out.print(f"page  {path}", markup=False)


def nearest(
    run: str,
    k: int,
    data_dir: Path | None,
    runs: Path,
    settings: Settings,
    check: Callable[[], None],
) -> None:
    """Score a run's features by their k nearest training images, and print it. Raises UserError."""
    folder, out = find_run_folder(run, runs), summary.console()
    watch = Watch(check, partial(out.print, markup=False))
    with algorithms_kept():
        set_algorithms(settings)
        found = score_nearest(folder, k, settings, data_dir, watch)
    top5 = (
        f"  top-5 {100 * found.num_top5 / found.num_images:.2f} %" if found.num_classes > 5 else ""
    )
    out.print(
        f"{folder.name}  {k} nearest of {found.num_train:,} training images  top-1"
        f" {100 * found.num_top1 / found.num_images:.2f} %{top5}  of {found.num_images:,} images",
        markup=False,
        soft_wrap=True,
    )


def _labelled(
    classifier: Classifier,
    folder: Path | None,
    data: str,
    data_dir: Path | None,
    batch_images: int,
    settings: Settings,
    watch: Watch,
) -> tuple[Iterable[tuple[Tensor, Tensor]], Pictures, list[int]]:
    """(batches of images and labels, the same as pictures, all labels). Raises UserError."""
    if data:
        found = find_labelled(Path(data), classifier.classes, num_classes_of(classifier))
        batches = labelled_batches(
            found, classifier.image, batch_images, settings.num_workers, watch
        )
        return batches, found, found.labels.tolist()
    if folder is None:
        raise UserError("data=: not given", "use data=<a folder of class folders>")
    opened = data_of_run(folder, read_row_file(folder / "row.json"), data_dir)
    image = classifier.image
    stream = EvaluationStream(
        opened.val, image.test_px, image.crop_share, image.interpolation, batch_images,
        image.crop_mode, fill_of(image),
    )  # fmt: skip
    batches = whole(
        items_of(stream, range(len(stream)), settings.num_workers, settings.device, watch)
    )
    return batches, SetPictures(opened.val), opened.val.labels.tolist()


def num_classes_of(classifier: Classifier) -> int:
    """How many logits a model has."""
    return len(classifier.classes) or num_logits(classifier.model)
