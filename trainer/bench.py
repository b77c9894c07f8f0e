"""Measuring in turns: what each part of a step could do alone, so that a machine that grows slower grows slower for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP_ROUNDS = 1


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
        rounded = {"images_per_s": self.images_per_s, "low_images_per_s": low, "high_images_per_s": high}
        return {name: round(value, 2) for name, value in rounded.items()} | {"num_rounds": len(self.seconds)}


def in_turns(
    parts: dict[str, Callable[[int], int]], num_rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Rate]:
    """The rate of every part. Each is called with the number of the round, and gives how many images it did.

    clock: time.process_time counts what this process itself works, which a busy machine blurs less.
    """
    taken: dict[str, list[float]] = {name: [] for name in parts}
    num_images: dict[str, int] = {}
    for number in range(-WARM_UP_ROUNDS, num_rounds):
        for name, part in parts.items():
            before = clock()
            num_images[name] = part(number)
            if number >= 0:
                taken[name].append(clock() - before)
    return {name: Rate(tuple(taken[name]), num_images[name]) for name in parts}


def median_ratio(one: Rate, other: Rate) -> float:
    """How many times as fast as the other one is: the median over rounds."""
    each = zip(one.seconds, other.seconds, strict=True)
    return statistics.median((b / other.num_images) / (a / one.num_images) for a, b in each)
