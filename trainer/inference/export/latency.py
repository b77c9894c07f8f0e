"""How long a model takes to answer, by what runs it: timed in turns, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.inference.export.formats import Engine, Format

_WARM_UP_CALLS, _LEAST_CALLS = 5, 3
_PAUSE_S = 0.02  # in which the threads of the one before stop waiting for work


@dataclass(frozen=True)
class Timing:
    """Of one engine: the seconds of each call, round by round."""

    engine: str
    num_threads: int
    batch_images: int
    rounds: tuple[tuple[float, ...], ...]

    @property
    def median_s(self) -> float:
        """Seconds of the median call over all rounds."""
        return float(np.median(np.concatenate(self.rounds)))

    @property
    def p95_s(self) -> float:
        """What 95 % of the calls are faster than."""
        return float(np.quantile(np.concatenate(self.rounds), 0.95))

    @property
    def images_per_s(self) -> float:
        """By the median."""
        return self.batch_images / self.median_s

    @property
    def spread_s(self) -> tuple[float, float]:
        """The lowest and the highest median of a round."""
        medians = [float(np.median(one)) for one in self.rounds]
        return min(medians), max(medians)


# of a number of threads
Opened = Callable[[int], Engine]


def eager(model: nn.Module) -> Opened:
    """torch, operation by operation."""
    return lambda num_threads: _in_torch(model)


def compiled(model: nn.Module) -> Opened:
    """torch.compile, for each shape and number of threads anew."""

    def opened(num_threads: int) -> Engine:
        torch.compiler.reset()
        options: dict[str, str | int | bool | Callable] = {"cpp.threads": num_threads}
        return _in_torch(torch.compile(model, dynamic=False, options=options))

    return opened


def of_file(form: Format, path: Path) -> Opened:
    """What runs an exported file."""
    return lambda num_threads: form.engine(path, num_threads)


def _in_torch(model: Callable) -> Engine:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


def measure(
    engines: Mapping[str, Opened],
    inputs: Mapping[int, np.ndarray],
    threads: Sequence[int],
    seconds: float,
    num_rounds: int,
    check: Callable[[], None] = lambda: None,
    each: Callable[[], None] = lambda: None,
    measured: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Time every engine on every input [B, C, H, W] for every number of threads, in rounds in which
    each has its turn of seconds / num_rounds. Warm-up is not counted. check: called before a turn;
    what it raises ends the measurement. each: called after one. measured: called with each timing,
    as soon as its last turn is over.
    """
    found: list[Timing] = []
    before = torch.get_num_threads()
    try:
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            runs = {name: opened(num_threads) for name, opened in engines.items()}
            for number, images in inputs.items():
                for run in runs.values():
                    check()
                    for _ in range(_WARM_UP_CALLS):
                        run(images)
                turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
                for _ in range(num_rounds):
                    for name, run in runs.items():
                        check()
                        time.sleep(_PAUSE_S)
                        turns[name].append(_timed(run, images, seconds / num_rounds))
                        each()
                        if len(turns[name]) == num_rounds:
                            found.append(Timing(name, num_threads, number, tuple(turns[name])))
                            measured(found[-1])
    finally:
        torch.set_num_threads(before)
    return found


def _timed(run: Engine, images: np.ndarray, seconds: float) -> tuple[float, ...]:
    """The seconds of every call, after one that is not counted: the caches are another engine's."""
    run(images)
    found: list[float] = []
    while len(found) < _LEAST_CALLS or sum(found) < seconds:
        start = time.perf_counter()
        run(images)
        found.append(time.perf_counter() - start)
    return tuple(found)
