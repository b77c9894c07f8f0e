"""What the command export does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from trainer.base.commands import installed_program
from trainer.base.errors import UserError
from trainer.base.settings import Settings, make_settings
from trainer.cli.inference_commands import Asked, num_classes_of
from trainer.data.decode import BadImage
from trainer.data.workers import Watch
from trainer.inference.classifier import Classifier
from trainer.inference.export.calibration import calibration_images, calibration_inputs, rights
from trainer.inference.export.card import model_card
from trainer.inference.export.compare import NUM_DRAWN, drawn_batches, ran_by
from trainer.inference.export.formats import Format, format_of
from trainer.inference.export.write import SCRIPT, add_to_record, check_folder
from trainer.inference.export.write import export as export_model
from trainer.inference.images import batches_of, find_images, find_labelled
from trainer.runs import summary

__all__ = ["Asked", "Photos", "export", "make_settings"]


@dataclass(frozen=True)
class Photos:
    """Photos to compare answers on, and to find int8's ranges on; none: a few drawn images.
    labelled: a folder of class folders, to count right answers on.
    """

    images: Path | None
    labelled: Path | None
    batch_images: int
    check: Callable[[], None]

    def paths(self) -> tuple[Path, ...]:
        """The images asked for, found at any depth; none where none were."""
        return find_images(self.images) if self.images else ()


def export(
    asked: Asked,
    to: str,
    out: Path | None,
    photos: Photos,
    int8: bool,
    settings: Settings,
    again: bool,
) -> bool:
    """Export a model, and say how its answers compare; are they the model's? Raises UserError."""
    form = format_of(to)
    form.check_installed(int8)
    if int8 and not photos.images:
        raise UserError("int8=1: no photos to find its ranges on", "use images=<photos>")
    classifier, folder = asked.at_one_size(with_maps=True)
    if classifier.gives_maps and photos.labelled:
        raise UserError(
            f"data={photos.labelled}: {classifier.name} names classes of pixels, not of images",
            "leave data= out",
        )
    name = f"{form.name}-int8" if int8 else form.name
    out = out or default_folder(classifier, folder) / name
    check_folder(out, form, again)
    console, paths = summary.console(), photos.paths()
    calibrated_on = calibration_images(paths) if int8 else ()
    calibration = calibration_inputs(classifier, calibrated_on, settings, photos.check)
    batches = partial(_pixels, paths, classifier, photos, settings)
    card = model_card(folder) if folder else None
    with summary.progress(console, "images", len(paths) or NUM_DRAWN) as each:
        agreement, of_int8 = export_model(
            classifier, form, out, batches, settings, calibration, card, each
        )
    shown = "" if paths else " (drawn; images=<photos> compares on photos)"
    console.print(f"compared  {agreement}{shown}", markup=False)
    if not agreement.is_good:
        line = f"{form.name} does not answer as the model does: nothing is written"
        console.print(line, style="bold red", markup=False)
        return False
    if of_int8:
        console.print(f"int8  on {len(calibration)} photos; {of_int8}", markup=False)
    if photos.labelled:
        _count_rights(classifier, form, out, photos, calibrated_on, settings)
    console.print(f"model  {out / form.file}", markup=False)
    if (out / SCRIPT).exists():
        python = installed_program("python") or "python"
        console.print(f"use  {python} {out / SCRIPT} <photo>", markup=False)
    return True


def _count_rights(
    classifier: Classifier,
    form: Format,
    out: Path,
    photos: Photos,
    calibrated_on: tuple[Path, ...],
    settings: Settings,
) -> None:
    """Right answers of the model and of its file, said and written. Raises UserError."""
    assert photos.labelled
    found = find_labelled(photos.labelled, classifier.classes, num_classes_of(classifier))
    of_file = ran_by(classifier, form.engine(out / form.file))
    before, after = (
        rights(one, found, calibrated_on, photos.batch_images, settings, photos.check)
        for one in (classifier, of_file)
    )
    line = f"right  model {before.right:,}, file {after.right:,} of {before.num_images:,} images"
    if 0 < before.others < before.num_images:
        line += (
            f"; of the {before.others:,} not calibrated on {before.right_others:,} and"
            f" {after.right_others:,}"
        )
    summary.console().print(line, markup=False)
    add_to_record(out, {"right": {"model": vars(before), "file": vars(after)}})


def default_folder(classifier: Classifier, folder: Path | None) -> Path:
    """Where the exported files of a model are, by format. folder: of its run."""
    return folder / "export" if folder else Path("export") / classifier.name


def _pixels(
    paths: tuple[Path, ...], classifier: Classifier, photos: Photos, settings: Settings
) -> Iterator[Tensor]:
    """Batches of the images that can be read; without paths the drawn ones. Raises BadImage where
    none can be read.
    """
    if not paths:
        yield from drawn_batches(classifier.image)
        return
    found, errors = 0, []
    for _, pixels, bad in batches_of(
        paths, classifier.image, photos.batch_images, settings.num_workers, Watch(photos.check)
    ):
        photos.check()  # loader processes that are waited for ask it too, but there may be none
        errors += bad
        found += len(pixels)
        if len(pixels):
            yield pixels
    if not found:
        raise BadImage(errors[0][1], "use images=<other photos>")
