"""Main effects and interactions of full designs, against repeated-measures ANOVA and plain sums."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.weightstats import DescrStatsW

from support.tabled import cell, table_of
from trainer.report.effects import levels_of

LOSSES, MIXES = ("BCE", "CE"), ("both", "none")


def two_by_two(scores, **facts):
    """scores: [loss, mix, seed]."""
    return {
        cell(
            f"{loss}, {mix}", levels=(("loss", loss), ("mix", mix)), is_base=not (a or b), **facts
        ): dict(enumerate(scores[a][b]))
        for a, loss in enumerate(LOSSES)
        for b, mix in enumerate(MIXES)
    }


def test_a_two_by_two_is_that_of_a_repeated_measures_anova():
    """Seeds are the subjects: of one degree of freedom, F is the square of t."""
    rng = np.random.default_rng(2)
    scores = rng.normal([[[90.0], [93.0]], [[91.0], [99.0]]], 1.5, (2, 2, 5)) + rng.normal(0, 3, 5)
    table = table_of(two_by_two(scores), seeds=range(5))
    lines = [
        {"loss": a, "mix": b, "seed": seed, "score": scores[a, b, seed]}
        for a, b, seed in np.ndindex(2, 2, 5)
    ]
    anova = AnovaRM(pd.DataFrame(lines), "score", "seed", within=["loss", "mix"]).fit().anova_table
    found = {effect.factors: effect for effect in table.effects}
    assert list(found) == ["loss", "mix", "loss × mix"]
    for name, row in (("loss", "loss"), ("mix", "mix"), ("loss × mix", "loss:mix")):
        difference = found[name].difference
        t = difference.value / difference.standard_error
        assert [t**2, difference.p] == pytest.approx([*anova.loc[row, ["F Value", "Pr > F"]]])
        assert (difference.num_pairs, difference.dof) == (5, anova.loc[row, "Den DF"])
    assert found["loss"].difference.value == pytest.approx((scores[1] - scores[0]).mean())
    assert found["loss × mix"].difference.value == pytest.approx(
        (scores[1, 1] - scores[0, 1] - scores[1, 0] + scores[0, 0]).mean()
    )


def test_an_interaction_that_no_difference_to_the_base_says():
    """Swapping the norm costs 25 points under one loss and 3 under the other."""
    scores = np.array([[[95.0, 96, 97], [69.5, 71, 71]], [[95.0, 96, 96], [92.0, 92.5, 92.6]]])
    (_, _, effect) = table_of(two_by_two(scores)).effects
    assert effect.name == "(CE − BCE) at none − at both"
    low, _ = effect.difference.interval
    assert effect.difference.value == pytest.approx(22.2) and low > 10 and effect.p_holm < 0.05


def test_each_effect_of_more_levels_and_factors_is_its_sum_over_all_others():
    """Two by three by two: 1 + 2 + 1 main effects, 2 + 1 + 2 interactions, all held together."""
    rng = np.random.default_rng(4)
    scores = rng.normal(90, 2, (2, 3, 2, 4))
    names = (("a0", "a1"), ("b0", "b1", "b2"), ("c0", "c1"))
    cells = {
        cell(
            " ".join(names[axis][at] for axis, at in enumerate(place)),
            levels=tuple((("a", "b", "c")[axis], names[axis][at]) for axis, at in enumerate(place)),
            is_base=not any(place),
        ): dict(enumerate(scores[place]))
        for place in np.ndindex(2, 3, 2)
    }
    effects = {
        (effect.factors, effect.name): effect for effect in table_of(cells, seeds=range(4)).effects
    }
    assert len(effects) == 9
    interaction = (scores[1, 2] - scores[0, 2] - scores[1, 0] + scores[0, 0]).mean(0)
    for key, sums in {
        ("b", "b2 − b0"): (scores[:, 2] - scores[:, 0]).mean((0, 1)),
        ("a × b", "(a1 − a0) at b2 − at b0"): interaction,
    }.items():
        found, expected = effects[key].difference, DescrStatsW(sums)
        assert found.value == pytest.approx(expected.mean)
        assert found.interval == pytest.approx(expected.tconfint_mean(0.05 / 9))


def test_seeds_that_a_cell_lacks_are_left_out_and_counted():
    cells = two_by_two(np.arange(16.0).reshape(2, 2, 4) ** 1.5)
    last = list(cells)[-1]
    cells[last] = {seed: value for seed, value in cells[last].items() if seed in (1, 2)}
    table = table_of(cells, seeds=range(4))
    assert [effect.difference.num_pairs for effect in table.effects] == [2, 2, 2]
    empty = table_of(cells | {last: {}}, seeds=range(4))
    assert [effect.difference for effect in empty.effects] == [None, None, None]


def test_a_design_that_is_not_full_has_no_effects():
    of = [(("a", "0"), ("b", "0")), (("a", "1"), ("b", "0")), (("a", "0"), ("b", "1"))]
    one_at_a_time = [cell(f"c{place}", levels=levels) for place, levels in enumerate(of)]
    assert levels_of(one_at_a_time) == {}
    assert levels_of([cell("x", levels=(("a", "0"),)), cell("y", levels=(("a", "1"),))]) == {}
    assert levels_of([cell("x"), cell("y")]) == {}


def test_groups_have_their_own_effects_and_are_held_together():
    scores = np.random.default_rng(8).normal(90, 2, (2, 2, 2, 3))
    cells = {
        cell(
            f"{one.name} ({model})", f"{model} on digits", levels=one.levels, is_base=one.is_base
        ): values
        for model, part in zip(("resnet18", "resnet50"), scores, strict=True)
        for one, values in two_by_two(part).items()
    }
    effects = table_of(cells).effects
    assert [effect.group for effect in effects] == ["resnet18 on digits"] * 3 + [
        "resnet50 on digits"
    ] * 3
    sums = DescrStatsW((scores[1, 1] - scores[1, 0]).mean(0))
    assert effects[3].difference.interval == pytest.approx(sums.tconfint_mean(0.05 / 6))
