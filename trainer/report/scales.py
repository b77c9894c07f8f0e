"""Scales of a report's figures: numbers to places, and round numbers to write beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Numbers from low to high laid on places from start to end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value; one beside the scale is at its end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, most: int) -> tuple[Tick, ...]:
        """At most so many round numbers."""
        rough = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(rough))
        step = next(
            unit * times
            for times in (1, 2, 5, 10, 20)
            if (self.high - self.low) / (unit * times) <= most
        )
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(
            Tick(self.at(place * step), f"{place * step:,.{digits}f}")
            for place in range(first, last + 1)
        )


def scale_over(
    values: Iterable[float], start: float, end: float, margin_share: float = 0.06
) -> Scale:
    """A scale with some room around values; one value alone stands in its middle."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * margin_share if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)
