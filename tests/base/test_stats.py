"""Statistics of few repeats against SciPy, statsmodels, closed forms and an exact permutation test."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from trainer.base.stats import (
    MOST_SEEDS,
    binomial_error_pct,
    compare_cells,
    contrast,
    front_of,
    holm,
    mean_of,
    next_value_range,
    pooled_std,
    power_of,
    published_spread_pct,
    seeds_needed,
    std_of,
)  # fmt: skip

# Recorded top-1 of two studies on the digits: BatchNorm and GroupNorm with weight standardization,
# six seeds each.
BASE = dict(enumerate([95.8333, 97.2222, 96.1111, 96.6667, 95.5556, 96.9444]))
CELL = dict(enumerate([96.3889, 97.5, 97.2222, 96.6667, 96.3889, 98.0556]))


def test_a_pair_by_pair_difference_is_that_of_statsmodels():
    found = compare_cells(CELL, BASE)
    gains = DescrStatsW(np.array(list(CELL.values())) - np.array(list(BASE.values())))
    low, high = gains.tconfint_mean(0.05)
    assert (found.kind, found.num_pairs) == ("paired", 6)
    assert [found.value, found.low, found.high, found.p, found.std] == pytest.approx(
        [gains.mean, low, high, gains.ttest_mean(0)[1], gains.std * math.sqrt(6 / 5)], rel=1e-9
    )


def test_a_difference_without_common_seeds_is_welchs_of_statsmodels():
    found = compare_cells({seed + 10: value for seed, value in CELL.items() if seed < 4}, BASE)
    both = CompareMeans(DescrStatsW(list(CELL.values())[:4]), DescrStatsW(list(BASE.values())))
    low, high = both.tconfint_diff(0.05, usevar="unequal")
    assert (found.kind, found.num_pairs) == ("welch", 0)
    assert [found.low, found.high, found.p] == pytest.approx(
        [low, high, both.ttest_ind(usevar="unequal")[1]], rel=1e-9
    )


def test_the_interval_of_two_seeds_is_the_closed_form():
    """One degree of freedom: t at 97.5 % is tan(0.475 pi) = 12.7062, and P(|T| > t) = 1 - 2 atan(t)
    / pi.
    """
    found = compare_cells({0: 3.0, 1: 5.0}, {0: 1.0, 1: 2.0})
    reach = math.tan(0.475 * math.pi) * math.sqrt(0.5) / math.sqrt(2)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - reach, 2.5 + reach))
    assert found.p == pytest.approx(1 - 2 * math.atan(2.5 / 0.5) / math.pi)


def test_p_is_near_that_of_an_exact_permutation_test():
    """Paired: every assignment of signs to twelve gains; unpaired: every division of eleven values
    in two cells.
    """
    rng = np.random.default_rng(3)
    base = rng.normal(95, 0.8, 12)
    cell = base + rng.normal(0.4, 0.7, 12)
    gains = cell - base
    flips = np.array(list(itertools.product([-1, 1], repeat=12))) @ gains
    exact = np.mean(np.abs(flips) >= abs(gains.sum()) - 1e-9)
    assert compare_cells(dict(enumerate(cell)), dict(enumerate(base))).p == pytest.approx(
        exact, abs=0.01
    )
    others, all_values = rng.normal(96, 0.8, 5), None
    all_values = np.concatenate([others, base[:6]])
    picks = np.array(list(itertools.combinations(range(11), 5)))
    means = all_values[picks].mean(1)
    gaps = means - (all_values.sum() - 5 * means) / 6
    exact = np.mean(np.abs(gaps) >= abs(others.mean() - base[:6].mean()) - 1e-9)
    found = compare_cells(
        {seed + 100: value for seed, value in enumerate(others)}, dict(enumerate(base[:6]))
    )
    assert found.p == pytest.approx(exact, abs=0.02)


def test_a_contrast_of_cells_is_the_t_test_of_its_sums_by_statsmodels():
    """Over the seeds that all have; here the interaction of a two by two."""
    rng = np.random.default_rng(5)
    cells = rng.normal([[90], [93], [80], [95]], 1.0, (4, 7))
    signs = np.array([1, -1, -1, 1])
    given_cells = [dict(enumerate(values)) for values in cells]
    given_cells[2][99] = -1e6  # a seed that the others lack
    found = contrast(list(zip(map(float, signs), given_cells, strict=True)))
    sums = DescrStatsW(signs @ cells)
    low, high = sums.tconfint_mean(0.05)
    assert (found.kind, found.num_pairs) == ("paired", 7)
    assert [found.value, found.low, found.high, found.p] == pytest.approx(
        [sums.mean, low, high, sums.ttest_mean(0)[1]], rel=1e-9
    )
    assert contrast([(1.0, {0: 3.0}), (-1.0, {1: 2.0})]) is None


@pytest.mark.parametrize("num_compared", [1, 7, 66])
def test_simultaneous_intervals_are_those_at_bonferronis_level(num_compared):
    gains = DescrStatsW(np.array(list(CELL.values())) - np.array(list(BASE.values())))
    found = compare_cells(CELL, BASE).simultaneous(num_compared)
    assert found.interval == pytest.approx(gains.tconfint_mean(0.05 / num_compared), rel=1e-9)
    others = compare_cells({9 + seed: value for seed, value in CELL.items()}, BASE)
    welch = CompareMeans(DescrStatsW(list(CELL.values())), DescrStatsW(list(BASE.values())))
    assert others.simultaneous(num_compared).interval == pytest.approx(
        welch.tconfint_diff(0.05 / num_compared, usevar="unequal"), rel=1e-9
    )
    alone = compare_cells({0: 3.0}, {0: 1.0})
    assert alone.simultaneous(num_compared) == alone


@given(
    st.lists(st.lists(st.floats(-9, 9, width=16), min_size=3, max_size=3), min_size=1, max_size=6)
)
def test_an_interval_that_leaves_out_zero_never_disagrees_with_holm(cells):
    base = {0: 0.5, 1: -0.25, 2: 0.0}
    found = [compare_cells(dict(enumerate(values)), base) for values in cells]
    num_compared = sum(one.p is not None for one in found)
    for one, p in zip(found, holm([one.p for one in found]), strict=True):
        interval = one.simultaneous(num_compared).interval
        if interval and not interval[0] <= 0 <= interval[1]:
            assert p < 0.05 + 1e-9


def test_intervals_hold_together_as_often_as_they_say():
    """Of seven differences of none, all intervals hold 0 in 95 % of the tables, or a little more."""
    rng = np.random.default_rng(11)
    num_tables, together, alone = 1_500, 0, 0
    for scores in rng.normal(95, 1, (num_tables, 8, 3)):
        base, *others = (dict(enumerate(values)) for values in scores)
        found = [compare_cells(values, base) for values in others]
        alone += all(one.low <= 0 <= one.high for one in found)
        intervals = [one.simultaneous(7).interval for one in found]
        together += all(low <= 0 <= high for low, high in intervals)
    assert together / num_tables >= 0.94 and alone / num_tables < 0.85


def test_seeds_that_only_one_of_them_has_are_left_out_of_the_pairs():
    found = compare_cells({0: 1.0, 1: 2.0, 7: 99.0}, {0: 0.0, 1: 0.5, 2: -50.0})
    assert (found.kind, found.num_pairs, found.value) == ("paired", 2, 1.25)


@pytest.mark.parametrize(
    ("cell", "base", "value", "num_pairs"),
    [
        ({0: 3.0}, {0: 1.0, 1: 7.0}, 2.0, 1),
        ({5: 3.0}, {0: 1.0, 1: 7.0}, -1.0, 0),
        ({0: 3.0, 1: 4.0}, {0: 1.0}, 2.0, 1),
    ],
)
def test_one_value_has_a_difference_and_nothing_more(cell, base, value, num_pairs):
    found = compare_cells(cell, base)
    assert (found.kind, found.value, found.num_pairs) == ("single", value, num_pairs)
    assert (found.low, found.high, found.p, found.std) == (None, None, None, None)


def test_nothing_is_compared_with_nothing():
    assert compare_cells({}, BASE) is None and compare_cells(CELL, {}) is None
    assert mean_of([]) is None and std_of([1.0]) is None and pooled_std([[1.0], []]) is None


@pytest.mark.parametrize("gain", [0.0, 0.5, 100 / 360])
def test_differences_that_do_not_vary_have_no_interval(gain):
    """Not p = 0 of a spread of 1e-14: shares of 360 images differ in their last bits."""
    base = {seed: 100 * count / 360 for seed, count in enumerate([346, 349, 341, 355])}
    found = compare_cells({seed: value + gain for seed, value in base.items()}, base)
    assert found.value == pytest.approx(gain) and (found.low, found.p, found.std) == (
        None,
        None,
        None,
    )
    equal = compare_cells({4: 96.1, 5: 96.1}, {0: 95.0, 1: 95.0})
    assert (equal.kind, equal.p) == ("welch", None)
    assert std_of([100 * 347 / 360, 100 * 0.9638888888888889]) == 0.0


def test_the_spread_is_that_with_n_minus_one():
    values = list(BASE.values())
    assert std_of(values) == pytest.approx(np.std(values, ddof=1))
    pooled = math.sqrt((5 * np.var(values, ddof=1) + 1 * np.var([1.0, 2.0], ddof=1)) / 6)
    assert pooled_std([values, [1.0, 2.0], [9.0]]) == pytest.approx(pooled)


@pytest.mark.parametrize("num_ps", range(13))
def test_holm_is_that_of_statsmodels(num_ps):
    rng = np.random.default_rng(num_ps)
    ps = [None if rng.random() < 0.2 else float(rng.random() ** 3) for _ in range(num_ps)]
    given_ps = [p for p in ps if p is not None]
    corrected = iter(multipletests(given_ps, method="holm")[1] if given_ps else [])
    expected = [None if p is None else next(corrected) for p in ps]
    found = holm(ps)
    assert [p is None for p in found] == [p is None for p in expected]
    assert [p for p in found if p is not None] == pytest.approx(
        [p for p in expected if p is not None]
    )


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == (0.03, None, 0.06, 0.06)


@pytest.mark.parametrize("effect", [0.3, 0.9, 1.6])
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 20])
def test_power_is_that_of_statsmodels(effect, num_seeds):
    assert power_of(effect, num_seeds, True) == pytest.approx(
        TTestPower().power(effect, num_seeds, 0.05), abs=1e-6
    )
    assert power_of(-effect, num_seeds, False) == pytest.approx(
        TTestIndPower().power(effect, num_seeds, 0.05), abs=1e-6
    )


@pytest.mark.parametrize("effect", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_the_seeds_needed_are_the_fewest_that_statsmodels_finds(effect):
    paired = TTestPower().solve_power(effect, power=0.8, alpha=0.05)
    two = TTestIndPower().solve_power(effect, power=0.8, alpha=0.05)
    assert seeds_needed(0.1 * effect, 0.1, is_paired=True) == max(2, math.ceil(paired))
    assert seeds_needed(-0.1 * effect, 0.1, is_paired=False) == max(2, math.ceil(two))


def test_the_seeds_needed_at_the_level_of_one_of_several_comparisons():
    paired = TTestPower().solve_power(1.0, power=0.8, alpha=0.05 / 7)
    two = TTestIndPower().solve_power(1.0, power=0.8, alpha=0.05 / 7)
    assert seeds_needed(0.5, 0.5, is_paired=True, alpha=0.05 / 7) == math.ceil(paired)
    assert seeds_needed(0.5, 0.5, is_paired=False, alpha=0.05 / 7) == math.ceil(two)


def test_an_effect_without_end_needs_few_seeds_and_none_needs_no_number():
    assert (
        seeds_needed(60.0, 1e-6, is_paired=True) == seeds_needed(60.0, 1e-6, is_paired=False) == 2
    )
    assert seeds_needed(0.0, 1.0, True) is None and seeds_needed(1.0, 0.0, True) is None
    assert seeds_needed(0.001, 1.0, True) is None  # 7.8 million: more than MOST_SEEDS
    assert power_of(0.001, MOST_SEEDS, True) < 0.8


def test_what_the_val_set_itself_moves():
    """RSB's 100 seeds: 0.10 points on 50,000 images. A coin's standard error is 50 / sqrt(n)
    points.
    """
    assert binomial_error_pct(50, 400) == pytest.approx(2.5)
    assert binomial_error_pct(100, 360) == 0
    assert published_spread_pct(50_000) == pytest.approx(0.10)
    assert published_spread_pct(500) == pytest.approx(1.0)


def test_one_more_value_lies_where_its_prediction_interval_says():
    """Of normal values, 95 % lie in the interval that those before them give."""
    rng = np.random.default_rng(0)
    draws = rng.normal(70, 3, (2_000, 5))
    inside = [
        low <= last <= high for *before, last in draws for low, high in [next_value_range(before)]
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2_000))
    assert next_value_range([1.0]) is None and next_value_range([2.0, 2.0]) is None
    low, high = next_value_range([1.0, 2.0])
    assert (low + high) / 2 == 1.5 and high - low == pytest.approx(
        2 * stats.t.ppf(0.975, 1) * math.sqrt(0.5 * 1.5)
    )


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8))
def test_the_front_of_exact_values_is_who_nobody_beats(pairs):
    """Each once: of several with the same cost and gain, one."""
    beaten = {
        (cost, gain)
        for cost, gain in pairs
        if any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in pairs)
    }
    found = front_of([(cost, cost) for cost, _ in pairs], [(gain, gain) for _, gain in pairs])
    expected = sorted(set(pairs) - beaten)
    assert [pairs[place] for place in found] == (expected if len(expected) > 1 else [])


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(0, 4)] * 2), max_size=8))
def test_every_step_of_a_front_is_more_than_the_spread(cells):
    costs = [(cost, cost + spread) for cost, _, spread, _ in cells]
    gains = [(gain, gain + spread) for _, gain, _, spread in cells]
    found = front_of(costs, gains)
    assert len(found) != 1
    for before, after in itertools.pairwise(found):
        assert costs[before][1] < costs[after][0] and gains[before][1] < gains[after][0]
