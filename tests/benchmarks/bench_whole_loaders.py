"""Whole loaders of bench_loader.py: processes and all, by the clock on the wall, the main process
putting batches together.

timm's is create_loader with its prefetcher, then its Mixup, as its train.py joins them. Ours is
what a run uses, with the page's repeats, which it decodes once for a step, and without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench_ffcv import RAW, STORAGES, has_ffcv, write_betons
from timm.data import Mixup

from trainer.base.settings import Settings, make_settings
from trainer.data.dataset import OpenedData, open_data
from trainer.recipe.plan import Plan
from trainer.runs.job import Job, plan_of
from trainer.tasks import task_of
from trainer.tools.bench import image_folder
from trainer.tools.bench_timm import timm_loader

NUM_MICRO_BATCHES = 4  # of a step of the page A2
DEVICE, MODEL = "ready for the device", "ready for the model"


def whole_loaders(
    files: list[Path],
    train_px: int,
    batch_images: int,
    num_workers: int,
    num_images: int,
    folder: Path,
) -> dict[str, dict[str, Callable[[int], int]]]:
    """By stage and name, calls that make one pass over so many images, in whole steps; ffcv's where
    it is built.
    """
    num_images -= num_images % (NUM_MICRO_BATCHES * batch_images)
    root = image_folder(folder / "whole", files, num_images, 2)
    plan, settings = (
        _plan(root, train_px, batch_images),
        make_settings("cpu", workers=str(num_workers)),
    )
    once, data = (
        replace(plan, recipe=plan.recipe.model_copy(update={"repeats": None})),
        open_data(plan.profile, root),
    )
    stages = {DEVICE: {}, MODEL: {"timm": lambda _: sum(_timms(plan, settings, root))}}
    for stage in stages:
        stages[stage]["ours, loader=torch"] = _ours(plan, settings, data, stage)
        stages[stage]["ours, loader=torch, without repeats"] = _ours(once, settings, data, stage)
    for name in STORAGES if has_ffcv() else (RAW,):
        write_betons(plan.profile, root, folder / f"whole {name}", STORAGES[name])
        packed = open_data(plan.profile, folder / f"whole {name}", in_beton=True)
        readers = ["torch"] * (name == RAW) + ["ffcv"] * has_ffcv()
        for stage, loader in itertools.product(stages, readers):
            by = replace(settings, loader=loader)
            stages[stage][f"ours, loader={loader} ({name})"] = _ours(plan, by, packed, stage)
    return stages


def _plan(root: Path, train_px: int, batch_images: int) -> Plan:
    words = (
        f"image.train_px={train_px} batch.images={NUM_MICRO_BATCHES * batch_images}"
        f" batch.norm_images={batch_images} epochs=10000 "
    )
    return plan_of(
        Job(
            "A2",
            "resnet50",
            str(root),
            None,
            0,
            words + "lr.peak=1e-3 lr.warmup_epochs=null lr.warmup_from=null",
        )
    )


def _timms(plan: Plan, settings: Settings, root: Path) -> Iterator[int]:
    mix = plan.recipe.mix
    mixup = Mixup(
        mix.mixup_alpha,
        mix.cutmix_alpha,
        switch_prob=mix.cutmix_share,
        num_classes=plan.profile.num_classes,
    )
    for images, labels in timm_loader(
        plan, settings, root, has_prefetcher=True, num_images=plan.profile.num_train
    ):
        yield len(mixup(images, labels)[0])


def _ours(plan: Plan, settings: Settings, data: OpenedData, stage: str) -> Callable[[int], int]:
    stream = data.stream(plan, settings)
    stream = replace(stream, fill=None) if stage == DEVICE else stream

    def read(number: int) -> int:
        first = max(0, number) * plan.steps_per_epoch
        batches = stream.batches(first, first + plan.steps_per_epoch, settings.num_workers, "cpu")
        return sum(
            len(batch.images if stage == DEVICE else task_of(plan, settings).prepare(batch)[0])
            for batch in batches
        )

    return read
