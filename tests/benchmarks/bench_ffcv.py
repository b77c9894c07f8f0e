"""ffcv's parts of bench_loader.py: our pipeline and its stock one, over .beton files of the same
images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import open_set
from trainer.data.ffcv.beton_writer import Storage, write_beton
from trainer.data.profile import find_profile
from trainer.tasks import task_of
from trainer.tools.bench import image_folder

RAW = "raw, 256 px"
STORAGES = {
    "bytes kept": Storage(),
    "256 px, pixels": Storage(256, 0.0),
    RAW: Storage(jpeg_share=0.0, side_px=256),  # what `make data format=raw` writes
}


def ffcv_parts(
    plan, settings, files: list[Path], batch_images: int, folder: Path
) -> dict[str, dict[str, Callable[[int], int]]]:
    """By stage and name, calls that read the whole set once by one thread and give its images; none
    without ffcv.

    A whole pass at a time: ffcv reads ahead, and would do so in the others' turns.
    """
    if not has_ffcv():
        return {}
    num_images = len(files) // batch_images * batch_images
    root = image_folder(folder / "images", files, num_images, 2)
    profile = find_profile(str(root))
    stages: dict[str, dict[str, Callable[[int], int]]] = {
        "ready for the device": {},
        "ready for the model": {},
    }
    for name, storage in STORAGES.items():
        write_betons(profile, root, folder / name, storage)
        stream, one = (
            _stream(plan, profile, folder / name, batch_images),
            replace(plan, num_steps=10**6),
        )
        stages["ready for the device"][f"ours, loader=ffcv ({name})"] = _pass_of(stream)
        stages["ready for the model"][f"ours, loader=ffcv ({name})"] = _pass_of(
            stream, lambda batch: task_of(one, settings).prepare(batch)[0]
        )
        stages["ready for the device"][f"ffcv's stock pipeline ({name})"] = _stock(
            folder / name / "train.beton", plan.recipe.image.train_px, batch_images
        )
    return stages


def has_ffcv() -> bool:
    """Is it built here?"""
    return importlib.util.find_spec("ffcv") is not None


def write_betons(profile, root: Path, folder: Path, storage: Storage) -> None:
    """Both splits of an image folder."""
    for split in ("train", "val"):
        write_beton(open_set(profile, root, split), folder, split, profile, storage)


def _stream(plan, profile, folder: Path, batch_images: int):
    from trainer.data.ffcv.stream import FfcvStream

    images, recipe = open_data(profile, folder, in_beton=True).train, plan.recipe
    return FfcvStream(
        images,
        0,
        recipe.augment,
        recipe.image.train_px,
        1,
        batch_images,
        1,
        images.num_images // batch_images,
        True,
        "fail",
    )


def _pass_of(stream, make: Callable = lambda batch: batch.images) -> Callable[[int], int]:
    def read(number: int) -> int:
        first = max(0, number) * stream.steps_per_epoch
        return sum(
            len(make(batch))
            for batch in stream.batches(first, first + stream.steps_per_epoch, 1, "cpu")
        )

    return read


def _stock(path: Path, train_px: int, batch_images: int) -> Callable[[int], int]:
    """Random crop and flip, as ffcv's own ImageNet script has them."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    image = [
        RandomResizedCropRGBImageDecoder((train_px, train_px)),
        RandomHorizontalFlip(),
        ToTensor(),
    ]
    loader = Loader(
        str(path), batch_size=batch_images, num_workers=1, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip

    def read(number: int) -> int:
        num_images = sum(len(images) for images, *_ in loader)
        torch.set_num_threads(1)  # which ffcv has changed
        return num_images

    return read
