"""Main effects and interactions of a full design: what one factor does over all levels of the
others, and whether that depends on another factor.

A table's differences are each to one cell; a question such as "does it depend on ..." is about
several cells at once, and these are its answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.ablation.cells import Cell
from trainer.base.stats import Difference, contrast, holm

_Scored = tuple[Cell, Mapping[int, float]]  # a cell and its values by seed


@dataclass(frozen=True)
class FactorEffect:
    """One effect, averaged over all combinations of the other factors' levels.

    changes: (factor, level, first level). One is a main effect: the level minus the first one. Two
    are an interaction: that difference at a level of the second factor, minus the same at its
    first. difference: paired over the seeds that all the cells in it have, None without such a
    seed; its interval holds with those of all effects of the table together at 95 %. p_holm:
    corrected for all of them.
    """

    group: str
    changes: tuple[tuple[str, str, str], ...]
    difference: Difference | None
    p_holm: float | None = None

    @property
    def factors(self) -> str:
        """The factors' names, joined by ×."""
        return " × ".join(factor for factor, _, _ in self.changes)

    @property
    def name(self) -> str:
        """Such as `CE − BCE`, and `(CE − BCE) at no mixing − at Mixup`."""
        (_, level, first), *other = self.changes
        simple = f"{level} − {first}"
        return f"({simple}) at {other[0][1]} − at {other[0][2]}" if other else simple


def effects_of(scored: Iterable[_Scored]) -> tuple[FactorEffect, ...]:
    """The main effects and interactions of two factors, of every group that is a full design."""
    groups: dict[str, list[_Scored]] = {}
    for cell, values in scored:
        groups.setdefault(cell.group, []).append((cell, values))
    effects = [effect for cells in groups.values() for effect in _group_effects(cells)]
    ps = holm([effect.difference.p if effect.difference else None for effect in effects])
    num_tested = sum(p is not None for p in ps)
    return tuple(
        replace(
            effect,
            p_holm=p,
            difference=effect.difference and effect.difference.simultaneous(num_tested),
        )
        for effect, p in zip(effects, ps, strict=True)
    )


def _group_effects(cells: Sequence[_Scored]) -> Iterator[FactorEffect]:
    levels = levels_of([cell for cell, _ in cells])
    for size in (1, 2):
        for factors in itertools.combinations(levels, size):
            for chosen in itertools.product(*(levels[factor][1:] for factor in factors)):
                firsts = (levels[factor][0] for factor in factors)
                changes = tuple(zip(factors, chosen, firsts, strict=True))
                yield FactorEffect(cells[0][0].group, changes, _difference(changes, cells))


def levels_of(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The levels of each factor of a full design of two factors or more, the base's first; empty
    for every other design.
    """
    levels: dict[str, list[str]] = {}
    for factor, level in (pair for cell in cells for pair in cell.levels):
        known = levels.setdefault(factor, [])
        known += [level] * (level not in known)
    num_cells = math.prod(len(known) for known in levels.values())
    is_full = num_cells == len(cells) == len({cell.levels for cell in cells})
    varied = {factor: known for factor, known in levels.items() if len(known) > 1}
    return varied if is_full and len(varied) > 1 else {}


def _difference(
    changes: Sequence[tuple[str, str, str]], cells: Sequence[_Scored]
) -> Difference | None:
    terms = []
    for cell, values in cells:
        at = dict(cell.levels)
        signs = [(at[factor] == level) - (at[factor] == first) for factor, level, first in changes]
        if all(signs):
            terms.append((math.prod(signs), values))
    num_averaged = len(terms) // 2 ** len(changes)
    return contrast([(sign / num_averaged, values) for sign, values in terms])
