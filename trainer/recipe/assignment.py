"""Which images of a step are a rank's: whole micro-batches, or a part of each that it shares with
other ranks. Pure: no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from trainer.components.mixing import Mixing


@dataclass(frozen=True)
class PartRows:
    """The images of a micro-batch that one of several ranks loads.

    rows: their places in the micro-batch, mixing unit after mixing unit. units: which of these are
    a unit's, by its number in the micro-batch. own: which of these are trained on; a few more are
    there as partners of a mix alone.
    """

    rows: tuple[int, ...]
    units: dict[int, slice]
    own: tuple[slice, ...]

    @property
    def own_rows(self) -> list[int]:
        """The rows of the images that are trained on here, one micro-batch after another."""
        return [row for each in self.own for row in self.rows[each]]

    @property
    def has_more(self) -> bool:
        """Are there partners that are not trained on here?"""
        return len(self.own_rows) < len(self.rows)


@dataclass(frozen=True)
class Assignment:
    """One rank's images in every step.

    Ranks stand in num_groups groups of num_parts, one after another. A group takes every
    num_groups-th micro-batch of a step from the group-th on, and each of its ranks a part of the
    images: one rank alone whole micro-batches. num_units: of the mix, in each micro-batch.
    """

    group: int = 0
    num_groups: int = 1
    part: int = 0
    num_parts: int = 1
    mix: Mixing | None = None
    num_units: int = 1

    def micro_batches(self, num_images: int, number: int) -> range:
        """Which micro-batches of a step of so many images, `number` micro-batches, it takes."""
        is_idle = self.part >= self.parts_in(num_images, number)
        return range(0) if is_idle else range(self.group, number, self.num_groups)

    def parts_in(self, num_images: int, number: int) -> int:
        """Ranks that share each of its micro-batches: one, where an epoch's last step has not an
        image for every rank.
        """
        return self.num_parts if self.num_blocks(num_images // number) >= self.num_parts else 1

    def num_blocks(self, num_images: int) -> int:
        """Into how many parts a micro-batch of so many images can be split."""
        return sum(self._blocks(num_images))

    def _blocks(self, num_images: int) -> list[int]:
        lengths = [len(range(unit, num_images, self.num_units)) for unit in range(self.num_units)]
        return [self.mix.num_blocks(length) if self.mix else length for length in lengths]

    def rows(self, num_images: int) -> PartRows:
        """Its part of a micro-batch of so many images."""
        return _rows(self, num_images)


WHOLE = Assignment()  # of a rank by itself


@lru_cache(maxsize=256)
def _rows(assigned: Assignment, num_images: int) -> PartRows:
    """Blocks that can be mixed apart, unit after unit, in num_parts runs of nearly one length."""
    numbers = assigned._blocks(num_images)
    begin, end = (
        sum(numbers) * part // assigned.num_parts for part in (assigned.part, assigned.part + 1)
    )
    rows: list[int] = []
    units, own = {}, []
    for unit, number in enumerate(numbers):
        blocks = range(max(begin, 0), max(min(end, number), 0))
        begin, end = begin - number, end - number
        if not blocks:
            continue
        length = len(range(unit, num_images, assigned.num_units))
        more, places = assigned.mix.rows(length, blocks) if assigned.mix else ([], list(blocks))
        first = len(rows)
        rows += (unit + assigned.num_units * place for place in (*more, *places))
        units[unit] = slice(first, len(rows))
        own.append(slice(first + len(more), len(rows)))
    return PartRows(tuple(rows), units, tuple(own))


def assignment(
    rank: int, world_size: int, num_micro_batches: int, mix: Mixing | None, num_units: int
) -> Assignment:
    """A rank's images in the steps of num_micro_batches.

    Groups are as many as divide both, so that all have the same number of micro-batches and of
    ranks.
    """
    num_groups = math.gcd(num_micro_batches, world_size)
    group, part = divmod(rank, num_parts := world_size // num_groups)
    return Assignment(group, num_groups, part, num_parts, mix, num_units)
