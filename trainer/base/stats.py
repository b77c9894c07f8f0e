"""Statistics of a few seeds: spread, differences with confidence intervals, power.

SciPy's distributions do the arithmetic. What the values cannot answer is None, never a guess:
one value has no spread, and values that do not vary have no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy import special  # scipy.stats has the same functions and takes a second to import

ALPHA = 0.05
POWER = 0.80
MOST_SEEDS = 10_000  # more than anybody runs: beyond it the answer is "more than"

# One recipe (A2, ResNet-50), 100 seeds, ImageNet-1k val: 79.72 +- 0.10 points.
# Source: Wightman, Touvron, Jegou 2021, arXiv:2110.00476, Figure 1.
RSB_SPREAD_PCT, RSB_VAL_IMAGES = 0.10, 50_000

# Beyond this effect two or three seeds are enough, and SciPy's noncentral t loses its precision.
_MAX_EFFECT = 25.0
# Beyond this noncentrality the wrong tail is below 1e-9, and nctdtr gives NaN from about 10.
_MAX_TWO_TAILED = 6.0
# Scores are ratios of counts: 100 * 347 / 360 - 100 * 346 / 360 differs from 100 / 360 in its last
# bits, which is no spread.
_RELATIVE_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """A cell minus its base, or another contrast of cells.

    kind: "paired", by seed, over the num_pairs seeds that all of them have; "welch", all values of
    both, where fewer than two seeds are shared; "single", where one of them has a single value and
    nothing can be tested.
    low, high: the 95 % confidence interval, by itself or of several at once (see
    simultaneous); p: two-sided, Student's t. All three are None for "single" and where nothing
    varies.
    std: of the paired differences, or pooled over both cells; None where p is, as are
    standard_error and dof, the degrees of freedom.
    """

    value: float
    kind: Literal["paired", "welch", "single"]
    num_pairs: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    std: float | None = None
    standard_error: float | None = None
    dof: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high)."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def simultaneous(self, num_compared: int) -> Difference:
        """With the interval that, as one of num_compared, covers with the others at 95 %.

        Bonferroni's: each at 1 - 5 % / num_compared. One that leaves 0 out has p * num_compared
        below 5 %, and so has Holm's p, which is never above it; the reverse need not hold.
        """
        if self.standard_error is None or self.dof is None:
            return self
        margin = _t_quantile(self.dof, ALPHA / num_compared) * self.standard_error
        return replace(self, low=self.value - margin, high=self.value + margin)


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return statistics.fmean(values) if values else None


def std_of(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None for n < 2, exactly 0 up to rounding errors."""
    if len(values) < 2:
        return None
    std = statistics.stdev(values)
    return 0.0 if std <= _RELATIVE_ROUNDING * max(map(abs, values)) else std


