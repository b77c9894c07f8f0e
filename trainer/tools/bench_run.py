"""What each part of a run could do alone, and what the whole does: where the time goes, and what
would help.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from trainer.base import provenance
from trainer.base.cores import num_cores
from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.loader import MicroBatch
from trainer.data.parts import Parts, has_parts, part_keys
from trainer.data.transforms import augmented, fill_of
from trainer.data.workers import whole
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.engine.train import fast_algorithms, optimizer_step
from trainer.recipe.plan import Plan
from trainer.tools.bench import Rate, in_turns

BOUND_SHARE = (
    0.95  # of the step on data that lies on the device: at least that much is no waiting for data
)
_SPARE = 1.1  # workers' rate over the step's, so that a slow image holds nothing up
_PASS_IMAGES = (
    512  # that ffcv decodes at a time, at least: what starting its thread takes is lost in them
)


@dataclass(frozen=True)
class Bottleneck:
    """What holds the run up, in words, and the numbers behind it.

    kind: "compute-bound", "data-bound", "shared" (neither), or "serial" (no workers).
    limit: of the step alone, on data that lies on the device, in images/s. data: what the loader
    could deliver. num_workers: that would keep up.
    """

    kind: str
    text: str
    limit: float
    data: float
    num_workers: int


def measure(
    plan: Plan, settings: Settings, data: OpenedData, num_rounds: int, num_steps: int
) -> dict[str, Rate]:
    """The rates of all parts, taking turns, then of so many whole steps in a row, which must not
    share the machine.
    """
    fast_algorithms(settings.device)
    state = TrainingState(plan, settings)
    rates = in_turns(bench_parts(state, data), num_rounds, clock_of(settings))
    return rates | {"end to end": _end_to_end(state, data, num_steps)}


def bottleneck_of(
    rates: dict[str, Rate], settings: Settings, available_cores: int | None = None
) -> Bottleneck:
    """Who waits for whom."""
    limit, whole = rates["step"].images_per_s, rates["end to end"].images_per_s
    decode_ms, augment_ms = (
        rates["decode"].image_ms,
        rates["augment"].image_ms if settings.device == "cpu" else 0.0,
    )
    each = 1e3 / (decode_ms + augment_ms)
    delivered = max(1, settings.num_workers) * each
    enough = math.ceil(_SPARE * limit / each)
    share = whole / limit
    if settings.num_workers == 0:
        return Bottleneck("serial", _serial_text(whole, limit, share), limit, delivered, enough)
    if share >= BOUND_SHARE or delivered >= _SPARE * limit:
        kind = "compute-bound" if share >= BOUND_SHARE else "shared"
        named = (
            kind
            if kind == "compute-bound"
            else "neither data-bound nor compute-bound (workers and model share the cores?)"
        )
        text = (
            f"{named}: {whole:,.0f} of {limit:,.0f} images/s ({100 * share:.0f} %);"
            f" workers={settings.num_workers} could deliver {delivered:,.0f}"
        )
        return Bottleneck(kind, text, limit, delivered, enough)
    text = (
        f"data-bound: {whole:,.0f} of {limit:,.0f} images/s; decoding"
        f" {100 * decode_ms / (decode_ms + augment_ms):.0f} % of a worker's time; "
    )
    cores = num_cores() if available_cores is None else available_cores
    text += (
        f"try workers={enough}"
        if enough <= cores
        else f"it needs {enough} workers, and this machine has {cores} cores"
    )
    return Bottleneck("data-bound", text, limit, delivered, enough)


def _serial_text(whole: float, limit: float, share: float) -> str:
    return (
        f"no workers: {whole:,.0f} of {limit:,.0f} images/s ({100 * share:.0f} %), the rest goes to"
        " decoding and augmenting in turn"
    )


def clock_of(settings: Settings) -> Callable[[], float]:
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
    pixels = batch.images.pin_memory() if settings.device.startswith("cuda") else batch.images
    shown = list(itertools.islice(data.val_batches(plan, replace(settings, num_workers=0)), 1))

    def model(_: int) -> int:
        state.task.loss(state.model, inputs, targets).backward()
        return len(targets)

    def optimizer(_: int) -> int:
        recipe.optimizer.clip(state.model)
        state.optimizer.step()
        return recipe.batch.images

    parts = {
        "decode": _on_one_thread(_decoding(plan, settings, data)),
        "augment": _on_one_thread(
            lambda _: len(
                augmented(
                    there, recipe.augment, recipe.augment_splits, fill_of(plan.profile)
                ).labels
            )
        ),
        "transfer": lambda _: len(pixels.to(settings.device, non_blocking=True)),
        "model": model,
        "optimizer": optimizer,
        "step": step_alone(state, there),
        "evaluation": lambda _: evaluate(plan, settings, state.model, shown).num_images,
    }
    return (
        parts
        if settings.device.startswith("cuda")
        else {name: part for name, part in parts.items() if name != "transfer"}
    )


def first_batch(plan: Plan, settings: Settings, data: OpenedData) -> MicroBatch:
    """The first micro-batch of a plan, decoded and not augmented, in this machine's memory."""
    return next(whole([data.stream(plan, replace(settings, num_workers=0, device="cpu"))[0, 0]]))


def step_alone(state: TrainingState, batch: MicroBatch) -> Callable[[int], int]:
    """A call that does one whole step on a micro-batch, over and over, and gives its images:
    nothing to wait for.
    """
    plan, steps = state.plan, itertools.count()
    device = state.settings.device
    there = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
    fed = _repeated(state, _ready(there, plan, state.settings))

    def step(_: int) -> int:
        state.optimizer.zero_grad(set_to_none=True)
        number = next(steps) % plan.steps_per_epoch
        optimizer_step(state, fed(number), number)
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
        makes, keys = (
            (Parts(stream), part_keys(stream, 0, 10**9))
            if has_parts(stream)
            else (stream, stream.keys(0, 10**9))
        )
        decoded = whole(makes[key] for key in keys)
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


def _ready(batch, plan: Plan, settings: Settings):
    """The micro-batch as workers would hand it over: on the CPU they augment."""
    if settings.device != "cpu" or settings.num_workers == 0:
        return batch
    return augmented(batch, plan.recipe.augment, plan.recipe.augment_splits, fill_of(plan.profile))


def _repeated(state: TrainingState, batch) -> Callable[[int], Iterator]:
    """For each step, its micro-batches: the same images each time."""
    return lambda step: (
        batch._replace(step=step, micro_batch=place)
        for place in range(state.plan.micro_batches(step))
    )


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
    num_all = first + num_steps
    window = data.train_stream(
        replace(plan, num_steps=max(num_all, plan.num_steps)), state.settings, 0
    )
    seconds = []
    for step in range(num_all):
        began = clock()
        optimizer_step(state, window, step)
        if step >= first:
            seconds.append(clock() - began)
    return Rate(tuple(seconds), plan.recipe.batch.images)
