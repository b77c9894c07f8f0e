"""What the commands check-data, data and parity do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from trainer.base.commands import command
from trainer.base.cores import num_cores
from trainer.base.disk import why, write_atomically
from trainer.base.errors import UserError, did_you_mean
from trainer.base.settings import worker_count
from trainer.data.check import DataReport
from trainer.data.check import check_data as check_images
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.builtin import open_set
from trainer.data.datasets.packed import holds_files
from trainer.data.ffcv.beton_writer import Storage, write_beton
from trainer.data.own_profile import NoImages, as_yaml, check_new, own_profile
from trainer.data.profile import data_folder, find_profile
from trainer.inference.data_page import write_data_page
from trainer.recipe.overrides import as_set
from trainer.recipe.profiles import PROFILES, Profile
from trainer.runs import summary
from trainer.runs.job import Job
from trainer.runs.loader_equivalence import certify, notes, parity_table, write_certificate

__all__ = ["Job", "check_data", "parity", "storage_of", "write_data"]

FORMATS = ("beton", "raw")
RAW_SIDE_PX = 256  # what most resized copies of ImageNet have
_UNEVEN = 1.5  # times the images of the smallest class in the largest
# what a recipe may do about it; `mean_over: images` leaves the loss its size
_FOR_UNEVEN: tuple[dict[str, Any], ...] = (
    {"sampling": {"name": "square_root"}},
    {"sampling": {"name": "balanced"}},
    {"loss.class_weighting": {"name": "inverse_square_root", "mean_over": "images"}},
    {"loss.class_weighting": {"name": "inverse", "mean_over": "images"}},
    {
        "loss.class_weighting": {
            "name": "effective_number",
            "beta": 0.999,
            "mean_over": "images",
        }
    },
)


def check_data(
    data: str,
    data_dir: Path | None,
    workers: str,
    profile: Path | None = None,
    page: Path | None = None,
) -> bool:
    """Decode every image and print a report of each split, with a data profile of files; would
    training meet no bad image? profile: the file to write it to. page: the folder of a page.
    """
    num_threads = max(1, worker_count(workers, auto=num_cores()))
    known, folder = find_profile(data, data_dir), data_folder(data, data_dir)
    if profile is not None:
        check_new(profile)
        if folder is None:
            raise UserError(f"profile={profile}: {data} has one", "use data=<a folder of images>")
    opened, out = open_data(known, folder), summary.console()
    reports = {
        split: check_images(images, num_threads)
        for split, images in (("train", opened.train), ("val", opened.val))
    }
    is_sound = summary.data_reports(out, opened, reports)
    measured = None
    if profile is not None or (folder is not None and data not in PROFILES):
        try:
            measured = _of_task(own_profile(known.name, **reports), known.task)
        except NoImages:
            if profile is not None:
                raise
        else:
            _show_profile(out, measured, data, folder, profile, is_sound)
    if known.task is None:
        _show_uneven(out, list(reports["train"].class_counts.values()))
    if page is not None and known.task is not None:
        raise UserError(f"page={page}: shows classes of whole images", "leave page= out")
    if page is not None:
        _write_page(out, page, opened, reports, measured or known)
    return is_sound


def _of_task(measured: Profile, task: str | None) -> Profile:
    """The profile for a task; the adaptation and the majority are about classes of whole images."""
    changes = {"task": task, "adapt": None, "majority_pct": None}
    return measured if task is None else measured.model_copy(update=changes)


def _write_page(
    out: Console,
    page: Path,
    opened: OpenedData,
    reports: Mapping[str, DataReport],
    profile: Profile,
) -> None:
    """Write the page of a data set and say where. Raises UserError where it cannot be written."""
    facts = [
        ("images", f"{profile.num_train:,} train, {profile.num_val:,} {opened.split}"),
        ("classes", f"{profile.num_classes:,}"),
        ("mean, deviation", f"{list(profile.mean)}, {list(profile.std)}"),
    ]
    if (pixels := reports["train"].pixels) is not None and len(pixels.sizes):
        width, height = np.median(pixels.sizes[pixels.sizes.any(axis=1)], axis=0).tolist()
        facts.append(("median size", f"{width:.0f} x {height:.0f} px"))
    if profile.adapt is not None:
        adapted = profile.adapt.model_dump(exclude_none=True)
        facts.append(("adaptation", ", ".join(f"{key} {one}" for key, one in adapted.items())))
    try:
        path = write_data_page(page, opened.train, reports, f"{profile.name}: data", facts)
    except OSError as error:
        raise UserError(
            f"{page}: cannot be written ({why(error)})", "use page=<elsewhere>"
        ) from None
    out.print(f"page  {path}", markup=False)


def _show_profile(
    out: Console, made: Profile, data: str, folder: Path | None, path: Path | None, is_sound: bool
) -> None:
    """Print a data profile that was measured and how it is used; write it to a path, if all images
    are sound: its numbers would be others once the bad ones are mended.
    """
    to = path or Path(f"{made.name}.yaml")
    where = command("check-data", data=data, data_dir=None if str(folder) == data else folder)
    where += f" profile={to} writes it"
    if path is not None and is_sound:
        write_atomically(path, as_yaml(made).encode())
        where = f"written to {path}"
    elif path is not None:
        where = f"not written to {path}: mend the images that are listed, then the same command"
    recipe = "A3" if made.task is None else f"<one for {made.task}>"
    use = command("plan", recipe=recipe, model="resnet18", data=to, data_dir=folder)
    out.print(Text(f"data profile of these images ({where}), to be edited; then {use}"))
    out.print(Text(as_yaml(made).rstrip()))
    if made.adapt:
        asks = command("lr-find", recipe="A3", model="resnet18", data=to, data_dir=folder)
        batch = f"for this batch of {made.adapt.batch_images} images"
        out.print(
            Text(f"a recipe without a rule has no learning rate {batch}; {asks} measures one")
        )


def _show_uneven(out: Console, counts: list[int]) -> None:
    """How small classes may be shown more often, or count for more (in ce, bce and focal); nothing
    where classes are even.
    """
    if max(counts) < _UNEVEN * min(counts):
        return
    line = f"uneven classes, {min(counts):,} to {max(counts):,} images; a recipe may take one of"
    out.print(Text(line))
    for items in _FOR_UNEVEN:
        out.print(Text(f"  {as_set(items)}"), soft_wrap=True)


def storage_of(
    format_: str, side: int | None, max_side: int, jpeg_share: float | None, quality: int
) -> Storage:
    """How `data` stores images, from its options. Raises UserError."""
    if format_ not in FORMATS:
        raise UserError(
            f"format={format_}: unknown{did_you_mean(format_, FORMATS)}; "
            f"valid: {', '.join(FORMATS)}"
        )
    if format_ == "beton":
        if side is not None:
            raise UserError(f"side={side}: needs format=raw; use max_side= for longer sides")
        return Storage(max_side, jpeg_share, quality)
    given = [f"max_side={max_side}"] * bool(max_side)
    given += [f"jpeg_share={jpeg_share:g}"] if jpeg_share is not None else []
    if given:
        raise UserError(f"{given[0]}: not with format=raw, which stores pixels; use side= alone")
    return Storage(jpeg_share=0.0, side_px=RAW_SIDE_PX if side is None else side)


def write_data(
    data: str, src: Path | None, out: Path | None, format_: str, storage: Storage, workers: str
) -> None:
    """Write the .beton files of both splits.

    out: None for the image folder. The rest as the command's options say.

    Raises UserError where there is no folder to write into.
    """
    folder = data_folder(data, src)
    out = out or folder
    if out is None:
        raise UserError(f"data={data}: no folder to write into; use out=<folder>")
    if format_ == "raw" and holds_files(out):
        raise UserError(
            f"{out}: holds images, which loader=torch would read instead; "
            "use out=<a folder of its own>"
        )
    num_threads = max(1, worker_count(workers, auto=num_cores()))
    profile, console = find_profile(data, src), summary.console()
    if profile.task is not None:
        raise UserError(
            f"data={data}: images for {profile.task}, of whose targets a .beton has no place",
            "train from the folder itself",
        )
    for split in ("train", "val"):
        images = open_set(profile, folder, split)
        with summary.progress(console, split, images.num_images) as advance:
            facts = write_beton(images, out, split, profile, storage, num_threads, advance)
        kind = (
            "lossless: JPEG files byte for byte, other images pixel by pixel"
            if facts.is_lossless
            else "not lossless: its pixels differ from the source's, and so do results"
        )
        size = f"{facts.num_images} images, {facts.num_bytes / 2**20:.0f} MiB"
        console.print(f"{out / split}.beton: {size}, {kind}", markup=False)
    loader = "" if format_ == "raw" else " loader=ffcv"
    console.print(f"train from it: data={data} data_dir={out}{loader}", markup=False)


def parity(
    job: Job, src: Path | None, num_images: int, run: str, runs: Path, results: Path
) -> bool:
    """Compare the two loaders, print a table and store a certificate; are they within tolerance?"""
    out = summary.console()
    size = f"at least {num_images} training images and all of val"
    out.print(f"{job.data}: reading {size} with both loaders ...", markup=False)
    found = certify(job, src, num_images, run, runs)
    out.print(parity_table(found))
    for line in notes(found):
        out.print(line, markup=False)
    out.print(f"certificate: {write_certificate(found, results)}", markup=False)
    return found["is_within"]
