"""What a run does on a GPU, beside a loop of timm's parts in the same minutes: within a given time,
however slow the machine. How near it comes to what a step costs at least, and to its targets.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.loader import MicroBatch
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.models.build import gmacs
from trainer.recipe.plan import Plan
from trainer.tools.bench import (
    BOUND_SHARE,
    Clock,
    Rate,
    bench_parts,
    bottleneck_of,
    clock_of,
    first_batch,
    in_turns,
    num_first_steps,
    ratios,
    run_facts,
    seconds_a_step,
    step_alone,
)
from trainer.tools.bench_timm import TimmLoop, reason_against

RUNS = (("A2", "resnet50"), ("convnext", "convnext_tiny"))  # recipe and model
MAX_BENCH_S = 420.0  # of the whole command, which is to take less than eight minutes
TIMM_RATIO = 1.3  # images/s, times those of a loop of timm's parts
OPTIMIZER_MS = 2.0  # of one step of the optimizer, clipping included
_ALONE_SHARE = 0.25  # of a recipe's time, for its parts and the optimizers
_LEAST_TURNS = 3  # of each loop, where the time allows
_TIMED = 3  # things in a round: two loops, and the step alone
_STEPS = 8  # counted in a turn
_OPTIMIZER_STEPS, _OPTIMIZER_ROUNDS = 10, 30  # steps in a row, which the device is waited for once
_PASSES = 3  # a backward pass counts as two forward ones: gradients of activations and of weights


@dataclass(frozen=True)
class Turn:
    """Seconds of a step in one turn, and the most memory that tensors held meanwhile, in MiB; None
    where it is not counted.
    """

    seconds: float
    peak_mib: float | None = None


Loop = Callable[[float], dict[str, Turn]]  # of the seconds it may take for each thing it times


@dataclass(frozen=True)
class Baseline:
    """What must be done whatever does it.

    gmacs: billions of multiply-adds of one image's forward pass. image_bytes: of an image as it
    goes to the device. weight_bytes, gradient_bytes, state_bytes: of the model, and of what its
    optimizer keeps.
    """

    gmacs: float
    image_bytes: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def train_gflop(self) -> float:
        """Billions of operations of one image, forward and backward: two for each multiply-add."""
        return 2 * _PASSES * self.gmacs

    @property
    def optimizer_bytes(self) -> int:
        """Of one step: gradients are read, weights and state read and written."""
        return self.gradient_bytes + 2 * (self.weight_bytes + self.state_bytes)


@dataclass(frozen=True)
class Target:
    """Something to reach. wanted, found: in words. is_reached: None where it was not measured."""

    what: str
    wanted: str
    found: str
    is_reached: bool | None

    @property
    def verdict(self) -> str:
        """In one word, or two."""
        return {True: "reached", False: "missed", None: "not measured"}[self.is_reached]

    def as_facts(self) -> dict[str, str]:
        """For a JSON file."""
        return {
            "what": self.what, "wanted": self.wanted, "found": self.found, "verdict": self.verdict
        }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """All that was measured of one plan.

    rates: of the parts, "step", "end to end" and, where there is such a loop, "timm's parts".
    optimizer: of the optimizers alone, "ours" and "timm's"; their images are steps. peak_mib: of
    the two loops; None where memory is not counted. against: why there is no loop of timm's parts,
    or "".
    """

    optimizer_name: str
    rates: dict[str, Rate]
    optimizer: dict[str, Rate]
    peak_mib: dict[str, float | None]
    baseline: Baseline
    against: str


def bench_run(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path | None,
    num_rounds: int,
    seconds: float,
) -> tuple[dict[str, Any], Measured]:
    """A plan's facts for a JSON file, and what they were made of; in about so many seconds.

    folder: of the images, for timm's loader. num_rounds: of the parts and of the loops, at most.
    """
    set_algorithms(settings)
    clock = clock_of(settings)
    began = clock()
    against = reason_against(plan, folder)
    folder = None if against else folder
    rates, optimizer, baseline = _alone(
        plan, settings, data, folder, num_rounds, _ALONE_SHARE * seconds, clock
    )
    loops: list[Loop] = [
        partial(_ours, plan, settings, data, first_batch(plan, settings, data), clock)
    ]
    if folder is not None:
        loops.append(partial(_timms, plan, settings, folder, clock))
    turns = in_rounds(loops, num_rounds, seconds - (clock() - began), clock)
    for name, each in turns.items():
        rates[name] = Rate(tuple(turn.seconds for turn in each), plan.recipe.batch.images)
    peaks = {
        name: max((one.peak_mib for one in each if one.peak_mib is not None), default=None)
        for name, each in turns.items()
        if name != "step"
    }
    found = Measured(plan.recipe.optimizer.name, rates, optimizer, peaks, baseline, against)
    facts = run_facts(plan, rates, bottleneck_of(rates, settings)) | comparison_facts(found)
    facts["baseline"] = baseline_facts(found)
    facts["targets"] = [target.as_facts() for target in targets_of(found)]
    return facts | {"took_s": round(clock() - began, 1)}, found


def in_rounds(
    loops: list[Loop], num_rounds: int, seconds: float, clock: Clock
) -> dict[str, list[Turn]]:
    """By name, the turns of loops that take turns, the last one first in every second round.

    No round begins that would, by the longest one so far, end after `seconds`; one is there at
    least.
    """
    began, longest_s = clock(), 0.0
    found: dict[str, list[Turn]] = {}
    for number in range(num_rounds):
        before = clock()
        if number and before - began + longest_s > seconds:
            break
        for loop in loops if number % 2 == 0 else reversed(loops):
            for name, turn in loop(seconds / (_LEAST_TURNS * _TIMED)).items():
                found.setdefault(name, []).append(turn)
        longest_s = max(longest_s, clock() - before)
    return found


def _ours(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    batch: MicroBatch,
    clock: Clock,
    bound_s: float,
) -> dict[str, Turn]:
    """A run's steps end to end, then with its workers gone the same step on data that lies on the
    device.
    """
    memory = Memory(settings.device)
    state = TrainingState(plan, settings)
    whole_s = _whole_step_s(state, data, clock, bound_s, memory)
    peak_mib = memory.peak_mib()
    step = step_alone(state, batch)
    alone_s = seconds_a_step(lambda: step(0), 1, _STEPS, bound_s, clock)
    return {"step": Turn(alone_s), "end to end": Turn(whole_s, peak_mib)}


def _whole_step_s(
    state: TrainingState, data: OpenedData, clock: Clock, bound_s: float, memory: Memory
) -> float:
    plan, numbers = state.plan, itertools.count()
    stream = data.train_stream(replace(plan, num_steps=10**9), state.settings, 0)
    num_first = num_first_steps(plan, state.settings)

    def step() -> None:
        optimizer_step(state, stream, next(numbers))

    return seconds_a_step(step, num_first, _STEPS, bound_s, clock, memory.restart)


def _timms(
    plan: Plan, settings: Settings, folder: Path, clock: Clock, bound_s: float
) -> dict[str, Turn]:
    memory = Memory(settings.device)
    loop, num_first = TimmLoop(plan, settings, folder), num_first_steps(plan, settings)
    seconds = seconds_a_step(loop.step, num_first, _STEPS, bound_s, clock, memory.restart)
    return {"timm's parts": Turn(seconds, memory.peak_mib())}


def _alone(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path | None,
    num_rounds: int,
    seconds: float,
    clock: Clock,
) -> tuple[dict[str, Rate], dict[str, Rate], Baseline]:
    """The parts, but for the step that takes its turns with the loops; the optimizers; and the
    baseline.
    """
    began = clock()
    state = TrainingState(plan, settings)
    parts = bench_parts(state, data)
    del parts["step"]
    rates = in_turns(parts, num_rounds, clock, seconds - (clock() - began))
    loop = None if folder is None else TimmLoop(plan, settings, folder)
    optimizers = optimizer_rates(state, loop, clock, seconds - (clock() - began))
    return rates, optimizers, step_baseline(state)


def optimizer_rates(
    state: TrainingState, loop: TimmLoop | None, clock: Clock, bound_s: float
) -> dict[str, Rate]:
    """Steps of our optimizer and of timm's, clipping included, over gradients that mostly are not
    clipped.
    """
    clip = partial(state.plan.recipe.optimizer.clip, state.model)
    parts = {"ours": _optimizer_steps(state.model, clip, state.optimizer)}
    if loop is not None:
        parts["timm's"] = _optimizer_steps(loop.model, loop.clip, loop.optimizer)
    return in_turns(parts, _OPTIMIZER_ROUNDS, clock, bound_s)


def _optimizer_steps(
    model: nn.Module, clip: Callable[[], object], optimizer: torch.optim.Optimizer
) -> Callable[[int], int]:
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-5  # 25 million of them have a norm of 0.05

    def steps(_: int) -> int:
        for _ in range(_OPTIMIZER_STEPS):
            clip()
            optimizer.step()
        return _OPTIMIZER_STEPS

    return steps


class Memory:
    """The most memory that tensors hold on a GPU beyond what was there before; on the CPU nothing
    is counted.
    """

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        gc.collect()
        if self._device:
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(self._device)

    def restart(self) -> None:
        """Forget what was held until now: trying algorithms takes more than the steps that use
        them.
        """
        if self._device:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_mib(self) -> float | None:
        """Since `restart`."""
        if self._device is None:
            return None
        return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20


# ---- the baseline


def step_baseline(state: TrainingState) -> Baseline:
    """Of a plan's model and its optimizer, once that has done a step."""
    px, channels = state.plan.recipe.image.train_px, state.plan.profile.channels
    weights = list(state.model.parameters())
    kept = [value for each in state.optimizer.state.values() for value in each.values()]
    return Baseline(
        gmacs(state.model, channels, px),
        channels * px * px,
        _bytes(weights),
        _bytes(weight.grad for weight in weights),
        _bytes(kept),
    )


