"""Images/s of the training loader, against timm's and torchvision's own, on the same JPEG files.

    python tests/benchmarks/bench_loader.py [--src <folder or tar of JPEGs>] [--px 224] [--rounds 8]
    [--workers 2] [--images 1920] [--dry]

Three stages: decoded; ready for the device (cropped, flipped, uint8); ready for the model
(augmented, normalized, mixed, all on the CPU) by the recipe A2. First whole loaders with so many
processes, by the wall's clock (see bench_whole_loaders). Then their parts, which take turns in one
process with one thread, by the processor time of that process, no image repeated. Where ffcv is
built (make setup ffcv=1), its loader too: our pipeline and its stock one, over the files' own bytes
and over pixels of at most 256 px; and both loaders over the file of `make data format=raw`.

Without --src: photos of 500 x 375 px cut from scikit-learn's two sample images.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from bench_ffcv import RAW, STORAGES, ffcv_parts, write_betons
from bench_whole_loaders import NUM_MICRO_BATCHES, whole_loaders
from PIL import Image
from timm.data import Mixup, create_transform
from torchvision.transforms import v2
from written import write

from trainer.base import provenance
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import for_training
from trainer.data.decode import read_image
from trainer.data.jpeg import decoder_name, read_for_training
from trainer.data.loader import TrainStream
from trainer.data.profile import find_profile
from trainer.runs.job import Job, plan_of
from trainer.tasks import task_of
from trainer.tools.bench import image_folder, in_turns, photo_files, ratios

NUM_CLASSES = 1000
TIMM_A2 = {"is_training": True, "auto_augment": "rand-m7-mstd0.5-inc1", "interpolation": "random"}
TIMM_MIX = {
    "mixup_alpha": 0.1,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.0,
    "num_classes": NUM_CLASSES,
}


def raw_photos(files: list[Path], folder: Path):
    """The same as `make data format=raw` stores them, for training."""
    root = image_folder(folder / "images", files, len(files), 2)
    profile = find_profile(str(root))
    write_betons(profile, root, folder / "raw", STORAGES[RAW])
    return for_training(open_data(profile, folder / "raw").train)


class Photos:
    """Files as a set of images."""

    num_channels, is_in_memory = 3, False

    def __init__(self, files: list[Path], reader):
        self.files, self.reader = files, reader
        self.num_images, self.labels = len(files), np.arange(len(files)) % NUM_CLASSES

    def read(self, i: int):
        return self.reader(self.files[i], 3)


def ours(plan, images, batch_images: int) -> TrainStream:
    """The suite's stream of one page, over these images."""
    recipe = plan.recipe
    return TrainStream(images, 0, recipe.augment, recipe.image.train_px, 1, batch_images, 1,
                       images.num_images // batch_images, True, "fail")  # fmt: skip


def candidates(files: list[Path], train_px: int, batch_images: int, folder: Path) -> dict:
    """By stage and name, calls that take the number of a round and give the images done. folder:
    for ffcv's files.
    """
    plan = plan_of(Job("A2", "resnet50", "imagenet-1k", None, 0, f"image.train_px={train_px}"))
    settings = make_settings("cpu", workers="0")
    streams = {
        "torch": ours(plan, Photos(files, read_for_training), batch_images),
        "pil": ours(plan, Photos(files, read_image), batch_images),
        f"torch ({RAW})": ours(plan, raw_photos(files, folder / "raw"), batch_images),
    }
    one = replace(plan, num_steps=10**6)
    of_timm = create_transform(train_px, **TIMM_A2)
    mixup = Mixup(**TIMM_MIX)
    crop = v2.Compose([v2.RandomResizedCrop(train_px, antialias=True), v2.RandomHorizontalFlip()])
    after = v2.Compose(
        [
            v2.RandAugment(2, 7),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    mix = v2.RandomChoice(
        [
            v2.MixUp(alpha=0.1, num_classes=NUM_CLASSES),
            v2.CutMix(alpha=1.0, num_classes=NUM_CLASSES),
        ]
    )

    def chosen(number: int) -> list[Path]:
        first = number % (len(files) // batch_images) * batch_images
        return files[first : first + batch_images]

    def labels() -> torch.Tensor:
        return torch.arange(batch_images) % NUM_CLASSES

    def tv(path: Path) -> torch.Tensor:
        return torchvision.io.decode_image(str(path), mode="RGB")

    stages = {
        "decoded": {
            "timm": lambda n: len([Image.open(path).convert("RGB") for path in chosen(n)]),
            "torchvision v2": lambda n: len([tv(path) for path in chosen(n)]),
            "ours, loader=pil": lambda n: len([read_image(path) for path in chosen(n)]),
        },
        "ready for the device": {
            "torchvision v2": lambda n: len(torch.stack([crop(tv(path)) for path in chosen(n)])),
        },
        "ready for the model": {
            "timm": lambda n: len(
                mixup(
                    torch.stack([of_timm(Image.open(path).convert("RGB")) for path in chosen(n)]),
                    labels(),
                )[0]
            ),
            "torchvision v2": lambda n: len(
                mix(torch.stack([after(crop(tv(path))) for path in chosen(n)]), labels())[0]
            ),
        },
    }
    for name, stream in streams.items():
        stages["ready for the device"][f"ours, loader={name}"] = lambda n, stream=stream: len(
            stream[n % stream.steps_per_epoch, 0].images
        )
        stages["ready for the model"][f"ours, loader={name}"] = lambda n, stream=stream: len(
            task_of(one, settings).prepare(stream[n % stream.steps_per_epoch, 0])[0]
        )
    for stage, calls in ffcv_parts(plan, settings, files, batch_images, folder).items():
        stages[stage] |= calls
    return stages


def measured(stages: dict, num_rounds: int, clock: Callable[[], float]) -> list[dict]:
    """One row for each call of each stage, with its ratio to timm's whole work."""
    rates = in_turns(
        {(stage, who): call for stage, calls in stages.items() for who, call in calls.items()},
        num_rounds,
        clock,
    )
    timm_whole = rates["ready for the model", "timm"]
    return [
        {
            "stage": stage,
            "who": who,
            "image_ms": round(rate.image_ms, 3),
            "x_timm": round(statistics.median(ratios(rate, timm_whole)), 3),
        }
        | rate.as_facts()
        for (stage, who), rate in rates.items()
    ]


def as_markdown(facts: dict) -> str:
    """The tables."""
    lines = ["# Training images a second", ""]
    lines += [f"{facts['device']}; {facts['num_files']} JPEG files ({facts['source']}), {facts['train_px']} px, recipe A2, "
              f"micro-batches of {facts['batch_images']}; {facts['decoder']}, timm {facts['timm']}, torch {facts['torch']}, torchvision "
              f"{facts['torchvision']}, pillow {facts['pillow']}. Medians of {facts['num_rounds']} rounds in turns, with quartiles; "
              "the last column is against all of timm's work for the model."]  # fmt: skip
    lines += ["", f"## Whole loaders with {facts['num_workers']} processes", ""]
    lines += [f"By the wall's clock, the start of the processes included; steps of {NUM_MICRO_BATCHES} micro-batches. timm: create_loader, then Mixup. "
              "The recipe repeats an image three times in a step; timm decodes each repeat, here it is decoded once.", ""]  # fmt: skip
    lines += _table(facts["whole"])
    lines += [
        "",
        "## One thread, no process beside it",
        "",
        "By processor time, no image repeated.",
        "",
    ]
    return "\n".join([*lines, *_table(facts["rows"]), ""])


def _table(rows: list[dict]) -> list[str]:
    lines = [
        "| stage | who | images/s | quartiles | ms an image | x timm |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['low_images_per_s']:.0f} to {row['high_images_per_s']:.0f}"
        lines.append(
            f"| {row['stage']} | {row['who']} | {row['images_per_s']:.0f} | {spread} |"
            f" {row['image_ms']:.2f} | {row['x_timm']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path, help="a folder or a tar of JPEG files")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes of a whole loader")
    parser.add_argument("--images", type=int, default=1920, help="of a whole loader's pass")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        files = photo_files(given.src, Path(folder) / "files")
        if not files:
            parser.error(f"--src {given.src}: holds no .jpg; use a folder or a tar of JPEG files")
        print(
            f"loaders on {len(files)} JPEG files: passes of {given.images} images, then single"
            f" parts, {given.rounds} times each in turns ...",
            flush=True,
        )
        whole = measured(
            whole_loaders(files, given.px, given.batch, given.workers, given.images, Path(folder)),
            given.rounds,
            time.perf_counter,
        )
        parts = candidates(files, given.px, min(given.batch, len(files)), Path(folder) / "ffcv")
        rows = measured(parts, given.rounds, time.process_time)
    versions = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": provenance.package_version("pillow"),
    }
    facts = {"benchmark": "loader", "device": provenance.device_name("cpu"), "source": given.src.stem if given.src else "cut from two sample photos", "num_files": len(files), "train_px": given.px,
             "batch_images": given.batch, "num_workers": given.workers, "num_rounds": given.rounds, "decoder": decoder_name(), **versions, "whole": whole, "rows": rows}  # fmt: skip
    table = as_markdown(facts)
    print(table)
    if not given.dry:
        write(f"loader-{given.px}", facts, table)


if __name__ == "__main__":
    main()
