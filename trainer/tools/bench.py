"""What each part of a run could do alone, and what the whole does: where the time goes, and what
would help. Parts are measured in turns, so that a machine that grows slower grows slower for all.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from trainer.base import provenance
from trainer.base.cores import num_cores
from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.datasets import shards
from trainer.data.loader import MicroBatch
from trainer.data.parts import Parts, has_parts, part_keys
from trainer.data.transforms import augmented, fill_of
from trainer.data.workers import whole
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.recipe.plan import Plan

WARM_UP_ROUNDS = 1
_FIRST_SHARE = 2 / 3  # of a turn's time, for the steps that are not counted, at most
# of the step on data that lies on the device: at least that much is no waiting for data
BOUND_SHARE = 0.95
_SPARE = 1.1  # workers' rate over the step's, so that a slow image holds nothing up
# that ffcv decodes at a time, at least: what starting its thread takes is lost in them
_PASS_IMAGES = 512
_SIZE = (500, 375)  # the commonest size of ImageNet's photos, in px
_QUALITY = 92
_ENDINGS = (".jpg", ".jpeg")

Clock = Callable[[], float]  # in seconds

# ---- turns


@dataclass(frozen=True)
class Rate:
    """Images per second of one part: the median over rounds, and the quartiles.

    seconds: of each round, for num_images images.
    """

    seconds: tuple[float, ...]
    num_images: int

    @property
    def images_per_s(self) -> float:
        """The median."""
        return self.num_images / statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The slower and the faster quartile, in images/s."""
        if len(self.seconds) == 1:
            return (self.images_per_s,) * 2
        fast_s, _, slow_s = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return self.num_images / slow_s, self.num_images / fast_s

    @property
    def image_ms(self) -> float:
        """Milliseconds an image, the median."""
        return 1e3 / self.images_per_s

    def as_facts(self) -> dict:
        """For a JSON file."""
        low, high = self.quartiles
        return {
            "images_per_s": round(self.images_per_s, 2),
            "low_images_per_s": round(low, 2),
            "high_images_per_s": round(high, 2),
            "num_rounds": len(self.seconds),
        }


def in_turns(
    parts: dict[str, Callable[[int], int]],
    num_rounds: int,
    clock: Clock = time.perf_counter,
    bound_s: float = math.inf,
) -> dict[str, Rate]:
    """The rate of every part. Each is called with the number of the round, and gives how many
    images it did.

    clock: time.process_time counts what this process itself works, which a busy machine blurs less.
    bound_s: after so many seconds no further round begins; one is there at least.
    """
    taken: dict[str, list[float]] = {name: [] for name in parts}
    num_images: dict[str, int] = {}
    began = clock()
    for number in range(-WARM_UP_ROUNDS, num_rounds):
        if number > 0 and clock() - began > bound_s:
            break
        for name, part in parts.items():
            before = clock()
            num_images[name] = part(number)
            if number >= 0:
                taken[name].append(clock() - before)
    return {name: Rate(tuple(taken[name]), num_images[name]) for name in parts}


def seconds_a_step(
    step: Callable[[], object],
    num_first: int,
    num_steps: int,
    bound_s: float,
    clock: Clock = time.perf_counter,
    begin: Callable[[], None] = lambda: None,
) -> float:
    """Seconds of one step: the mean of num_steps in a row, between which nothing waits for the
    device.

    num_first: done before them, each waited for, one at least. bound_s: where all would take longer
    there are fewer of both, one at least. begin: called where the counted ones begin.
    """
    began = clock()
    for _ in range(max(1, num_first)):
        before = clock()
        step()
        last_s = clock() - before
        if clock() - began > _FIRST_SHARE * bound_s:
            break
    left_s = bound_s - (clock() - began)
    num_counted = max(1, min(num_steps, int(left_s / last_s))) if last_s > 0 else num_steps
    begin()
    before = clock()
    for _ in range(num_counted):
        step()
    return (clock() - before) / num_counted


def ratios(one: Rate, other: Rate) -> list[float]:
    """How many times as fast as the other one is, in each round."""
    each = zip(one.seconds, other.seconds, strict=True)
    return [(b / other.num_images) / (a / one.num_images) for a, b in each]


# ---- parts and the whole


@dataclass(frozen=True)
class Bottleneck:
    """What holds the run up, in words, and the numbers behind it, in images/s.

    limit: of the step alone, on data that lies on the device. data: what the loader could deliver.
    """

    text: str
    limit: float
    data: float


