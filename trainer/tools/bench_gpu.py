"""What a run does on a GPU, beside a loop of timm's parts in the same minutes: within a given time,
however slow the machine.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.loader import MicroBatch
from trainer.engine.state import TrainingState
from trainer.engine.train import fast_algorithms, optimizer_step
from trainer.recipe.plan import Plan
from trainer.tools.bench import Rate, in_turns, seconds_a_step
from trainer.tools.bench_run import (
    bench_parts,
    bottleneck_of,
    clock_of,
    first_batch,
    num_first_steps,
    run_facts,
    step_alone,
)
from trainer.tools.bench_targets import (
    Floor,
    Measured,
    Target,
    comparison_facts,
    floor_facts,
    floor_of,
    targets_of,
)
from trainer.tools.bench_timm import TimmLoop, reason_against

PAGES = (("A2", "resnet50"), ("convnext", "convnext_tiny"))
MAX_BENCH_S = 420.0  # of the whole command, which is to take less than eight minutes
_ALONE_SHARE = 0.25  # of a recipe's time, for its parts and the optimizers
_LEAST_TURNS = 3  # of each loop, where the time allows
_TIMED = 3  # things in a round: two loops, and the step alone
_STEPS = 8  # counted in a turn
_OPTIMIZER_STEPS, _OPTIMIZER_ROUNDS = 10, 30  # steps in a row, which the device is waited for once

Clock = Callable[[], float]


@dataclass(frozen=True)
class Turn:
    """Seconds of a step in one turn, and the most memory that tensors held meanwhile, in MiB; None
    where it is not counted.
    """

    seconds: float
    peak_mib: float | None = None


def bench_page(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path | None,
    num_rounds: int,
    seconds: float,
    clock: Clock | None = None,
) -> tuple[dict, Measured, list[Target]]:
    """A plan's facts for a JSON file, what they were made of, and the targets; in about so many
    seconds.

    folder: of the images, for timm's loader. num_rounds: of the parts and of the loops, at most.
    """
    fast_algorithms(settings.device)
    clock = clock or clock_of(settings)
    began = clock()
    against = reason_against(plan, folder)
    folder = None if against else folder
    rates, optimizer, floor = _alone(
        plan, settings, data, folder, num_rounds, _ALONE_SHARE * seconds, clock
    )
    turns = in_rounds(
        _loops(plan, settings, data, folder, clock), num_rounds, seconds - (clock() - began), clock
    )
    rates |= {
        name: Rate(tuple(turn.seconds for turn in each), plan.recipe.batch.images)
        for name, each in turns.items()
    }
    peaks = {name: _most(each) for name, each in turns.items() if name != "step"}
    found = Measured(plan.recipe.optimizer.name, rates, optimizer, peaks, floor, against)
    targets = targets_of(found)
    facts = (
        run_facts(plan, rates, bottleneck_of(rates, settings))
        | comparison_facts(found)
        | {"floor": floor_facts(found)}
    )
    return (
        facts
        | {
            "targets": [target.as_facts() for target in targets],
            "took_s": round(clock() - began, 1),
        },
        found,
        targets,
    )


def in_rounds(
    loops: list[Callable[[float], dict[str, Turn]]], num_rounds: int, seconds: float, clock: Clock
) -> dict[str, list[Turn]]:
    """By name, the turns of loops that take turns, the last one first in every second round.

    A loop is called with the seconds that it may take for each thing it times. No round begins that
    would, by the longest one so far, end after `seconds`; one is there at least.
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


def _loops(
    plan: Plan, settings: Settings, data: OpenedData, folder: Path | None, clock: Clock
) -> list[Callable[[float], dict[str, Turn]]]:
    batch = first_batch(plan, settings, data)
    ours = partial(_ours, plan, settings, data, batch, clock)
    return [ours] if folder is None else [ours, partial(_timms, plan, settings, folder, clock)]


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
    return seconds_a_step(
        lambda: optimizer_step(state, stream, next(numbers)),
        num_first,
        _STEPS,
        bound_s,
        clock,
        memory.restart,
    )


def _timms(
    plan: Plan, settings: Settings, folder: Path, clock: Clock, bound_s: float
) -> dict[str, Turn]:
    memory = Memory(settings.device)
    loop = TimmLoop(plan, settings, folder)
    seconds = seconds_a_step(
        loop.step, num_first_steps(plan, settings), _STEPS, bound_s, clock, memory.restart
    )
    return {"timm's parts": Turn(seconds, memory.peak_mib())}


def _alone(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path | None,
    num_rounds: int,
    seconds: float,
    clock: Clock,
) -> tuple[dict[str, Rate], dict[str, Rate], Floor]:
    """The parts, but for the step that takes its turns with the loops; the optimizers; and the
    floor.
    """
    began = clock()
    state = TrainingState(plan, settings)
    parts = bench_parts(state, data)
    del parts["step"]
    rates = in_turns(parts, num_rounds, clock, seconds - (clock() - began))
    loop = None if folder is None else TimmLoop(plan, settings, folder)
    return rates, optimizer_rates(state, loop, clock, seconds - (clock() - began)), floor_of(state)


def optimizer_rates(
    state: TrainingState, loop: TimmLoop | None, clock: Clock, bound_s: float
) -> dict[str, Rate]:
    """Steps of our optimizer and of timm's, clipping included, over gradients that mostly are not
    clipped.
    """

    def ours() -> None:
        state.plan.recipe.optimizer.clip(state.model)
        state.optimizer.step()

    def timms() -> None:
        loop.clip()
        loop.optimizer.step()

    _give_gradients(state.model)
    parts = {"ours": _repeated(ours)}
    if loop is not None:
        _give_gradients(loop.model)
        parts["timm's"] = _repeated(timms)
    return in_turns(parts, _OPTIMIZER_ROUNDS, clock, bound_s)


def _repeated(step: Callable[[], None]) -> Callable[[int], int]:
    def steps(_: int) -> int:
        for _ in range(_OPTIMIZER_STEPS):
            step()
        return _OPTIMIZER_STEPS

    return steps


def _give_gradients(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-5  # 25 million of them have a norm of 0.05


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
        return (
            (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20
            if self._device
            else None
        )


def _most(turns: list[Turn]) -> float | None:
    known = [turn.peak_mib for turn in turns if turn.peak_mib is not None]
    return max(known, default=None)
