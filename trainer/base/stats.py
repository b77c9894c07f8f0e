"""Statistics of a few repeats: their spread, differences with intervals, how many seeds would tell.

SciPy's distributions do the arithmetic. What cannot be known from the numbers given is None, never
a guess: one value has no spread, and values that do not vary have no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import special  # scipy.stats has all this too, and takes a second to import

CONFIDENCE = 0.95
POWER = 0.80
MOST_SEEDS = 10_000  # more than anybody runs: above it the answer is "more than"

# One recipe (A2, ResNet-50), 100 seeds, ImageNet-1k val: 79.72 +- 0.10 points.
# Source: Wightman, Touvron, Jegou 2021, arXiv:2110.00476, Figure 1.
RSB_SPREAD_PCT, RSB_VAL_IMAGES = 0.10, 50_000

# Beyond this effect the smallest numbers of seeds are enough, and noncentral t runs out of digits.
_LARGEST_EFFECT = 25.0
_NO_WRONG_SIDE = 6.0
# Scores are counts: 100 * 347 / 360 - 100 * 346 / 360 differs from 100 / 360 in its last bits, which is no spread.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """A cell minus its base.

    kind: "paired", seed by seed over the num_pairs seeds that both have; "welch", all values of
    both, where fewer than two seeds are common; "single", where one of them has one value, so that
    nothing more can be said. low, high: the 95 % interval; p: two-sided, of Student's t. All three
    None where nothing varies, or for "single". std: what the values of the difference vary by: of
    the pairs, or both cells' pooled; None where p is.
    """

    value: float
    kind: Literal["paired", "welch", "single"]
    num_pairs: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    std: float | None = None


def mean_of(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.fmean(values) if values else None


def std_of(values: Sequence[float]) -> float | None:
    """The standard deviation with n - 1; None of fewer than two values, exactly 0 where they differ
    in rounding alone.
    """
    if len(values) < 2:
        return None
    found = statistics.stdev(values)
    return 0.0 if found <= _ROUNDING * max(map(abs, values)) else found


def compare(cell: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """The difference of two cells by seed; None where one of them has no value."""
    if not cell or not base:
        return None
    common = sorted(set(cell) & set(base))
    if len(common) >= 2:
        return _paired([cell[seed] for seed in common], [base[seed] for seed in common])
    if len(cell) >= 2 and len(base) >= 2:
        return _welch(list(cell.values()), list(base.values()))
    if common:
        return Difference(cell[common[0]] - base[common[0]], "single", num_pairs=1)
    return Difference(
        mean_of(list(cell.values())) - mean_of(list(base.values())), "single", num_pairs=0
    )


def _paired(cell: list[float], base: list[float]) -> Difference:
    gains = [of_cell - of_base for of_cell, of_base in zip(cell, base, strict=True)]
    largest = max(map(abs, [*cell, *base]))
    std = statistics.stdev(gains)
    if std <= _ROUNDING * largest:
        return Difference(mean_of(gains), "paired", len(gains))
    inner = _interval_and_p(mean_of(gains), std / math.sqrt(len(gains)), len(gains) - 1)
    return Difference(mean_of(gains), "paired", len(gains), *inner, std)


def _welch(cell: list[float], base: list[float]) -> Difference:
    value = mean_of(cell) - mean_of(base)
    pooled = pooled_std([cell, base])
    if not pooled:
        return Difference(value, "welch", 0)
    of_cell, of_base = (statistics.variance(values) / len(values) for values in (cell, base))
    free = (of_cell + of_base) ** 2 / (of_cell**2 / (len(cell) - 1) + of_base**2 / (len(base) - 1))
    return Difference(
        value, "welch", 0, *_interval_and_p(value, math.sqrt(of_cell + of_base), free), pooled
    )


def _interval_and_p(value: float, error: float, free: float) -> tuple[float, float, float]:
    """(low, high, p) of a value with its standard error, by Student's t with so many degrees of
    freedom.
    """
    reach = _quantile(free) * error
    return value - reach, value + reach, 2 * float(special.stdtr(free, -abs(value) / error))


def _quantile(free: float) -> float:
    """What Student's t exceeds on either side with 5 % in all."""
    return float(special.stdtrit(free, (1 + CONFIDENCE) / 2))


def pooled_std(cells: Sequence[Sequence[float]]) -> float | None:
    """What the values of several cells vary by around their own means, weighted by what each can
    say; None of none.
    """
    known = [(len(values) - 1, std_of(values)) for values in cells if len(values) >= 2]
    if not known:
        return None
    return math.sqrt(sum(free * std**2 for free, std in known) / sum(free for free, _ in known))


def holm(ps: Sequence[float | None]) -> tuple[float | None, ...]:
    """Each p after Holm's correction for all that are there; None stays None.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(
        (place for place, p in enumerate(ps) if p is not None), key=lambda place: ps[place]
    )
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[place]))
        corrected[place] = largest
    return tuple(corrected)


def power_of(effect: float, num_seeds: int, is_paired: bool) -> float:
    """How often a two-sided t-test at 5 % sees an effect with so many seeds in each of the two
    cells.

    effect: the difference in units of what it varies by: the std of the pairs' differences, or both
    cells' pooled one.
    """
    effect = min(abs(effect), _LARGEST_EFFECT)
    free = num_seeds - 1 if is_paired else 2 * num_seeds - 2
    shift = effect * math.sqrt(num_seeds if is_paired else num_seeds / 2)
    limit = _quantile(free)
    power = 1 - float(special.nctdtr(free, shift, limit))
    # on the wrong side nothing is left then, and SciPy's noncentral t gives NaN from about 10 on
    return power if shift > _NO_WRONG_SIDE else power + float(special.nctdtr(free, shift, -limit))


def seeds_needed(difference: float, std: float, is_paired: bool) -> int | None:
    """The fewest seeds in each cell that show such a difference with 80 % power; None where none
    would, or more than MOST_SEEDS.
    """
    if not difference or not std:
        return None
    return _fewest(lambda num_seeds: power_of(difference / std, num_seeds, is_paired) >= POWER)


def _fewest(is_enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 2 to MOST_SEEDS that is enough, where all larger ones are too."""
    low, high = 1, 2
    while not is_enough(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def binomial_error_pct(score_pct: float, num_images: int) -> float:
    """The standard error of a share of so many images, in points: what another val set of this size
    would move.
    """
    share = score_pct / 100
    return 100 * math.sqrt(share * (1 - share) / num_images)


def published_spread_pct(num_images: int) -> float:
    """RSB's spread over seeds as it would be on so many val images, in points.

    The spread of a share of n images goes with 1 / sqrt(n): seeds change which images are right,
    nearly one by one.
    """
    return RSB_SPREAD_PCT * math.sqrt(RSB_VAL_IMAGES / num_images)


def next_value_range(values: Sequence[float]) -> tuple[float, float] | None:
    """Where one more value lies with 95 %, after these; None of fewer than two or where they do not
    vary.

    mean +- t * std * sqrt(1 + 1 / n): the prediction interval of a normal distribution.
    """
    std = std_of(values)
    if not std:
        return None
    reach = _quantile(len(values) - 1) * std * math.sqrt(1 + 1 / len(values))
    return mean_of(values) - reach, mean_of(values) + reach