def compare_cells(cell: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """The difference of two cells, each given as values by seed; None where one has no value."""
    if not cell or not base:
        return None
    shared = sorted(set(cell) & set(base))
    if len(shared) >= 2:
        return contrast([(1, cell), (-1, base)])
    if len(cell) >= 2 and len(base) >= 2:
        return _welch(list(cell.values()), list(base.values()))
    if shared:
        return Difference(cell[shared[0]] - base[shared[0]], "single", num_pairs=1)
    value = statistics.fmean(cell.values()) - statistics.fmean(base.values())
    return Difference(value, "single", num_pairs=0)


def contrast(terms: Sequence[tuple[float, Mapping[int, float]]]) -> Difference | None:
    """The weighted sum of several cells' values, paired over the seeds that all of them have.

    terms: (weight, values by seed). None without a common seed. Its interval and p are those of
    the t-test of one sum per seed, so what a seed does to all cells alike cancels out.
    """
    shared = sorted(set.intersection(*(set(values) for _, values in terms)))
    sums = [math.fsum(weight * values[seed] for weight, values in terms) for seed in shared]
    if len(sums) < 2:
        return Difference(sums[0], "single", num_pairs=1) if sums else None
    largest = max(abs(values[seed]) for _, values in terms for seed in shared)
    mean, std, n = statistics.fmean(sums), statistics.stdev(sums), len(sums)
    if std <= _RELATIVE_ROUNDING * largest:
        return Difference(mean, "paired", n)
    return _tested(mean, "paired", n, std, std / math.sqrt(n), n - 1)


def _welch(cell: list[float], base: list[float]) -> Difference:
    value = statistics.fmean(cell) - statistics.fmean(base)
    pooled = pooled_std([cell, base])
    if not pooled:
        return Difference(value, "welch", 0)
    # squared standard errors; degrees of freedom by Welch-Satterthwaite
    a, b = (statistics.variance(values) / len(values) for values in (cell, base))
    dof = (a + b) ** 2 / (a**2 / (len(cell) - 1) + b**2 / (len(base) - 1))
    return _tested(value, "welch", 0, pooled, math.sqrt(a + b), dof)


def _tested(
    value: float,
    kind: Literal["paired", "welch"],
    num_pairs: int,
    std: float,
    standard_error: float,
    dof: float,
) -> Difference:
    """With interval and p by Student's t."""
    p = 2 * float(special.stdtr(dof, -abs(value) / standard_error))
    difference = Difference(value, kind, num_pairs, None, None, p, std, standard_error, dof)
    return difference.simultaneous(1)


def _t_quantile(dof: float, alpha: float = ALPHA) -> float:
    """The two-sided quantile of Student's t, of 5 % by default."""
    return float(special.stdtrit(dof, 1 - alpha / 2))


def pooled_std(cells: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within cells, weighted by degrees of freedom; None without any."""
    return pool([(len(values) - 1, std) for values in cells if (std := std_of(values)) is not None])


def pool(stds: Sequence[tuple[int, float]]) -> float | None:
    """Standard deviations pooled into one: (degrees of freedom, std) each; None without any."""
    if not stds:
        return None
    return math.sqrt(sum(dof * std**2 for dof, std in stds) / sum(dof for dof, _ in stds))


def holm(ps: Sequence[float | None]) -> tuple[float | None, ...]:
    """Each p after Holm's correction for all that are not None; None stays None.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    ascending = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0  # a corrected p is never below that of a smaller p
    for rank, (p, index) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(ascending) - rank) * p))
        corrected[index] = largest
    return tuple(corrected)


def power_of(effect: float, num_seeds: int, is_paired: bool, alpha: float = ALPHA) -> float:
    """The power of a two-sided t-test at alpha with num_seeds in each of two cells.

    effect: the difference divided by the std of the paired differences, or by the pooled std.
    """
    effect = min(abs(effect), _MAX_EFFECT)
    dof = num_seeds - 1 if is_paired else 2 * num_seeds - 2
    noncentrality = effect * math.sqrt(num_seeds if is_paired else num_seeds / 2)
    critical = _t_quantile(dof, alpha)
    power = 1 - float(special.nctdtr(dof, noncentrality, critical))
    if noncentrality > _MAX_TWO_TAILED:
        return power
    return power + float(special.nctdtr(dof, noncentrality, -critical))


def seeds_needed(
    difference: float, std: float, is_paired: bool, alpha: float = ALPHA
) -> int | None:
    """The fewest seeds per cell that detect a difference with 80 % power at alpha.

    difference: the smallest of interest, stated beforehand. Worked out from the one that was seen
    it would say no more than p does.

    None for a difference or a std of 0, and for more than MOST_SEEDS.
    """
    if not difference or not std:
        return None
    effect = difference / std
    return _smallest(lambda num_seeds: power_of(effect, num_seeds, is_paired, alpha) >= POWER)