def measure(
    plan: Plan, settings: Settings, data: OpenedData, num_rounds: int, num_steps: int
) -> dict[str, Rate]:
    """The rates of all parts, taking turns, then of so many whole steps in a row, which must not
    share the machine.
    """
    set_algorithms(settings)
    state = TrainingState(plan, settings)
    rates = in_turns(bench_parts(state, data), num_rounds, clock_of(settings))
    return rates | {"end to end": _end_to_end(state, data, num_steps)}


def bottleneck_of(
    rates: dict[str, Rate], settings: Settings, available_cores: int | None = None
) -> Bottleneck:
    """Who waits for whom."""
    limit, whole = rates["step"].images_per_s, rates["end to end"].images_per_s
    decode_ms = rates["decode"].image_ms
    augment_ms = rates["augment"].image_ms if settings.device == "cpu" else 0.0
    each = 1e3 / (decode_ms + augment_ms)
    delivered = max(1, settings.num_workers) * each
    share, of_limit = whole / limit, f"{whole:,.0f} of {limit:,.0f} images/s"
    if settings.num_workers == 0:
        text = (
            f"no workers: {of_limit} ({100 * share:.0f} %), the rest goes to decoding and"
            " augmenting in turn"
        )
    elif share >= BOUND_SHARE or delivered >= _SPARE * limit:
        shared = "neither data-bound nor compute-bound (workers and model share the cores?)"
        text = (
            f"{'compute-bound' if share >= BOUND_SHARE else shared}: {of_limit}"
            f" ({100 * share:.0f} %); workers={settings.num_workers} could deliver {delivered:,.0f}"
        )
    else:
        enough = math.ceil(_SPARE * limit / each)
        cores = num_cores() if available_cores is None else available_cores
        advice = f"it needs {enough} workers, and this machine has {cores} cores"
        text = (
            f"data-bound: {of_limit}; decoding"
            f" {100 * decode_ms / (decode_ms + augment_ms):.0f} % of a worker's time;"
            f" {f'try workers={enough}' if enough <= cores else advice}"
        )
    return Bottleneck(text, limit, delivered)


def clock_of(settings: Settings) -> Clock:
    """Wall-clock time, once the device is done."""

    def now() -> float:
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def bench_parts(state: TrainingState, data: OpenedData) -> dict[str, Callable[[int], int]]:
    """By name, calls that do one part for one micro-batch, or for one step, and give its images."""
    plan, settings, recipe = state.plan, state.settings, state.plan.recipe
    batch = first_batch(plan, settings, data)
    there = batch._replace(images=batch.images.to(settings.device))
    inputs, targets = state.task.prepare(batch)
    shown = list(itertools.islice(data.val_batches(plan, replace(settings, num_workers=0)), 1))

    def model(_: int) -> int:
        state.task.loss(state.model, inputs, targets).backward()
        return len(targets)

    def optimizer(_: int) -> int:
        recipe.optimizer.clip(state.model)
        state.optimizer.step()
        return recipe.batch.images

    transfer: dict[str, Callable[[int], int]] = {}
    if settings.device.startswith("cuda"):
        pixels = batch.images.pin_memory()
        transfer["transfer"] = lambda _: len(pixels.to(settings.device, non_blocking=True))
    return {
        "decode": _on_one_thread(_decoding(plan, settings, data)),
        "augment": _on_one_thread(lambda _: len(_augmented(there, plan).labels)),
        **transfer,
        "model": model,
        "optimizer": optimizer,
        "step": step_alone(state, there),
        "evaluation": lambda _: evaluate(plan, settings, state.model, shown).num_images,
    }


def _augmented(batch: MicroBatch, plan: Plan) -> MicroBatch:
    return augmented(batch, plan.recipe.augment, plan.recipe.augment_splits, fill_of(plan.profile))


def first_batch(plan: Plan, settings: Settings, data: OpenedData) -> MicroBatch:
    """The first micro-batch of a plan, decoded and not augmented, in this machine's memory."""
    return next(whole([data.stream(plan, replace(settings, num_workers=0, device="cpu"))[0, 0]]))


def step_alone(state: TrainingState, batch: MicroBatch) -> Callable[[int], int]:
    """A call that does one whole step on a micro-batch, over and over, and gives its images:
    nothing to wait for.
    """
    plan, settings, steps = state.plan, state.settings, itertools.count()
    device = settings.device
    ready = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
    if device == "cpu" and settings.num_workers:  # as its workers would hand it over
        ready = _augmented(ready, plan)

    def step(_: int) -> int:
        state.optimizer.zero_grad(set_to_none=True)
        number = next(steps) % plan.steps_per_epoch
        window = (
            ready._replace(step=number, micro_batch=place)
            for place in range(plan.micro_batches(number))
        )
        optimizer_step(state, window, number)
        return plan.window_images(number)

    return step


