"""Measuring in turns: what each part of a step could do alone, so that a machine that grows slower
grows slower for all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP_ROUNDS = 1
_FIRST_SHARE = 2 / 3  # of a turn's time, for the steps that are not counted, at most


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
        rounded = {
            "images_per_s": self.images_per_s,
            "low_images_per_s": low,
            "high_images_per_s": high,
        }
        return {name: round(value, 2) for name, value in rounded.items()} | {
            "num_rounds": len(self.seconds)
        }


def in_turns(
    parts: dict[str, Callable[[int], int]],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
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
    clock: Callable[[], float] = time.perf_counter,
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


def median_ratio(one: Rate, other: Rate) -> float:
    """Their median."""
    return statistics.median(ratios(one, other))