def _bytes(values: Iterable[object]) -> int:
    tensors = (value for value in values if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def baseline_facts(found: Measured) -> dict[str, Any]:
    """The baseline, and what was achieved of it: operations and bytes a second."""
    baseline, rates = found.baseline, found.rates
    facts = {
        "gmacs_per_image": round(baseline.gmacs, 4),
        "train_gflop_per_image": round(baseline.train_gflop, 3),
        "image_bytes": baseline.image_bytes,
        "weight_bytes": baseline.weight_bytes,
        "gradient_bytes": baseline.gradient_bytes,
        "state_bytes": baseline.state_bytes,
        "optimizer_bytes_per_step": baseline.optimizer_bytes,
        "tflop_per_s": {
            name: _round(rates[name].images_per_s * baseline.train_gflop / 1e3)
            for name in ("model", "step", "end to end", "timm's parts")
            if name in rates
        },
        "optimizer_gb_per_s": {
            name: _round(baseline.optimizer_bytes / rate.image_ms / 1e6)
            for name, rate in found.optimizer.items()
        },
    }
    if "transfer" in rates:
        bytes_per_s = rates["transfer"].images_per_s * baseline.image_bytes
        facts["transfer_gb_per_s"] = _round(bytes_per_s / 1e9)
    return facts


def comparison_facts(found: Measured) -> dict[str, Any]:
    """Ours against the step alone and against timm's parts: ratios over the turns, milliseconds,
    memory.
    """
    whole = found.rates["end to end"]
    facts: dict[str, Any] = {"of_step": median_and_range(ratios(whole, found.rates["step"]))}
    if found.against:
        facts["not_compared"] = found.against
    else:
        facts["x_timm"] = median_and_range(ratios(whole, found.rates["timm's parts"]))
    times = {
        name: median_and_range([1e3 * seconds / rate.num_images for seconds in rate.seconds])
        for name, rate in found.optimizer.items()
    }
    return facts | {
        "optimizer": found.optimizer_name,
        "optimizer_ms": times,
        "peak_mib": {name: mib and round(mib, 1) for name, mib in found.peak_mib.items()},
        "num_turns": len(whole.seconds),
    }


def median_and_range(values: list[float]) -> dict[str, float]:
    """The median, the lowest and the highest."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: _round(value) for name, value in found.items()}


def _round(value: float) -> float:
    """To four digits: a quotient has no more."""
    return float(f"{value:.4g}")


# ---- the targets


def targets_of(found: Measured) -> list[Target]:
    """What a run on a GPU was meant to reach, and whether it did."""
    return [_of_step(found), _of_timm(found), _of_optimizer(found), _of_memory(found)]


def _of_step(found: Measured) -> Target:
    each = ratios(found.rates["end to end"], found.rates["step"])
    what, wanted = "end to end, of the step on data on the device", f">= {100 * BOUND_SHARE:.0f} %"
    median, low, high = (100 * share for share in median_and_range(each).values())
    text = f"{median:.1f} % ({low:.1f} to {high:.1f}, {_turns(each)})"
    return Target(what, wanted, text, median >= 100 * BOUND_SHARE)


def _of_timm(found: Measured) -> Target:
    what, wanted = "images/s, times a loop of timm's parts", f">= {TIMM_RATIO}"
    if found.against:
        return Target(what, wanted, f"no such loop: {found.against}", None)
    each = ratios(found.rates["end to end"], found.rates["timm's parts"])
    median, low, high = median_and_range(each).values()
    text = f"{median:.2f} ({low:.2f} to {high:.2f}, {_turns(each)})"
    return Target(what, wanted, text, median >= TIMM_RATIO)


def _turns(each: list[float]) -> str:
    return f"{len(each)} turn{'s' * (len(each) > 1)}"


def _of_optimizer(found: Measured) -> Target:
    what, wanted = f"a step of {found.optimizer_name} alone", f"< {OPTIMIZER_MS:g} ms"
    ours, timms = found.optimizer["ours"].image_ms, found.optimizer.get("timm's")
    text = f"{ours:.2f} ms" + (f" (timm's {timms.image_ms:.2f} ms)" if timms else "")
    return Target(what, wanted, text, ours < OPTIMIZER_MS)


def _of_memory(found: Measured) -> Target:
    what, wanted = "peak memory", "no more than timm's parts"
    ours, timms = found.peak_mib.get("end to end"), found.peak_mib.get("timm's parts")
    if ours is None:
        return Target(what, wanted, "memory is counted on a GPU alone", None)
    if timms is None:
        return Target(what, wanted, f"{ours:,.0f} MiB; no such loop: {found.against}", None)
    return Target(what, wanted, f"{ours:,.0f} MiB (timm's {timms:,.0f} MiB)", ours <= timms)