def _decoding(plan: Plan, settings: Settings, data: OpenedData) -> Callable[[int], int]:
    """A call that decodes a few images, in this process or in one thread of ffcv's, and gives their
    number.

    ffcv's thread reads ahead: it is started and ended within the call, or it would work in the
    other parts' turns.
    """
    here = replace(settings, num_workers=0, device="cpu")
    stream = data.stream(plan, here)
    if settings.loader != "ffcv":
        decoded = whole(stream[key] for key in stream.keys(0, 10**9))
        if has_parts(stream):
            parts = Parts(stream)
            decoded = whole(parts[key] for key in part_keys(stream, 0, 10**9))
        return lambda _: len(next(decoded).labels)
    num_steps = math.ceil(_PASS_IMAGES / plan.recipe.batch.images)
    return lambda _: sum(len(batch.labels) for batch in stream.batches(0, num_steps, 1, "cpu"))


def _on_one_thread(part: Callable[[int], int]) -> Callable[[int], int]:
    """The part as a worker does it: torch with one thread, and with as many as before after it."""

    def alone(number: int) -> int:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return part(number)
        finally:
            torch.set_num_threads(num_threads)

    return alone


def num_first_steps(plan: Plan, settings: Settings) -> int:
    """Steps until what the workers make ahead, two micro-batches each, is used up."""
    return 1 + math.ceil(2 * settings.num_workers / plan.num_micro_batches)


def run_facts(plan: Plan, rates: dict[str, Rate], found: Bottleneck) -> dict:
    """What was measured of a plan, for a JSON file."""
    recipe = plan.recipe
    return {
        "recipe": f"{recipe.name}.v{recipe.version}", "model": plan.model,
        "train_px": recipe.image.train_px, "batch_images": recipe.batch.images,
        "norm_images": recipe.batch.norm_images, "verdict": found.text,
        "limit_images_per_s": round(found.limit, 2), "loader_images_per_s": round(found.data, 2),
        "parts": {name: rate.as_facts() for name, rate in rates.items()},
    }  # fmt: skip


def machine_facts(settings: Settings, data: OpenedData) -> dict:
    """Where and with what it was measured, for a JSON file."""
    return {
        "device": provenance.device_name(settings.device), "precision": settings.precision,
        "num_workers": settings.num_workers, "num_threads": settings.num_threads,
        "loader": data.loader_name(settings), "versions": provenance.versions(),
    }  # fmt: skip


def _end_to_end(state: TrainingState, data: OpenedData, num_steps: int) -> Rate:
    """Whole steps, each timed, once what the workers had made ahead is used up."""
    plan, clock = state.plan, clock_of(state.settings)
    first = num_first_steps(plan, state.settings)
    window = data.train_stream(replace(plan, num_steps=10**9), state.settings, 0)
    seconds = []
    for step in range(first + num_steps):
        began = clock()
        optimizer_step(state, window, step)
        if step >= first:
            seconds.append(clock() - began)
    return Rate(tuple(seconds), plan.recipe.batch.images)


# ---- images


def photos(folder: Path, num_files: int) -> list[Path]:
    """So many JPEG files in a folder, no two alike."""
    sources = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05}.jpg" for number in range(num_files)]
    for path, source in zip(files, itertools.cycle(sources), strict=False):
        left = int(random.integers(0, source.width - _SIZE[0]))
        top = int(random.integers(0, source.height - _SIZE[1]))
        source.crop((left, top, left + _SIZE[0], top + _SIZE[1])).save(path, quality=_QUALITY)
    return files


def photo_files(src: Path | None, folder: Path, num_photos: int = 64) -> list[Path]:
    """The JPEG files of a folder, or of a tar, written out into `folder`; without either, photos
    made there.

    Raises DataError for a tar that is damaged.
    """
    if src is None:
        return photos(folder, num_photos)
    if not src.is_file():
        return sorted(path for path in src.rglob("*") if path.suffix.lower() in _ENDINGS)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for name, content in shards.contents(src):
        if name.lower().endswith(_ENDINGS):
            files.append(folder / f"{len(files):06}.jpg")  # a member's name opens no file
            files[-1].write_bytes(content)
    return files


def image_folder(
    root: Path, files: list[Path], num_train: int, num_val: int, num_classes: int = 2
) -> Path:
    """An image folder whose files are links to these, over and over, and their classes too."""
    for split, num_images in (("train", num_train), ("val", num_val)):
        for number in range(num_images):
            link = root / split / f"{number % num_classes:04}" / f"{number:06}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[number % len(files)].resolve())
    return root
