"""The numbers of an ablation's table, its marks, remarks and warnings; no seed is left out
silently.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from support.tabled import SEEDS, asked, cell, row, table_of
from trainer.base.errors import UserError
from trainer.report.formats import as_markdown
from trainer.report.latex import as_latex
from trainer.report.notes import facts_of, remarks, warnings
from trainer.report.tables import METRICS, find_metric, summarize, value_of
from trainer.report.view import make_view

BASE, SAME, BETTER = cell("base", is_base=True), cell("same"), cell("better")


def only(table, name):
    (found,) = [one for one in table.cells if one.cell.name == name]
    return found


def test_a_table_has_means_spreads_and_differences_to_the_base():
    table = table_of({BASE: {0: 90.0, 1: 92.0, 2: 91.0}, BETTER: {0: 93.0, 1: 96.0, 2: 94.5}})
    base, better = table.cells
    assert (base.mean, base.std, base.difference, base.p_holm) == (91.0, 1.0, None, None)
    assert better.difference.value == pytest.approx(3.5) and better.difference.kind == "paired"
    assert better.p_holm == better.difference.p == pytest.approx(0.0067, abs=1e-4)
    assert better.needed.origin == "measured" and better.needed.num_seeds == 5
    assert not warnings(table) and not base.marks and not better.marks


def test_holm_corrects_across_all_groups():
    other = [
        cell("base b", "resnet50 on digits", is_base=True),
        cell("worse b", "resnet50 on digits"),
    ]
    values = {0: 90.0, 1: 92.0, 2: 91.0}
    table = table_of({
        BASE: values, BETTER: {0: 93.0, 1: 96.0, 2: 94.5},
        other[0]: values, other[1]: {0: 80.0, 1: 70.0, 2: 95.0},
    })  # fmt: skip
    assert only(table, "better").p_holm == pytest.approx(2 * only(table, "better").difference.p)
    assert only(table, "worse b").difference.value == pytest.approx(
        -28 / 3
    )  # to its own group's base
    assert table.num_compared == 2 and table.bases == ("base", "base b")
    assert "Bonferroni's level for the 2 comparisons" in " ".join(remarks(table))


def test_seeds_without_a_value_are_marked_warned_of_and_in_no_mean():
    values = {BASE: {0: 90.0, 1: 92.0, 2: 91.0}, BETTER: {0: 93.0, 1: None}, SAME: {}}
    table = table_of(values, errors={("same", 0): "RuntimeError: boom"})
    better, same = only(table, "better"), only(table, "same")
    assert [result.state for result in better.seeds] == ["finished", "diverged", "missing"]
    assert better.mean == 93.0 and better.std is None and better.costs is not None
    assert better.marks == (
        "no row: seed 2",
        "diverged: seed 1",
        "n = 1",
        "difference over the common seed 0",
    )
    assert [result.state for result in same.seeds] == ["failed", "missing", "missing"]
    assert (same.mean, same.difference, same.costs) == (None, None, None)
    assert same.marks == ("failed: seed 0", "no row: seeds 1, 2")
    text = " ".join(warnings(table))
    assert "1 of 9 runs failed, excluded from the mean: same seed 0." in text
    assert "1 of 9 runs diverged, excluded from the mean: better seed 1." in text
    assert "3 of 9 runs without a row: better seed 2, same seed 1, same seed 2." in text


def test_all_seeds_without_a_row_are_one_mark():
    assert only(table_of({BASE: {0: 90.0}, SAME: {}}), "same").marks == ("no row: all",)


def test_a_failure_counts_only_where_there_is_no_row():
    table = table_of({BASE: {0: 90.0, 1: 91.0}}, seeds=(0, 1), errors={("base", 0): "an old one"})
    assert [result.state for result in table.cells[0].seeds] == ["finished", "finished"]


def test_one_seed_has_no_interval_and_the_remark_says_what_a_seed_does():
    table = table_of({BASE: {0: 95.0}, BETTER: {0: 96.0}}, seeds=(0,))
    better = only(table, "better")
    assert (
        better.difference.kind == "single"
        and better.difference.low is None
        and better.p_holm is None
    )
    text = " ".join(remarks(table))
    assert "One seed" in text and "0.10 points" in text and "100 seeds" in text
    assert "1.18 on 360 images" in text  # 0.10 * sqrt(50000 / 360)
    assert better.needed.origin == "published" and better.needed.std == pytest.approx(
        0.1 * math.sqrt(50_000 / 360)
    )
    assert better.needed.num_seeds == 23 and "Seeds needed" in text and "from RSB" in text


def test_on_imagenets_val_set_the_published_spread_is_not_scaled():
    facts = {"num_val_images": 50_000}
    table = table_of({BASE: {0: 79.0}, BETTER: {0: 79.3}}, seeds=(0,), base=facts, better=facts)
    assert only(table, "better").needed.std == pytest.approx(0.10)
    assert not [line for line in remarks(table) if "scaled to this val set" in line]


def test_a_single_value_among_others_borrows_their_spread():
    table = table_of({BASE: {0: 90.0, 1: 92.0, 2: 91.0}, BETTER: {0: 93.0}})
    assert only(table, "better").needed.origin == "pooled"
    assert only(table, "better").needed.std == pytest.approx(1.0)


def test_two_seeds_do_not_plan_by_their_own_spread():
    """One degree of freedom: differences of 3.0 and 3.1 would ask for two seeds."""
    table = table_of({BASE: {0: 90.0, 1: 92.0}, BETTER: {0: 93.0, 1: 95.1}}, seeds=(0, 1))
    assert only(table, "better").needed.origin == "pooled"
    assert only(table, "better").needed.num_seeds > 20


def test_cells_that_are_all_at_the_majority_class_are_warned_of():
    facts = {"majority_pct": 40.0, "num_val_images": 100}
    cells = {"base": facts, "better": facts}
    near = table_of({BASE: {0: 40.0, 1: 41.0}, BETTER: {0: 42.0, 1: 39.0}}, (0, 1), **cells)
    assert any("most frequent class has top-1 of 40.0 %" in line for line in warnings(near))
    above = table_of({BASE: {0: 40.0, 1: 41.0}, BETTER: {0: 55.0, 1: 39.0}}, (0, 1), **cells)
    unknown = table_of({BASE: {0: 40.0, 1: 41.0}, BETTER: {0: 42.0, 1: 39.0}}, (0, 1))
    assert not [line for table in (above, unknown) for line in warnings(table)]


def test_a_loss_has_no_published_spread():
    table = table_of(
        {BASE: {0: 95.0}, BETTER: {0: 96.0}}, seeds=(0,), metric="loss", better={"loss_nats": 0.01}
    )
    assert only(table, "better").difference.value == pytest.approx(-0.04)
    assert only(table, "better").needed is None
    text = " ".join(remarks(table))
    assert "0.10 points" not in text and "standard error" not in text and "Loss in nats" in text


def test_values_that_are_all_equal_have_no_interval_and_are_marked():
    table = table_of(
        {
            BASE: dict.fromkeys(SEEDS, 90.0),
            SAME: dict.fromkeys(SEEDS, 90.0),
            BETTER: dict.fromkeys(SEEDS, 91.0),
        }
    )
    assert only(table, "same").difference.value == 0 and only(table, "same").needed is None
    assert only(table, "better").difference.p is None and only(table, "better").p_holm is None
    assert only(table, "better").marks == (
        "all values equal",
        "difference does not vary: no interval",
    )
    assert table.num_compared == 0


def test_pairs_that_the_base_lacks_and_welch_are_marked():
    table = table_of(
        {BASE: {0: 90.0, 1: 92.0}, BETTER: {0: 93.0, 1: 96.0, 2: 94.0}, SAME: {2: 90.0, 3: 92.5}},
        seeds=(0, 1, 2, 3),
    )
    assert "difference over the common seeds 0, 1" in only(table, "better").marks
    assert "Welch: fewer than two seeds shared with the base" in only(table, "same").marks
    assert "Welch's t-test" in " ".join(remarks(table))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_no_value(value):
    """No row can be stored with one; a table made of rows in memory does not average it either."""
    table = table_of({BASE: {0: 90.0, 1: value}}, seeds=(0, 1))
    assert table.cells[0].values == {0: 90.0}
    assert table.cells[0].marks == ("no such score: seed 1", "n = 1")
    assert "1 of 2 runs without top-1: base seed 1." in " ".join(warnings(table))


def test_metrics_are_read_from_where_they_stand():
    averaged = row("a", 0, 80.0, scored="average", other_top1_pct=70.0)
    plain = row("a", 0, 80.0, other_top1_pct=81.0, loss_nats=0.5, top5_pct=99.0)
    assert value_of(averaged, METRICS["ema"]) == 80.0 and value_of(plain, METRICS["ema"]) == 81.0
    assert value_of(row("a", 0, 80.0), METRICS["ema"]) is None
    assert [value_of(plain, METRICS[name]) for name in ("top1", "top5", "loss")] == [
        80.0,
        99.0,
        0.5,
    ]
    assert (
        value_of(row("a", 0, None), METRICS["loss"]) is None
    )  # the loss of a run on its way to nowhere
    with pytest.raises(UserError, match=r"metric=top2: unknown.*top1"):
        find_metric("top2")


def costed(*seeds, top1_pct=90.0):
    """A base whose rows have these facts, one a seed."""
    rows = {
        ("base", seed): row("base", seed, facts.pop("top1_pct", top1_pct + seed), **facts)
        for seed, facts in enumerate(map(dict, seeds))
    }
    return summarize(asked([BASE], range(len(seeds))), rows, METRICS["top1"])


def test_costs_are_medians_over_the_finished_seeds_with_their_range():
    """One seed of three that ran beside others; train s and images/s are of the same step."""
    table = costed(
        {"train_s": 253.0, "peak_mem_mib": 100.0},
        {"train_s": 241.0, "peak_mem_mib": 300.0},
        {"train_s": 1971.0, "peak_mem_mib": 120.0},
        {"train_s": 1.0, "top1_pct": None},
    )
    costs = table.cells[0].costs
    assert costs.train_s == pytest.approx(253.0)
    assert (costs.peak_mem_mib, costs.num_params) == (120.0, 23_528_522)
    assert costs.images_per_s == pytest.approx(64 * 220 / 253)
    assert costs.range_of("train_s") == pytest.approx((241.0, 1971.0))
    assert costs.range_of("peak_mem_mib") == (100.0, 300.0)
    assert costs.range_of("gmacs") == (0.08, 0.08)
    assert table_of({BASE: {}}).cells[0].costs is None


def test_a_rows_own_median_step_is_its_cost_and_not_its_mean():
    table = costed(*[{"train_s": 1971.0, "step_s": 1.1, "step_spread_share": 0.02}] * 3)
    assert table.cells[0].costs.train_s == pytest.approx(220 * 1.1)
    assert not [line for line in warnings(table) if "times compare nothing" in line]
    assert not [line for line in remarks(table) if "from before that was recorded" in line]
    alone = costed({"step_s": 1.0, "step_spread_share": 0.2})
    assert alone.cells[0].costs.range_of("train_s") == pytest.approx((198.0, 242.0))


def test_rows_without_step_times_are_told():
    (line,) = [one for one in remarks(costed({}, {"step_s": 0.6})) if "Train s" in one]
    assert "1 of 2 rows are from before that was recorded" in line


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ([{"train_s": 253.0}, {"train_s": 241.0}, {"train_s": 1971.0}], "by a factor of 8.2"),
        ([{"step_s": 1.0, "step_spread_share": 0.4}] * 2, "vary by more than a quarter"),
        ([{"step_s": 1.0, "load_per_core": 2.0}] * 2, "more processes than cores"),
        ([{"train_s": 241.0}, {"train_s": 253.0}], ""),
        ([{"step_s": 1.0, "step_spread_share": 0.1, "load_per_core": 1.0}] * 2, ""),
    ],
)
def test_runs_that_shared_their_machine_are_warned_of(seeds, told):
    lines = [line for line in warnings(costed(*seeds)) if "times compare nothing" in line]
    assert bool(lines) == bool(told) and told in " ".join(lines)


def test_seeds_are_planned_for_the_stated_difference_whatever_was_seen():
    """Equal spreads need equal numbers, one behind a difference of half a point and one of 30."""
    base = {0: 90.0, 1: 92.0, 2: 91.0}
    near = {seed: value + seed / 2 for seed, value in base.items()}
    far = {seed: value + 30 for seed, value in near.items()}
    table = table_of({BASE: base, SAME: near, BETTER: far})
    alike = [only(table, name).needed for name in ("same", "better")]
    assert alike[0] == alike[1] and alike[0].pooled_seeds == alike[0].num_seeds
    expected = math.ceil(TTestPower().solve_power(1.0 / 0.5, power=0.8, alpha=0.05 / 2))
    assert alike[0].num_seeds == expected


def test_seeds_by_a_cells_own_spread_stand_beside_those_by_the_spread_of_all():
    base = {0: 90.0, 1: 90.0, 2: 90.0}
    steady, torn = {0: 91.0, 1: 91.2, 2: 91.4}, {0: 88.0, 1: 93.0, 2: 92.0}
    table = table_of({BASE: base, SAME: steady, BETTER: torn})
    own = [only(table, name).needed for name in ("same", "better")]
    pooled = math.sqrt(
        (np.var(list(steady.values()), ddof=1) + np.var(list(torn.values()), ddof=1)) / 2
    )
    assert [one.std for one in own] == pytest.approx([0.2, np.std(list(torn.values()), ddof=1)])
    assert [one.pooled_std for one in own] == pytest.approx([pooled, pooled])
    assert own[0].num_seeds < own[0].pooled_seeds == own[1].pooled_seeds < own[1].num_seeds
    (line,) = [one for one in remarks(table) if "each cell's own spread" in one]
    assert f"{np.sqrt((0 + 0.04 + np.var(list(torn.values()), ddof=1)) / 3):.2f}" in line
    assert "6 degrees of freedom" in line


def test_a_table_says_intervals_that_agree_with_holms_p():
    rng = np.random.default_rng(1)
    names = [cell(f"c{place}") for place in range(6)]
    values = {BASE: {seed: 90.0 + seed / 10 for seed in SEEDS}} | {
        one: {seed: 90.0 + place + rng.normal(0, 0.4) for seed in SEEDS}
        for place, one in enumerate(names)
    }
    table = table_of(values)
    for summary in table.cells[1:]:
        gains = DescrStatsW([summary.values[s] - table.cells[0].values[s] for s in SEEDS])
        assert summary.difference.interval == pytest.approx(gains.tconfint_mean(0.05 / 6))
        low, high = summary.difference.interval
        assert low <= 0 <= high or summary.p_holm < 0.05
    assert "Bonferroni's level for the 6 comparisons" in " ".join(remarks(table))


def test_a_difference_over_fewer_seeds_than_the_base_has_is_marked():
    """It is not the difference of the two means that stand beside it."""
    table = table_of(
        {BASE: {0: 90.0, 1: 92.0, 2: 97.0}, BETTER: {0: 93.0, 1: 94.0}, SAME: {2: 98.0}}
    )
    better, same = only(table, "better"), only(table, "same")
    assert better.difference.value == 2.5 and better.mean - table.cells[0].mean == 0.5
    assert "difference over the common seeds 0, 1" in better.marks
    assert "difference over the common seed 2" in same.marks


def test_a_score_that_is_no_share_of_the_images_has_no_binomial_error():
    """Nor the spread that seeds have in top-1."""
    base = {"task": "segmentation", "scores_pct": {"mIoU_pct": 27.5}}
    of_pixels, of_images = (
        " ".join(remarks(table_of({BASE: {0: 27.5}}, seeds=(0,), base=more))) for more in (base, {})
    )
    for said in ("binomial", "arXiv:2110.00476"):
        assert said in of_images and said not in of_pixels


def test_one_is_singular():
    table = table_of({BASE: {0: 90.0}, SAME: {}}, seeds=(0,), base={"num_threads": 1, "epochs": 1})
    text = " ".join([*remarks(table), *warnings(table)])
    assert "over seed 0" not in text and "1 epoch," in text and "1 thread," in text
    assert not re.search(r"\b1 [a-z]+s\b", text.replace("1 points", "")), text


def test_a_remark_has_data_epochs_machine_versions_and_commit():
    table = table_of(
        {BASE: {0: 90.0, 1: 91.0}}, seeds=(0, 1), base={"commit": "abc" * 14, "dirty": False}
    )
    text = remarks(table)[-1]
    for fact in (
        "digits (ffffffffffff)",
        "360 images of val",
        "10 epochs",
        "a processor",
        "float32",
        "2 threads",
        "torch 2.15.0",
        "commit abcabcabcabc",
    ):
        assert fact in text, fact
    assert any(
        "One of 360 val images is 0.278 points; the binomial standard error of 90.50 %" in line
        and "is 1.5 points" in line
        for line in remarks(table)
    )


@pytest.mark.parametrize(
    ("fact", "other", "expected"),
    [
        (
            "data_fingerprint",
            "0" * 64,
            "rows differ in data: digits (ffffffffffff): base; digits (000000000000): better",
        ),
        ("num_val_images", 100, "rows differ in split"),
        ("epochs", 3, "rows differ in epochs: 10 epochs: base; 3 epochs: better"),
        ("device", "another", "rows differ in device: a processor: base; another: better"),
        ("num_threads", 1, "rows differ in threads"),
        ("precision", "bf16", "rows differ in precision"),
        (
            "versions",
            {"torch": "2.14.0"},
            "rows differ in versions: torch 2.15.0: base; torch 2.14.0: better",
        ),
        ("commit", "1" * 40, "rows differ in commit"),
        ("dirty", True, "rows differ in uncommitted changes"),
        ("num_replaced_images", 3, "images were replaced"),
        ("changes", ("device a -> b after step 3",), "changed during training"),
    ],
)
def test_rows_of_a_group_that_differ_in_anything_else_are_warned_of(fact, other, expected):
    table = table_of(
        {BASE: {0: 90.0, 1: 91.0}, BETTER: {0: 93.0, 1: 94.5}}, seeds=(0, 1), better={fact: other}
    )
    (line,) = warnings(table)
    assert expected in line


def test_groups_on_other_data_are_no_reason_to_warn():
    other = [cell("base b", "resnet18 on mnist", is_base=True), cell("b", "resnet18 on mnist")]
    facts = {"data": "mnist", "data_fingerprint": "0" * 64, "num_val_images": 10_000, "epochs": 6}
    values = {0: 90.0, 1: 91.0}
    table = table_of(
        {BASE: values, other[0]: values, other[1]: values},
        seeds=(0, 1),
        **{"base b": facts, "b": facts},
    )
    assert not warnings(table)
    assert [
        line
        for line in remarks(table)
        if line.startswith("resnet18 on mnist: mnist (000000000000), 10,000 images of val")
    ]
    assert [fact.name for fact in facts_of(table.cells) if len(fact.values) > 1] == [
        "data",
        "split",
        "epochs",
    ]


def test_published_scores_have_their_source_and_never_compared():
    known = cell("known", published=80.4, published_source="RSB, Table 1")
    table = table_of({BASE: {0: 90.0, 1: 91.0}, known: {0: 89.0, 1: 91.5}}, seeds=(0, 1))
    assert only(table, "known").difference.value == pytest.approx(-0.25)
    assert [
        line
        for line in remarks(table)
        if line.startswith("Published:") and line.endswith("RSB, Table 1.")
    ]


def test_every_seed_has_its_commands():
    name = cell("swish", overrides="model.activation={name: swish} epochs=3")
    table = table_of({name: {0: 90.0}}, seeds=(0, 1))
    first, second = table.cells[0].seeds
    assert (
        first.command
        == 'make recipe=A2 model=resnet18 data=digits seed=0 set="model.activation={name: swish}'
        ' epochs=3"'
    )
    assert first.reproduce == f"make reproduce row={first.row.run}" and second.reproduce == ""


def test_the_commands_of_a_file_with_a_space_are_quoted():
    question = replace(asked([BASE]), word="my study/two.yaml")
    table = summarize(question, {(BASE.name, 0): row(BASE.name, 0, 90.0)}, METRICS["top1"])
    for write in (as_markdown, as_latex):
        assert 'ablation="my study/two.yaml"' in write(make_view(table))
