"""`make parity`: what the torch loader reads from files against what ffcv reads from the .beton
written from them.

ffcv's own decoders resize by OpenCV's INTER_AREA, which is another filter than the antialiased
bicubic and bilinear of the recipes. Ours are Pillow's filters compiled, on the exact JPEG
transform: where the .beton holds every image pixel by pixel, the tolerance against loader=pil,
which decodes every JPEG file whole, is zero. Where it holds shrunk or newly compressed images, it
is LOSSY_LEVELS. Against the default torch loader, which decodes at a half or less where the crop
allows, its own SCALED_LEVELS come on top.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from trainer.base.commands import command
from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.base.settings import Settings, make_settings
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.jpeg import SCALED_LEVELS, decoder_name
from trainer.data.profile import data_folder
from trainer.data.transforms import normalize
from trainer.recipe.plan import Plan
from trainer.runs.job import Job, plan_of
from trainer.runs.run_folder import find_run_folder, open_model

# mean difference of a pixel, of 255; photos shrunk to 256 px gave 5.8 in squares of 224 px, 2.4 in
# 64
LOSSY_LEVELS = 8.0
LOSSY_EDGE_PX = 1.0  # of a box, in stored pixels: its sides are rounded to whole ones
LOSSY_TOP1_SHARE = 0.02  # of the images
RESIZE = (
    "antialiased bicubic and bilinear, Pillow's, in the torch loader and in ours of ffcv; ffcv's"
    " own decoders take OpenCV's INTER_AREA, another filter: the same boxes by it lie"
    " inter_area_levels away"
)
_MEAN_PX = 16  # side of the class means


def certify(job: Job, src: Path | None, num_images: int, run: str, runs: Path) -> dict:
    """Compare both on the training images of whole steps until num_images are seen, and on all
    validation images.

    Raises UserError where one of the two is not there.
    """
    plan, folder = plan_of(job), data_folder(job.data, job.data_dir)
    chosen_loader("ffcv", folder)
    theirs = open_data(plan.profile, folder, in_beton=True)
    source = src or data_folder(job.data) or job.data_dir
    ours = open_data(plan.profile, source)
    if ours.train.fingerprint != theirs.train.facts.source:
        raise UserError(
            f"{folder}: its .beton files were written from other images than {source or job.data};"
            f" run `{command('data')}` again"
        )
    # without workers neither augments: what is compared is cropped, resized and flipped
    settings = {
        name: make_settings("cpu", workers="0", loader=name) for name in ("pil", "torch", "ffcv")
    }
    is_lossless = theirs.train.facts.is_lossless and theirs.val.facts.is_lossless
    facts = {
        "data": plan.profile.name,
        "source": ours.fingerprint,
        "beton": theirs.fingerprint,
        "recipe": f"{plan.recipe.name}.v{plan.recipe.version}",
        "train_px": plan.recipe.image.train_px,
        "storage": {
            key: getattr(theirs.train.facts, key)
            for key in ("max_side_px", "jpeg_share", "quality", "is_lossless")
        },
        "resize": RESIZE,
        "torch_loader": (
            f"loader=pil for train_levels and val_levels; the default one, {decoder_name()}, for"
            " torch_levels"
        ),
        "versions": {
            name: importlib.metadata.version(name) for name in ("ffcv", "numba", "pillow", "torch")
        },
        "allowed": _allowed(is_lossless, ours.val.num_images),
    }
    found = _training(plan, ours, theirs, settings, num_images) | _validation(
        plan, ours, theirs, settings, run, runs
    )
    return facts | {"found": found, "is_within": _is_within(found, facts["allowed"])}


def _allowed(is_lossless: bool, num_val: int) -> dict:
    levels, edges = (0.0, 0.0) if is_lossless else (LOSSY_LEVELS, LOSSY_EDGE_PX)
    images = 0 if is_lossless else max(1, round(LOSSY_TOP1_SHARE * num_val))
    pixels = {"train_levels": levels, "torch_levels": levels + SCALED_LEVELS, "val_levels": levels}
    return {"order_differs": 0, "edge_px": edges, **pixels, "top1_images": images}


def _is_within(found: dict, allowed: dict) -> bool:
    return all(found[key] <= most for key, most in allowed.items())


def _training(
    plan: Plan, ours: OpenedData, theirs: OpenedData, settings: dict[str, Settings], num_images: int
) -> dict:
    """Order, boxes and pixels of the training micro-batches from step 0, and of the last step once
    more from there.
    """
    num_steps = min(plan.num_steps, -(-num_images // plan.recipe.batch.images))
    streams = [
        (theirs if name == "ffcv" else ours).train_stream(plan, settings[name], 0)
        for name in ("pil", "torch", "ffcv")
    ]
    differs, levels, default, area, edges, seen, last = 0, [], [], [], 0.0, 0, None
    for first, usual, second in zip(*streams, strict=False):
        if first.step >= num_steps:
            break
        differs += _labelled_otherwise(first, second) + _labelled_otherwise(usual, second)
        levels += _levels(first.images, second.images)
        default += _levels(usual.images, second.images)
        area += _levels(_by_inter_area(plan, theirs, second), second.images)
        edges = max(edges, _edge_px(plan, theirs, first.ids.numpy()))
        seen, last = seen + len(first.ids), second
    streams[-1].close()  # its thread works ahead
    with contextlib.closing(theirs.train_stream(plan, settings["ffcv"], last.step)) as resumed:
        again = next(batch for batch in resumed if batch.micro_batch == last.micro_batch)
    differs += _labelled_otherwise(last, again) + int(not torch.equal(last.images, again.images))
    return {
        "train_images": seen,
        "order_differs": differs,
        "edge_px": round(edges, 4),
        "train_levels": round(float(np.mean(levels)), 4),
        "train_levels_worst_image": round(float(np.max(levels)), 4),
        "torch_levels": round(float(np.mean(default)), 4),
        "torch_levels_worst_image": round(float(np.max(default)), 4),
        "inter_area_levels": round(float(np.mean(area)), 4),
    }


def _labelled_otherwise(first, second) -> int:
    """How many of two micro-batches' images have another place, draw or label."""
    if (first.step, first.micro_batch, first.ids.shape) != (
        second.step,
        second.micro_batch,
        second.ids.shape,
    ):
        return len(first.ids)
    return int(((first.ids != second.ids).any(1) | (first.labels != second.labels)).sum())


