"""What curves say: the rules on curves whose answers are known, and silence where there is none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.lr_finder.rules import (
    BaselineLosses,
    Curve,
    read,
    series,
    smoothed,
    smoothing_for,
    spread,
    without_spikes,
)

VALUES = np.geomspace(1e-6, 10, 200)
BASELINES = BaselineLosses()


def curve_of(losses, values=VALUES, ended="ramp", held_out=None):
    """A ramp with these losses; without a slice unless one is given."""
    steps = np.arange(0) if held_out is None else held_out[0]
    on_slice = np.zeros(0) if held_out is None else held_out[1]
    return Curve(
        np.asarray(values),
        np.asarray(losses, dtype=float),
        (steps, on_slice),
        None,
        ended,
        0,
        "ramp",
    )


def valley_curve(low_from=1e-3, low_at=0.1, edge=1.0, start=2.3, lowest=0.5, values=VALUES):
    """Flat at `start` to low_from, a straight line (in log) down to `lowest` at low_at, flat to the
    edge, then up steeply.
    """
    place = np.log10(values)
    falling = np.interp(
        place, np.log10([values[0], low_from, low_at, edge]), [start, start, lowest, lowest]
    )
    return falling + np.where(values > edge, 40 * (place - np.log10(edge)), 0.0)


def test_smoothing_keeps_a_constant_and_does_not_shift_a_line():
    assert smoothed(np.full(50, 1.7), 0.9) == pytest.approx(1.7)
    line = np.linspace(3, 1, 101)
    middle = slice(30, 71)
    assert smoothed(line, 0.7)[middle] == pytest.approx(line[middle], abs=1e-3)


def test_smoothing_is_a_weighted_mean_of_what_lies_on_both_sides():
    losses, strength = np.array([2.0, 1.9, 1.7, 1.8, 1.5, 1.4, 1.45]), 0.6
    expected = [
        np.average(np.minimum(losses, 1.8), weights=strength ** np.abs(np.arange(7) - place))
        for place in range(7)
    ]
    assert smoothed(losses, strength) == pytest.approx(expected), (
        "cut at the median of its beginning, 1.8"
    )


def test_spikes_of_one_or_two_steps_are_taken_out_and_falls_are_not():
    losses = np.linspace(2, 1, 40) + 0.01 * np.sin(np.arange(40))
    spiky = losses.copy()
    spiky[[3, 4, 20]] *= 10
    assert np.abs(without_spikes(spiky) - losses).max() < 0.1
    step = np.where(np.arange(40) < 20, 2.0, 1.0)
    assert (without_spikes(step) == step).all()


def test_every_rule_on_a_curve_whose_answer_is_known():
    reading = read(curve_of(valley_curve()), BASELINES, "train")
    assert not reading.reason
    assert 1e-3 < reading.rules["steepest"] < 0.1
    # the fall runs over two decades: two thirds into it lies 10 ** (-3 + 4 / 3)
    assert reading.rules["valley"] == pytest.approx(10 ** (-3 + 4 / 3), rel=0.3)
    assert 0.01 < reading.rules["minimum / 10"] < 0.1
    assert reading.edge == pytest.approx(1.0, rel=0.15)
    assert reading.rules["edge / 10"] == pytest.approx(reading.edge / 10)


def test_the_fall_to_the_floor_is_not_taken_for_learning():
    """A steep fall at 1e-4 down to 0.325 nats, the bias alone; then a gentler one, which is
    learning.
    """
    place = np.log10(VALUES)
    losses = np.interp(
        place, [-6, -4.2, -3.8, -2.5, -1, 0], [0.693, 0.693, 0.325, 0.325, 0.15, 0.15]
    )
    losses += np.where(place > 0, 5 * place, 0.0)
    blind, seeing = (
        read(curve_of(losses), baselines, "train")
        for baselines in (BASELINES, BaselineLosses(train=0.325))
    )
    assert blind.rules["steepest"] < 3e-4
    assert 10**-2.5 < seeing.rules["steepest"] < 0.1 and 10**-2.5 < seeing.rules["valley"] < 0.1
    assert seeing.edge == pytest.approx(blind.edge, rel=0.2)


def test_a_ramp_that_comes_no_further_than_the_floor_has_an_edge_and_nothing_else():
    place = np.log10(VALUES)
    losses = np.interp(place, [-6, -4, -2, -1, 0], [0.7, 0.7, 0.325, 0.325, 0.9])
    reading = read(curve_of(losses), BaselineLosses(train=0.325), "train")
    assert not reading.reason and reading.edge == pytest.approx(0.11, rel=0.3)
    assert [rule for rule, value in reading.rules.items() if value] == ["edge / 10"]


@pytest.mark.parametrize(
    "losses, baselines, said",
    [
        (np.full(200, 2.3), BASELINES, "never falls clearly below its start"),
        (np.full(200, 0.0), BASELINES, "never falls clearly below its start"),
        (
            np.where(np.arange(200) < 80, 0.693, 0.325),
            BaselineLosses(train=0.325),
            "the baseline loss of 0.325 nats",
        ),
        (np.full(200, np.nan), BASELINES, "only 0 points"),
        (np.geomspace(2.3, 1e9, 200), BASELINES, "never falls clearly below its start"),
    ],
    ids=["constant", "zero", "stuck at the floor", "no number", "only ever up"],
)
def test_what_says_nothing_gives_its_reason(losses, baselines, said):
    reading = read(curve_of(losses), baselines, "train")
    assert said in reading.reason and reading.edge is None and set(reading.rules.values()) == {None}


@pytest.mark.parametrize("num_points", [40, 200])
def test_mere_noise_says_nothing(num_points):
    """Of 300 ramps of noise around one level, none is read."""
    draws = np.random.default_rng(0)
    values = np.geomspace(1e-6, 10, num_points)
    read_anyway = [
        not read(
            curve_of(2.3 + 0.2 * draws.standard_normal(num_points), values), BASELINES, "train"
        ).reason
        for _ in range(300)
    ]
    assert sum(read_anyway) <= 3


@pytest.mark.parametrize("num_points", [44, 200])
def test_a_noisy_curve_says_what_the_noise_free_one_says(num_points):
    values = np.geomspace(1e-6, 10, num_points)
    calm = valley_curve(values=values)
    draws = np.random.default_rng(1)
    edges = [
        read(
            curve_of(calm + 0.1 * draws.standard_normal(num_points), values), BASELINES, "train"
        ).edge
        for _ in range(50)
    ]
    assert None not in edges
    assert np.quantile(edges, [0.1, 0.9]) == pytest.approx([1.0, 1.0], rel=0.5)


def test_a_step_that_was_no_number_ends_the_curve_there():
    losses = valley_curve()
    losses[150:] = np.nan
    reading = read(curve_of(losses, ended="not a number"), BASELINES, "train")
    assert reading.edge == pytest.approx(VALUES[149], rel=0.1) and reading.edge <= VALUES[149]


def test_both_curves_are_read_and_one_stands_in_for_the_other():
    losses = valley_curve()
    steps = np.arange(0, 200, 4)
    alike = curve_of(losses, held_out=(steps, losses[steps]))
    both, train, held_out = (
        read(alike, BASELINES, which) for which in ("both", "train", "heldout")
    )
    assert both.edge == pytest.approx(np.sqrt(train.edge * held_out.edge))
    flat = replace(alike, losses=np.full(200, 2.3))
    assert read(flat, BASELINES, "both") == held_out
    assert read(replace(flat, held_out=(steps, np.full(50, 2.3))), BASELINES, "both").reason


def test_the_held_out_curve_has_the_values_of_its_steps():
    curve = curve_of(np.arange(200.0), held_out=(np.array([3, 7]), np.array([1.0, np.nan])))
    values, losses = series(curve, "heldout")
    assert list(values) == [VALUES[3]] and list(losses) == [1.0]


@settings(max_examples=40)
@given(factor=st.floats(1e-3, 1e3), edge=st.floats(0.2, 5.0), noise=st.floats(0, 0.05))
def test_values_in_other_units_move_every_rule_alike(factor, edge, noise):
    losses = valley_curve(edge=edge) + noise * np.random.default_rng(0).standard_normal(200)
    one = read(curve_of(losses), BASELINES, "train")
    other = read(curve_of(losses, VALUES * factor), BASELINES, "train")
    assert other.edge == pytest.approx(factor * one.edge)
    assert dict(other.rules) == pytest.approx(
        {rule: factor * value for rule, value in one.rules.items()}
    )


@settings(max_examples=40)
@given(shift=st.floats(0, 5), edge=st.floats(0.2, 5.0), noise=st.floats(0, 0.05))
def test_a_constant_above_the_loss_changes_nothing(shift, edge, noise):
    losses = valley_curve(edge=edge) + noise * np.random.default_rng(0).standard_normal(200)
    one = read(curve_of(losses), BaselineLosses(train=2.0), "train")
    other = read(curve_of(losses + shift), BaselineLosses(train=2.0 + shift), "train")
    assert other.edge == pytest.approx(one.edge) and dict(other.rules) == pytest.approx(
        dict(one.rules)
    )


@settings(max_examples=40)
@given(st.lists(st.floats(0.1, 10), min_size=0, max_size=5), st.integers(0, 5))
def test_a_spread_is_of_the_seeds_that_found_a_value(found, num_nothing):
    made = spread([*found, *[None] * num_nothing])
    if len(found) <= num_nothing:
        assert made is None
    else:
        assert (made.lowest, made.highest, made.num_seeds) == (min(found), max(found), len(found))
        assert made.median == pytest.approx(np.median(found))


def test_the_strength_of_the_smoothing_grows_with_the_curve():
    strengths = [smoothing_for(count) for count in (0, 10, 20, 44, 200, 1000)]
    assert strengths == sorted(strengths) and strengths[0] == 0 and strengths[-1] < 1
