"""The decision over ramps, probes and the race, on problems whose answer is known."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.range_trials import bowl, descend, drawn, network
from trainer.lr_finder.candidates import (
    CandidateGrid,
    CandidateSearch,
    Lengths,
    decide,
    lengths_for,
    probe,
)
from trainer.lr_finder.rules import BaselineLosses

SEEDS = (0, 1, 2)
LARGE = replace(lengths_for(100_000), num_run_steps=0)  # a run as long as the race
SMALL = replace(lengths_for(396), num_run_steps=0)
BASELINES = BaselineLosses()


def decided(trial, lengths=LARGE, low=1e-6, high=10.0, baselines=BASELINES, seeds=SEEDS, **options):
    values = np.geomspace(low, high, lengths.num_ramp_steps)
    return decide(
        trial, seeds, values, baselines, lengths, np.ones(lengths.num_race_steps), **options
    )


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    "curvatures",
    [[1.0], [1, 2, 5], [0.1, 3, 10], np.geomspace(1, 1000, 20), np.geomspace(0.02, 2, 8)],
)
def test_the_largest_stable_value_of_a_bowl(curvatures, noise):
    """SGD on a quadratic bowl is stable below 2 / its largest curvature."""
    found = decided(bowl(curvatures, noise), low=1e-6, high=1e3)
    limit = 2 / max(curvatures)
    assert found.stable == pytest.approx(limit, rel=0.1) and found.unstable == pytest.approx(
        limit, rel=0.1
    )
    assert found.stable <= limit * 1.01 and found.unstable >= limit * 0.99


def logistic(seed=0, num_images=300, num_features=8):
    """A noise-free logistic regression on points of which a sixth has the wrong label: (loss,
    gradient).
    """
    draws = np.random.default_rng(seed)
    images = draws.standard_normal((num_images, num_features)) * np.geomspace(1, 0.2, num_features)
    labels = np.sign(images @ draws.standard_normal(num_features)) * np.where(
        draws.random(num_images) < 1 / 6, -1, 1
    )

    def loss_of(weights):
        return float(np.mean(np.logaddexp(0, -labels * (images @ weights))))

    def gradient_of(weights):
        wrong = 1 / (1 + np.exp(np.clip(labels * (images @ weights), -500, 500)))
        return -(images.T @ (labels * wrong)) / num_images

    return loss_of, gradient_of


@pytest.mark.parametrize("data", range(5))
def test_the_recommended_rate_trains_a_logistic_regression_as_fast_as_the_best_of_a_grid(data):
    loss_of, gradient_of = logistic(data)

    def trial(seed, values, purpose):
        return descend(
            np.random.default_rng(seed).standard_normal(8) * 3,
            loss_of,
            gradient_of,
            values,
            seed,
            purpose,
        )

    found = decided(trial, low=1e-4, high=1e4)
    assert found.value is not None, found.reason

    def after_200(rate):
        return loss_of_end(trial(0, np.full(200, rate), "race"))

    grid = [after_200(rate) for rate in np.geomspace(1e-3, 1e3, 12)]
    assert after_200(found.value) <= 1.1 * min(grid)


@pytest.mark.parametrize("data", range(5))
def test_so_it_does_by_the_lengths_of_such_a_run(data):
    """A run of 200 steps has races of 40: the recommended rate is a share of their best."""
    loss_of, gradient_of = logistic(data)

    def trial(seed, values, purpose):
        return descend(np.zeros(8), loss_of, gradient_of, values, seed, purpose)

    found = decided(trial, lengths_for(200), low=1e-4, high=1e4)
    ends = [
        loss_of_end(trial(0, np.full(200, rate), "race"))
        for rate in (*np.geomspace(1e-3, 1e3, 12), found.value)
    ]
    assert ends[-1] <= 1.1 * min(ends)


def test_a_long_run_takes_a_smaller_rate_than_a_short_race_and_other_numbers_stay():
    shares = [lengths_for(steps).horizon_share for steps in (40, 80, 396, 100_000)]
    assert shares == pytest.approx([1, (1 / 2) ** (1 / 3), (44 / 396) ** (1 / 3), 1 / 3])
    trial, lengths = drawn(network(), noise=0.05), lengths_for(396)
    one, other = decided(trial, lengths), decided(trial, lengths, is_rate=False)
    share = lengths.horizon_share
    assert one.value == pytest.approx(other.value * share) and "suits a run of 396" in one.reason
    assert one.interval.lowest == pytest.approx(other.interval.lowest * share)
    assert other.value == decided(trial, SMALL).value


def loss_of_end(curve):
    return curve.held_out[1][-1] if curve.ended == "ramp" else np.inf


@pytest.mark.parametrize("lengths", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("best", [0.003, 0.05, 0.4])
def test_the_race_finds_the_best_value_of_a_made_up_network(lengths, best):
    found = decided(drawn(network(best), noise=0.1), lengths)
    assert found.value is not None, found.reason
    assert best / 2.5 <= found.value <= best * 2.5


@pytest.mark.parametrize("lengths", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("spiked", [(0,), (1, 2), (0, 3), (2, 5, 8), (1, 4, 5, 9)])
def test_early_spikes_do_not_move_the_recommendation(lengths, spiked):
    calm = drawn(network(), noise=0.05)

    def spiky(seed, values, purpose):
        curve = calm(seed, values, purpose)
        losses = curve.losses.copy()
        losses[list(spiked)] *= 10
        return replace(curve, losses=losses)

    one, other = decided(calm, lengths), decided(spiky, lengths)
    assert one.value is not None, one.reason
    assert other.value == pytest.approx(one.value, rel=0.2), other.reason


def test_no_number_from_a_step_on_keeps_what_was_measured():
    """Above 0.1 every loss is NaN: the race goes on below it."""

    def trial(seed, values, purpose):
        curve = drawn(network(), noise=0.02)(seed, values, purpose)
        good = int(np.sum(np.asarray(values) <= 0.1))
        if good == len(values):
            return curve
        steps, held_out = curve.held_out
        kept = steps < good
        losses = np.append(curve.losses[:good], np.nan)
        return replace(
            curve,
            values=curve.values[: good + 1],
            losses=losses,
            held_out=(steps[kept], held_out[kept]),
            ended="not a number",
        )

    found = decided(trial)
    assert found.value is not None and found.value <= 0.1, found.reason
    assert found.edge.highest <= 0.1 and 0.09 < found.stable <= 0.1 < found.unstable
    assert all(len(curve.losses) > 100 for curve in found.curves if curve.purpose == "ramp")


def nothing_but_noise(seed, values, purpose):
    return drawn(lambda value, seed: 2.3, noise=0.2)(seed, values, purpose)


def stuck_at_the_floor(value, seed):
    return 0.693 if value < 1e-4 else 0.325


@pytest.mark.parametrize(
    "loss_at, baselines, said",
    [
        (lambda value, seed: 2.3, BASELINES, "no candidate ends clearly below 2.3 nats"),
        (stuck_at_the_floor, BaselineLosses(0.325, 0.325), "the baseline loss of 0.325 nats"),
        (network(best=30.0, edge=1e9), BASELINES, "try a larger to="),
    ],
    ids=["constant", "stuck at the floor", "edge outside"],
)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_no_reliable_suggestion_and_why(loss_at, baselines, said, noise):
    found = decided(drawn(loss_at, noise, rate=0.4), baselines=baselines)
    assert (
        found.value is None
        and found.reason.startswith("no reliable suggestion: ")
        and said in found.reason
        and re.search(r"; try .*(steps|from|to)=", found.reason)  # what to do next
    )


def test_where_the_trials_end_before_the_loss_turns_up_the_range_to_go_on_in_is_named():
    few = replace(LARGE, num_candidates=2)
    for best, end in ((2.0, "from="), (1e-5, "to=")):
        found = decided(parabola(best, bend=0.02), few)
        assert found.value is None
        tried = [one.value for one in found.candidates]
        named = float(re.search(rf"try {end}([\d.e-]+)", found.reason)[1])
        assert named < min(tried) * 1.01 if end == "from=" else named > max(tried) * 0.99


@pytest.mark.parametrize("lengths", [LARGE, SMALL], ids=["large", "small"])
def test_mere_noise_has_no_suggestion(lengths):
    assert decided(nothing_but_noise, lengths).value is None


def test_a_ramp_that_begins_beyond_the_edge_asks_for_a_smaller_start():
    found = decided(drawn(network(best=1e-8), rate=0.3))
    assert found.value is None


@pytest.mark.parametrize("num_run_steps", [10, 396, 2_000, 100_000])
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
def test_never_more_steps_than_said_before(num_run_steps, num_seeds):
    lengths = lengths_for(num_run_steps, num_seeds)
    taken = []

    def trial(seed, values, purpose):
        taken.append(len(values))
        return drawn(network(), noise=0.1)(seed, values, purpose)

    seeds = tuple(range(num_seeds + lengths.num_more_seeds))
    found = decided(trial, lengths, seeds=seeds)
    assert sum(taken) <= lengths.most_steps
    assert len(found.curves) == len(taken)


def test_large_data_take_200_steps_a_ramp_and_small_ones_no_more_than_a_run_or_so():
    assert LARGE.num_ramp_steps == 200 and LARGE.num_seeds == 3
    assert SMALL.most_steps < 2.5 * 396
    assert lengths_for(396, 3, 100).num_ramp_steps == 100


@settings(max_examples=15)
@given(factor=st.floats(1e-2, 1e2), best=st.floats(0.01, 0.3))
def test_other_units_move_the_suggestion_alike(factor, best):
    plain = drawn(network(best), noise=0.05)

    def scaled(seed, values, purpose):
        curve = plain(seed, np.asarray(values) / factor, purpose)
        return replace(curve, values=np.asarray(values)[: len(curve.losses)])

    one, other = decided(plain, SMALL), decided(scaled, SMALL, 1e-6 * factor, 10 * factor)
    assert (one.value is None) == (other.value is None)
    if one.value is not None:
        assert other.value == pytest.approx(factor * one.value)


def test_a_ladder_has_two_rungs_to_a_factor_of_three_and_even_ones_on_an_even_ramp():
    candidate_grid = CandidateGrid(np.geomspace(1e-3, 9, 50))
    assert [candidate_grid.at(index) for index in (0, 2, 4)] == pytest.approx([9, 3, 1])
    assert (
        candidate_grid.at(candidate_grid.nearest(0.35)) == pytest.approx(1 / 3)
        and candidate_grid.has(0)
        and not candidate_grid.has(-2)
    )
    assert candidate_grid.has(16) and not candidate_grid.has(18)
    even = CandidateGrid(np.linspace(0, 0.8, 30))
    assert [even.at(index) for index in (0, 2, 16)] == pytest.approx(
        [0.8, 0.7, 0.0]
    ) and not even.has(17)


def parabola(centre, scatter=(0.0, 0.0, 0.0), bend=0.3):
    """A ramp that falls around 0.05; candidates end on a parabola in the log of the value, whose
    lowest point each seed has elsewhere by a factor 3 ** scatter.
    """

    def trial(seed, values, purpose):
        curve = drawn(network(), noise=0.02)(seed, values, purpose)
        if purpose != "race":
            return curve
        place = np.log(max(values) / centre) / np.log(3) - scatter[seed]
        return replace(curve, held_out=(curve.held_out[0][-1:], np.array([1 + bend * place**2])))

    return trial


@pytest.mark.parametrize("centre", [0.02, 0.03, 0.0411, 0.0413, 0.06, 0.071, 0.0712, 0.0714])
def test_the_answer_is_the_parabolas_lowest_point_wherever_it_lies_between_candidates(centre):
    """A tie between two candidates, at 0.0713, is settled in their middle and not by a factor 3."""
    found = decided(parabola(centre), SMALL)
    assert found.value == pytest.approx(centre, rel=0.05), found.reason


def test_rounding_moves_the_answer_no_further_than_itself():
    """Other threads sum in another order: a loss that is off by a thousandth."""
    calm = parabola(0.0713)

    def rounded(seed, values, purpose):
        curve = calm(seed, values, purpose)
        draws = np.random.default_rng([seed, int(1e6 * max(values))])
        steps, losses = curve.held_out
        return replace(curve, held_out=(steps, losses * (1 + 1e-3 * draws.standard_normal())))

    assert decided(rounded, SMALL).value == pytest.approx(decided(calm, SMALL).value, rel=0.02)


def test_the_winner_and_its_neighbours_are_tried_on_every_seed_and_the_mean_decides():
    """Alone the seeds have 0.049, 0.07 and 0.1."""
    found = decided(parabola(0.07, scatter=(-1 / 3, 0.0, 1 / 3)), SMALL)
    on_all = [one for one in found.candidates if len(one.losses) == 3]
    assert len(on_all) >= 3 and all(len(one.losses) in (1, 3) for one in found.candidates)
    assert found.value == pytest.approx(0.07, rel=0.02)
    assert found.interval.lowest == pytest.approx(0.07 / 3 ** (1 / 3), rel=0.02)
    assert found.interval.highest == pytest.approx(0.07 * 3 ** (1 / 3), rel=0.02)
    assert found.interval.num_seeds == 3


def test_where_other_seeds_move_the_winner_its_new_neighbour_is_tried_too():
    found = decided(parabola(0.04, scatter=(-0.45, 0.3, 0.3)), SMALL)
    best = min((one for one in found.candidates if len(one.losses) == 3), key=lambda one: one.mean)
    assert best.value == pytest.approx(10 / 3**5)
    assert found.value == pytest.approx(0.04 * 3**0.05, rel=0.05), found.reason


def test_seeds_that_disagree_give_no_suggestion_and_say_how_far_they_do():
    found = decided(parabola(0.04, scatter=(0.0, -1.0, 0.9)), SMALL)
    assert found.value is None and "no reliable suggestion: the seeds disagree" in found.reason
    assert found.interval.highest > 3 * found.interval.lowest
    assert f"{found.interval.lowest:.3g} to {found.interval.highest:.3g}" in found.reason


@pytest.mark.parametrize(
    ("scatter", "num_seeds"),
    [
        ((0.1, 0.0, -0.1, 0.0, 0.0), 3),
        ((0.3, 0.0, -0.2, 0.05, 0.05), 4),
        ((0.3, 0.0, -0.3, 0.3, -0.2), 5),
    ],
)
def test_seeds_that_do_not_agree_well_are_joined_by_others(scatter, num_seeds):
    """Three agree; three leave the mean uncertain by a fifth of a step, and it takes one more or
    two.
    """
    found = decided(parabola(0.05, scatter), SMALL, seeds=range(5))
    assert found.interval.num_seeds == num_seeds
    expected = 0.05 * 3 ** np.mean(scatter[:num_seeds])
    assert found.value == pytest.approx(expected, rel=0.02), found.reason
    assert len({curve.seed for curve in found.curves if curve.purpose == "ramp"}) == 2


def test_edges_of_seeds_that_lie_apart_only_widen_where_candidates_start():
    def edges(seed, values, purpose):
        apart = network(best=0.05 * 10.0**seed / 10)
        return drawn(apart if purpose == "ramp" else network(0.05), 0.02, 0.4)(
            seed, values, purpose
        )

    found = decided(edges)
    assert found.edge.highest > 10 * found.edge.lowest
    assert found.value is not None and 0.05 / 2.5 < found.value < 0.05 * 2.5, found.reason


@pytest.mark.parametrize("lengths", [LARGE, SMALL], ids=["large", "small"])
def test_beside_a_cliff_the_answer_lies_below_the_candidate_that_stands_on_its_edge(lengths):
    """All that is above 0.05 diverges; below it the loss falls steadily."""

    def trial(seed, values, purpose):
        curve = drawn(network(0.05), 0.02)(seed, values, purpose)
        steps, _ = curve.held_out
        end = 1.0 - 0.2 * np.log10(max(values))
        is_over = max(values) > 0.05
        return (
            replace(curve, held_out=(steps, np.full(len(steps), end)), ended="diverged")
            if is_over and purpose == "race"
            else replace(curve, held_out=(steps[-1:], np.array([end])))
            if purpose == "race"
            else curve
        )

    found = decided(trial, lengths)
    assert found.value is not None, found.reason
    assert 10 / 3**5.5 < found.value < 10 / 3**5, "half a step below 0.0412 at most"


def test_the_reason_says_what_the_table_says():
    found = decided(parabola(0.06, scatter=(-0.2, 0.0, 0.2)), SMALL)
    on_all = {one.value: one.mean for one in found.candidates if len(one.losses) == 3}
    best = min(on_all, key=on_all.get)
    assert f"of {len(on_all)} candidates trained for 44 steps on 3 seeds" in found.reason
    assert f"{best:.3g} ends lowest in the mean at {on_all[best]:.4f}" in found.reason
    for factor in (1 / 3, 3):
        value = next(value for value in on_all if value == pytest.approx(best * factor))
        assert f"{value:.3g} at {on_all[value]:.4f}" in found.reason
    assert f"lowest at {found.value:.3g}" in found.reason
    assert f"{found.interval.lowest:.3g} to {found.interval.highest:.3g}" in found.reason


def ending_at(losses):
    """Candidates that end at losses[seed] nats, and 0.3 more for each factor of three from 0.0412,
    with a cliff above it on seed 0.
    """

    def trial(seed, values, purpose):
        curve = drawn(network(), noise=0.02)(seed, values, purpose)
        if purpose != "race":
            return curve
        place = np.log(max(values) / (10 / 3**5)) / np.log(3)
        end = losses[seed] + (5.0 if place > 0.5 and not seed else 0.3 * abs(place))
        return replace(curve, held_out=(curve.held_out[0][-1:], np.array([end])))

    return trial


def test_the_mean_is_of_what_was_measured_and_what_is_compared_stands_beside_it():
    """Above 0.0412 the seeds end at 6.0, 1.31 and 1.32, of which the first counts as 2."""
    level = BaselineLosses(held_out=2.0)
    found = decided(ending_at([1.0, 1.01, 1.02]), SMALL, baselines=level, level_name="the level")
    one = next(one for one in found.candidates if one.value == pytest.approx(10 / 3**4))
    assert list(one.losses.values()) == pytest.approx([6.0, 1.31, 1.32])
    assert one.mean == pytest.approx(8.63 / 3) and one.counted == pytest.approx(4.63 / 3)
    assert one.is_cut and (found.level_nats, found.level_name) == (2.0, "the level")
    assert "a loss above 2, the level, counts as 2" in found.reason
    others = [one for one in found.candidates if one.value < 0.05]
    assert others and all(one.mean == one.counted and not one.is_cut for one in others)


def test_a_start_below_the_constant_prediction_is_the_level_and_is_called_so():
    """As of weights that were trained before: 2.3 nats, where knowing nothing costs 5."""
    found = decided(ending_at([1.0] * 3), SMALL, baselines=BaselineLosses(held_out=5.0))
    assert found.level_nats == pytest.approx(2.3) and "first step" in found.level_name


@pytest.mark.parametrize(("spread", "has_value"), [(0.01, True), (0.04, True), (0.045, False)])
def test_a_win_below_the_level_within_the_noise_of_the_seeds_is_no_answer(spread, has_value):
    """Three seeds win 0.05 + spread, 0.05 and 0.05 - spread: the standard error is spread /
    sqrt(3), so that 0.05 is twice that at 0.0433.
    """
    level = BaselineLosses(held_out=1.0)
    ends = [0.95 - spread, 0.95, 0.95 + spread]
    found = decided(ending_at(ends), SMALL, baselines=level)
    assert (found.value is not None) == has_value, found.reason
    assert ("noise between 3 seeds" in found.reason) == (not has_value)
    # where there are more seeds, these are asked
    more = decided(ending_at([*ends, 0.95, 0.95]), SMALL, baselines=level, seeds=range(5))
    assert max(len(one.losses) for one in more.candidates) > 3 or has_value


def test_too_few_images_are_named_in_place_of_more_steps():
    flat = drawn(lambda value, seed: 2.3)
    assert "more steps=" in decided(flat).reason
    reason = decided(flat, obstacle="40 images are too few").reason
    assert reason.count("40 images are too few") == 1 and "steps=" not in reason


STORED = sorted((Path(__file__).parents[2] / "results" / "lr-find").glob("*.json"))
LEVELS = {"A": -0.1 * math.log(0.1) - 0.9 * math.log(0.9)}  # BCE; else ten classes alike


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_what_was_measured_on_the_digits_still_gives_the_answers_that_were_stored(path):
    grid = CandidateGrid(np.geomspace(1e-6, 10, 44))
    for answer in json.loads(path.read_text()).values():
        search = CandidateSearch(
            trial=None,
            seeds=range(20),
            grid=grid,
            lengths=SMALL,
            shape=np.ones(44),
            level=LEVELS.get(path.name[0], math.log(10)),
        )
        for value, losses in answer["candidates"]:
            ends = {int(s): math.inf if x is None else x for s, x in losses.items()}
            search.losses[round(grid.place(value))] = ends
        value, interval, reason = search.result()
        assert value * answer["share"] == pytest.approx(answer["value"], rel=2e-3), reason
        assert interval.num_seeds == answer["interval"]["num_seeds"]


def test_one_seed_has_an_answer_and_no_interval_is_claimed():
    found = decided(parabola(0.06), SMALL, seeds=(0,))
    assert found.value == pytest.approx(0.06, rel=0.05) and found.interval.num_seeds == 1
    assert "seed" not in found.reason


def test_probes_find_nothing_unstable_where_nothing_is():
    always_down = drawn(lambda value, seed: 1.0 if value else 2.0)
    stable, unstable = probe(always_down, 0, CandidateGrid(np.geomspace(1e-3, 10, 50)), 1.0, LARGE)
    assert 1.4 < stable <= 1.5 and unstable is None


@pytest.mark.parametrize(
    "values", [np.linspace(0, 0.99, 40), np.geomspace(0.01, 0.99, 40)], ids=["even", "equal ratios"]
)
def test_no_trial_leaves_the_ramps_own_range(values):
    """A momentum of 1 or more would be refused by its page: here the edge lies just below."""
    asked = []

    def trial(seed, given, purpose):
        asked.extend(given)
        return drawn(network(best=0.5, width=0.3, edge=1.8), noise=0.02, rate=0.4)(
            seed, given, purpose
        )

    lengths = replace(lengths_for(2000, 3, 40), num_run_steps=0)
    found = decide(
        trial, SEEDS, values, BASELINES, lengths, np.ones(lengths.num_race_steps), is_rate=False
    )
    assert min(asked) >= values[0] and max(asked) <= values[-1]
    assert found.value == pytest.approx(0.5, rel=0.5), found.reason


def test_lengths_count_every_trial():
    lengths = Lengths(3, 50, 4, 20, 5, 2, 60)
    assert lengths.most_steps == 2 * 50 + 4 * 20 + 7 * 60