def _levels(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """The mean difference of each image's pixels, in levels of 255."""
    return [
        (one.float() - other.float()).abs().mean().item()
        for one, other in zip(first, second, strict=False)
    ]


def _boxes_in(*given):
    from trainer.data.ffcv.stream import boxes_in  # ffcv is optional

    return boxes_in(*given)


def _by_inter_area(plan: Plan, theirs: OpenedData, batch) -> torch.Tensor:
    """The images of a micro-batch as ffcv's own filter would make them, from the same boxes."""
    import cv2  # optional, as ffcv is

    ids, images = batch.ids.numpy(), np.empty(tuple(batch.images.shape), np.uint8)
    crop = next(part for part in plan.recipe.augment if part.crops)
    boxes, _ = _boxes_in(theirs.train, crop, plan.seed, ids, ids[:, 1])
    is_flipped = np.zeros(len(ids), bool)
    for part in plan.recipe.augment:
        is_flipped ^= part.draw(plan.seed, ids) if part.flips else False
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        part = np.asarray(theirs.train.read(int(ids[i, 1])))[
            top : top + height, left : left + width
        ]
        square = np.atleast_3d(
            cv2.resize(part, images.shape[2:], interpolation=cv2.INTER_AREA)
        ).transpose(2, 0, 1)
        images[i] = square[:, :, ::-1] if is_flipped[i] else square
    return torch.from_numpy(images)


def _edge_px(plan: Plan, theirs: OpenedData, ids: np.ndarray) -> float:
    """How far the edges of ffcv's boxes lie from the drawn ones, at most, in stored pixels."""
    crop = next(part for part in plan.recipe.augment if part.crops)
    images = theirs.train
    boxes, _ = _boxes_in(images, crop, plan.seed, ids, ids[:, 1])
    source, stored = (
        np.stack(sides, axis=1)
        for sides in (images.source_sides(ids[:, 1]), images.sides(ids[:, 1]))
    )
    drawn, _ = crop.draw(plan.seed, ids, *source.T)
    edges = [(part[:, :2] + far * part[:, 2:]) for part in (boxes, drawn) for far in (0, 1)]
    return float(
        max(
            np.abs(mine - drawn_edge * stored / source).max()
            for mine, drawn_edge in zip(edges[:2], edges[2:], strict=False)
        )
    )


def _validation(
    plan: Plan,
    ours: OpenedData,
    theirs: OpenedData,
    settings: dict[str, Settings],
    run: str,
    runs: Path,
) -> dict:
    """Pixels of the validation images, and how a fixed model takes both."""
    pairs = list(
        zip(
            ours.val_batches(plan, settings["pil"]),
            theirs.val_batches(plan, settings["ffcv"]),
            strict=True,
        )
    )
    levels = [level for (first, _), (second, _) in pairs for level in _levels(first, second)]
    labels = torch.cat([labels for (_, labels), _ in pairs])
    classify = (
        _exported(plan, find_run_folder(run, runs))
        if run
        else _nearest_mean([pair[0] for pair in pairs])
    )
    classes = [torch.cat([classify(pair[which][0]) for pair in pairs]) for which in (0, 1)]
    right = [int((of_one == labels).sum()) for of_one in classes]
    return {
        "val_images": len(labels),
        "val_levels": round(float(np.mean(levels)), 4),
        "model": run or f"nearest class mean at {_MEAN_PX} px",
        "top1_torch": right[0],
        "top1_ffcv": right[1],
        "top1_images": abs(right[0] - right[1]),
        "classified_otherwise": int((classes[0] != classes[1]).sum()),
    }


def _exported(plan: Plan, folder: Path):
    model = open_model(folder).eval()

    @torch.no_grad()
    def classify(images: torch.Tensor) -> torch.Tensor:
        return model(normalize(images, plan.profile)).argmax(1)

    return classify


def _nearest_mean(batches: list):
    """The class whose mean image is nearest, made of the torch loader's validation images
    themselves.
    """

    def small(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), _MEAN_PX).flatten(1)

    features = torch.cat([small(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    means = torch.stack(
        [features[labels == label].mean(0) for label in range(int(labels.max()) + 1)]
    )
    return lambda images: torch.cdist(small(images), means).argmin(1)


def parity_table(certificate: dict) -> Table:
    """What was found, and what is allowed."""
    table = Table(
        "what", "found", "allowed", title=f"{certificate['data']}: ffcv against the torch loader"
    )
    for key, value in certificate["found"].items():
        table.add_row(key, str(value), str(certificate["allowed"].get(key, "")))
    table.add_row("verdict", "within" if certificate["is_within"] else "NOT within", "")
    return table


def notes(certificate: dict) -> tuple[str, ...]:
    """What the table's words mean, and whose certificate it is."""
    return (
        f"levels, of 255: ffcv against {certificate['torch_loader']}",
        f"resize: {certificate['resize']}",
        (
            "rows trained by loader=ffcv on these files have data_fingerprint"
            f" {certificate['beton'][:12]}...: {command('verify')} run=<one> names this certificate"
        ),
    )


def certificates_of(fingerprint: str, loader: str, results: Path) -> Iterator[tuple[Path, bool]]:
    """The certificates in results/parity about the files of a row, and whether each is within what
    it allows.

    fingerprint, loader: the row's. By ffcv it is that of the .beton files, by any other of the
    files that these were written from.
    """
    for path in sorted((results / "parity").glob("*.json")):
        try:
            found = json_file(path, largest_mib=1)
        except (OSError, ValueError):
            continue
        if (
            isinstance(found, dict)
            and found.get("beton" if loader == "ffcv" else "source") == fingerprint
        ):
            yield path, found.get("is_within") is True


def write_certificate(certificate: dict, results: Path) -> Path:
    """Write it into results/parity under the data set's name and fingerprint; gives its path."""
    path = results / "parity" / f"{certificate['data']}-{certificate['beton'][:6]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(certificate, indent=1) + "\n").encode())
    return path