def _smallest(is_enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 2 to MOST_SEEDS that is enough, by bisection (monotone)."""
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
    """The standard error of an accuracy on num_images, in points: the choice of val images."""
    share = score_pct / 100
    return 100 * math.sqrt(share * (1 - share) / num_images)


def wilson_pct(num_right: int, num_images: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, in percent, by the choice of the images.

    Source: Wilson 1927; it holds for few images and near 0 and 100 %, where +- 1.96 standard
    errors do not.
    """
    z = float(special.ndtri(1 - ALPHA / 2))
    share, weight = num_right / num_images, z**2 / num_images
    middle = (share + weight / 2) / (1 + weight)
    margin = z / (1 + weight) * math.sqrt(share * (1 - share) / num_images + weight**2 / z**2 / 4)
    return 100 * max(0.0, middle - margin), 100 * min(1.0, middle + margin)


def is_above_pct(score_pct: float, constant_pct: float, num_images: int) -> bool:
    """Is an accuracy on num_images above one that is known, beyond chance at 95 % (two-sided)?"""
    return score_pct > constant_pct + 1.96 * binomial_error_pct(constant_pct, num_images)


def published_spread_pct(num_images: int) -> float:
    """RSB's standard deviation over seeds, scaled to another number of val images, in points.

    By 1 / sqrt(n), as for a share of n images: an assumption, that seeds change which images are
    right nearly independently of each other.
    """
    return RSB_SPREAD_PCT * math.sqrt(RSB_VAL_IMAGES / num_images)


def next_value_range(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % prediction interval of one more value, mean +- t * std * sqrt(1 + 1 / n).

    None for fewer than two values and where they do not vary.
    """
    std = std_of(values)
    if not std:
        return None
    margin = _t_quantile(len(values) - 1) * std * math.sqrt(1 + 1 / len(values))
    mean = statistics.fmean(values)
    return mean - margin, mean + margin


def sigma_of(share: float) -> float:
    """The sigma of a normal distribution beyond which lies a share of it, on one side."""
    return -float(special.ndtri(share))


def sigma_off(score_pct: float, scores_pct: Sequence[float], num_images: int) -> float:
    """How far one more accuracy lies from n earlier ones on num_images, by its chance under them:
    as sigmas of a normal distribution, negative below.

    The chance is that of Student's t with n - 1 degrees of freedom, of the distance to their mean
    by std * sqrt(1 + 1 / n). At least the images' binomial error takes the std's place, with one
    more right and one more wrong, so that 0 and 100 % have one: a few seeds may be alike by
    chance. So no more than the nominal share of equally distributed scores is outside, if their
    true spread is the seeds' or smaller than the floor. Raises ValueError for n < 2.
    """
    n = len(scores_pct)
    if n < 2:
        raise ValueError("one earlier score has no spread")
    mean, std, scale = statistics.fmean(scores_pct), std_of(scores_pct), math.sqrt(1 + 1 / n)
    off = score_pct - mean
    smoothed_pct = (mean * num_images + 100) / (num_images + 2)
    sigma = abs(off) / (binomial_error_pct(smoothed_pct, num_images) * scale)
    if std:
        by_seeds = sigma_of(float(special.stdtr(n - 1, -abs(off) / (std * scale))))
        sigma = min(sigma, by_seeds)
    return math.copysign(sigma, off)


def front_of(
    costs: Sequence[tuple[float, float]], gains: Sequence[tuple[float, float]]
) -> list[int]:
    """The places of the cells on the Pareto front, the cheapest first: each costs more than the one
    before it and gains more, both by more than their (low, high) over the seeds. Empty for fewer
    than two.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (sum(costs[i]), -sum(gains[i]))):
        while front and costs[index][0] <= costs[front[-1]][1]:  # the same cost, as far as is known
            if gains[index][0] <= gains[front[-1]][1]:
                break
            front.pop()
        else:
            if not front or gains[index][0] > gains[front[-1]][1]:
                front.append(index)
    return front if len(front) > 1 else []
