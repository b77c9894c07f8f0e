"""Where marks stand: scales against closed forms, forest plots, bands, the Pareto front against a
plain search.
"""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.reported import curves_of, large, study
from support.tabled import asked, cell, row, table_of
from trainer.report.curve_figures import PANEL_INNER_PX, curve_figures, quantities
from trainer.report.curves import Curves
from trainer.report.figures import (
    COST_INNER_PX,
    MAX_CELLS,
    Scale,
    core_range,
    cost_figures,
    forest,
    scale_over,
)
from trainer.report.tables import METRICS, summarize

NUMBERS = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


def test_a_scale_is_a_straight_line_and_its_ticks_are_round():
    scale = Scale(-1.0, 3.0, 0, 100)
    assert [scale.at(value) for value in (-1, 0, 1, 3, 9)] == [0, 25, 50, 100, 100]
    assert [(tick.label, tick.at) for tick in scale.ticks(5)] == [
        ("-1", 0),
        ("0", 25),
        ("1", 50),
        ("2", 75),
        ("3", 100),
    ]
    assert [tick.label for tick in Scale(0.0, 0.05, 0, 1).ticks(5)] == [
        "0.00",
        "0.01",
        "0.02",
        "0.03",
        "0.04",
        "0.05",
    ]
    assert [tick.label for tick in Scale(0.0, 2500.0, 0, 1).ticks(5)] == [
        "0",
        "500",
        "1,000",
        "1,500",
        "2,000",
        "2,500",
    ]


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_every_value_is_within_its_scale(values):
    scale = scale_over(values, 0, 100)
    assert all(scale.low < value < scale.high for value in values)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 6 and all(0 <= tick.at <= 100 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_a_forest_has_every_difference_at_its_place():
    table = study()
    cells = table.groups["resnet18 on digits"]
    found = forest("resnet18 on digits", cells)
    assert found.base == "BCE (resnet18)" and [effect.summary for effect in found.effects] == list(
        cells[1:]
    )
    clear, alone, torn, absent = found.effects
    assert clear.is_significant and clear.low < clear.at < clear.high
    value, ticks = (clear.summary.difference, {float(tick.label): tick.at for tick in found.ticks})
    (x0, at0), (x1, at1) = min(ticks.items()), max(ticks.items())
    unit = (at1 - at0) / (x1 - x0)
    for place, number in (
        (clear.at, value.value),
        (clear.low, value.low),
        (clear.high, value.high),
        (found.zero, 0.0),
    ):
        assert place == pytest.approx(at0 + (number - x0) * unit, abs=0.02)
    assert alone.at is not None and alone.low is None and torn.at < found.zero < alone.at
    assert absent.at is None


def test_an_interval_far_wider_than_the_others_is_cut_and_says_so():
    base = {0: 90.0, 1: 92.0, 2: 91.0}
    others = {
        cell(f"c{place}"): {0: 90.1 + place, 1: 92.2 + place, 2: 91.0 + place} for place in range(4)
    }
    table = table_of(
        {cell("base", is_base=True): base, **others, cell("wild"): {0: 60.0, 1: 99.0, 2: 95.0}}
    )
    *narrow, wild = forest("g", table.cells).effects
    assert wild.is_cut_low and wild.is_cut_high
    assert not any(effect.is_cut_low or effect.is_cut_high for effect in narrow)
    assert all(
        0 <= end <= 100
        for effect in (*narrow, wild)
        for end in (effect.low, effect.at, effect.high)
    )


def test_few_values_far_off_do_not_squash_the_others():
    assert core_range([1, 2, 3, 4, 100]) == (1, 4)
    assert core_range([-60, 0, 0.5, 1, 2]) == (0, 2)
    assert core_range([1, 2, 3, 4, 10]) == (1, 4) and core_range([1, 2, 3, 4, 9]) == (1, 9)
    assert core_range([1, 100]) == (1, 100) and core_range([5]) == (5, 5)
    assert core_range([0, 0, 100, 100, 100]) == (0, 100), "two of five are not few"


def test_a_difference_far_off_stands_beyond_the_axis():
    near = {cell(f"c{place}"): {0: 91.0 + place, 1: 92.0, 2: 91.5 + place} for place in range(4)}
    far = {cell("far"): {0: 30.0, 1: 31.0, 2: 32.0}}
    table = table_of({cell("base", is_base=True): {0: 90.0, 1: 92.0, 2: 91.0}, **near, **far})
    *others, away = forest("g", table.cells).effects
    assert away.is_beyond and away.is_cut_low and not any(one.is_beyond for one in others)
    assert max(one.at for one in others) - min(one.at for one in others) > 10


def test_each_loss_has_an_axis_of_its_own_and_a_cell_far_off_leaves_it():
    losses = ['{"name": "bce"}', '{"name": "ce"}', '{"name": "ce", "threshold": 0.2}']
    cells = {
        cell(f"c{place}", is_base=place == 0, loss=losses[min(place, 2)]): {0: 90.0}
        for place in range(7)
    }
    table = table_of(cells, seeds=(0,))
    curves = {
        one.rows[0].run: Curves(
            ((1, 2.0), (2, 1.0)), ((1, 50.0), (2, 30.0 if not place else 90.0 + place))
        )
        for place, one in enumerate(table.cells)
    }
    found = {one.axis: one for one in quantities(table, curves)}
    assert [len(one.lines) for one in found.values()] == [7, 1, 1, 5]
    assert list(found) == [
        "top-1 of val, %",
        "training loss (bce), nats",
        "training loss (ce), nats",
        "training loss (ce, threshold 0.2), nats",
    ]
    figure = curve_figures(table, curves)[0]
    assert [line.is_beyond for line in figure.lines] == [True, *[False] * 6]
    assert found["top-1 of val, %"].y_range() == (50.0, 96.0)


def test_a_group_without_a_difference_has_no_forest():
    table = table_of({cell("base", is_base=True): {0: 90.0}, cell("other"): {}})
    assert forest("g", table.cells) is None


def test_of_many_cells_the_largest_effects_are_drawn_and_the_rest_counted():
    table = large()
    found = forest("g", table.cells)
    assert len(found.effects) == MAX_CELLS and found.num_left_out == 399 - MAX_CELLS
    sizes = [abs(one.difference.value) for one in table.cells if one.difference]
    assert (
        min(abs(effect.summary.difference.value) for effect in found.effects)
        == sorted(sizes)[-MAX_CELLS]
    )
    (figure, _) = curve_figures(table, curves_of(table))
    assert len(figure.panels) == MAX_CELLS and figure.num_left_out > 0


def points(text):
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_a_panel_has_each_seed_their_mean_and_a_band_around_all():
    table = table_of({cell("base", is_base=True): {0: 90.0, 1: 92.0}}, seeds=(0, 1))
    runs = [row.run for row in table.cells[0].rows]
    curves = {
        runs[0]: Curves((), ((1, 10.0), (2, 50.0), (3, 90.0))),
        runs[1]: Curves((), ((1, 20.0), (2, 70.0))),
    }
    (figure,) = curve_figures(table, curves)
    (panel,) = figure.panels
    assert len(panel.seeds) == 2 and panel.base == ""
    assert [tick.label for tick in figure.panel_x_ticks] == ["0", "1", "2", "3"]
    assert panel.line.values == "1 15 10 20;2 60 50 70;3 90 90 90"
    ticks = {float(tick.label): tick.at for tick in figure.panel_y_ticks}
    unit = (ticks[80] - ticks[20]) / 60
    assert [y for _, y in points(panel.line.points)] == pytest.approx(
        [ticks[20] + (value - 20) * unit for value in (15, 60, 90)], abs=0.02
    )
    assert [y for _, y in points(panel.band)] == pytest.approx(
        [ticks[20] + (value - 20) * unit for value in (10, 50, 90, 90, 70, 20)], abs=0.02
    )
    left, top, right, bottom = PANEL_INNER_PX
    assert all(left <= x <= right and top <= y <= bottom for x, y in points(panel.band))


def test_every_panel_has_the_bases_mean_and_who_has_no_curves_is_named():
    table = study()
    top1, loss = curve_figures(table, curves_of(table))[:2]
    assert (top1.quantity.axis, loss.quantity.axis) == ("top-1 of val, %", "training loss, nats")
    assert top1.quantity.without == ("CE (resnet18)", "none (resnet18)")
    base, *others = top1.panels
    assert all(panel.base == base.line.points for panel in others)
    alone = next(panel for panel in top1.panels if panel.summary.cell.name == "sum (resnet18)")
    assert alone.band == "" and alone.seeds == () and alone.line.points
    assert curve_figures(table, {}) == ()


def test_accuracy_against_cost_marks_the_front():
    table = study()
    figure = cost_figures(table)[0]
    assert figure.trade.axis == "training time, s" and len(cost_figures(table)) == 2
    front = {point.summary.cell.name for point in figure.points if point.scored.is_front}
    assert front == {
        "BCE (resnet18)",
        "CE (resnet18)",
    }  # 50 s and 91 %, 57 s and 94 %; the others cost more for less
    by_name = {point.summary.cell.name: point for point in figure.points}
    base, better = by_name["BCE (resnet18)"], by_name["CE (resnet18)"]
    assert base.x < better.x and base.y > better.y and base.scored.cost_text == "50"
    assert re.fullmatch(rf"M{base.x:g},{base.y:g} H{better.x:g} V{better.y:g}", figure.front)
    assert by_name["sum (resnet18)"].low is None and base.low > base.y > base.high


def test_of_a_loss_the_least_is_best():
    facts = {
        "base": {"loss_nats": 1.0, "train_s": 1.0},
        "worse": {"loss_nats": 2.0, "train_s": 2.0},
        "better": {"loss_nats": 0.5, "train_s": 3.0},
    }
    table = table_of(
        {cell(name, is_base=name == "base"): {0: 90.0} for name in facts},
        seeds=(0,),
        metric="loss",
        **facts,
    )
    (figure,) = cost_figures(table)
    assert {point.summary.cell.name for point in figure.points if point.scored.is_front} == {
        "base",
        "better",
    }


def test_no_front_and_no_figure_where_costs_differ_by_no_more_than_over_the_seeds():
    """963 MiB against 968, and seeds of one cell that took 253, 241 and 1,971 s."""
    base, other = cell("base", is_base=True), cell("other")
    rows = {
        (one.name, seed): row(one.name, seed, score + seed, train_s=train_s, peak_mem_mib=memory)
        for one, score, seconds, memories in (
            (base, 90.0, (241.0, 253.0, 1971.0), (963.0, 966.0, 969.0)),
            (other, 95.0, (240.0, 300.0, 320.0), (961.0, 968.0, 972.0)),
        )
        for seed, (train_s, memory) in enumerate(zip(seconds, memories, strict=True))
    }
    table = summarize(asked([base, other]), rows, METRICS["top1"])
    assert cost_figures(table) == ()


def test_a_front_of_clear_costs_leaves_out_what_is_no_better_by_more_than_its_spread():
    facts = {name: {"train_s": 100.0 * (place + 1)} for place, name in enumerate("abc")}
    table = table_of(
        {
            cell("a", is_base=True): {0: 90.0, 1: 91.0, 2: 92.0},
            cell("b"): {0: 91.0, 1: 92.0, 2: 93.0},
            cell("c"): {0: 95.0, 1: 96.0, 2: 97.0},
        },
        **facts,
    )
    (figure,) = cost_figures(table)
    front = {point.summary.cell.name for point in figure.points if point.scored.is_front}
    assert front == {"a", "c"} and figure.front


def test_a_label_at_the_edge_stays_in_the_figure():
    facts = {f"c{place}": {"train_s": 50.0 + place} for place in range(9)} | {
        "far": {"train_s": 9e3}
    }
    cells = {cell(name, is_base=name == "c0"): {0: 90.0, 1: 90.5} for name in facts}
    (figure,) = cost_figures(table_of(cells, seeds=(0, 1), **facts))
    far = next(point for point in figure.points if point.summary.cell.name == "far")
    assert far.is_beyond and far.anchor != "start" and far.label_x <= 420 - 11


@pytest.mark.parametrize("fact", [{"load_per_core": 2.0}, {"step_spread_share": 0.3}])
def test_times_of_a_shared_machine_make_no_front_and_other_costs_do(fact):
    facts = {
        name: {"train_s": 100.0 * place, "peak_mem_mib": 100.0 * place} | fact
        for place, name in enumerate("abc", start=1)
    }
    cells = {cell(name, is_base=name == "a"): {0: 2.0 * ord(name) - 110} for name in facts}
    time, memory = cost_figures(table_of(cells, seeds=(0,), metric="top1", **facts))
    assert (time.trade.name, memory.trade.name) == ("training time", "peak memory")
    assert len(time.points) == 3 and not time.front and time.trade.warning
    assert not any(point.scored.is_front for point in time.points)
    assert memory.front and not memory.trade.warning


def test_the_axes_hold_the_range_of_every_cost_and_labels_stay_within_them():
    """Of two seeds of each cell, the cheapest and the dearest far from their cell's middle."""
    cells = [cell(name, is_base=name == "a") for name in "abcd"]
    rows = {
        (one.name, seed): row(
            one.name, seed, 90.0 + place + seed, train_s=100 + 10.0 * place + 8 * (2 * seed - 1)
        )
        for place, one in enumerate(cells)
        for seed in (0, 1)
    }
    (figure,) = cost_figures(summarize(asked(cells, (0, 1)), rows, METRICS["top1"]))
    left, top, right, bottom = COST_INNER_PX
    ticks = {float(tick.label): tick.at for tick in figure.x_ticks}
    (s0, x0), (s1, x1) = min(ticks.items()), max(ticks.items())
    for point in figure.points:
        assert left < point.left < point.right < right
        ends = [
            x0 + (end - s0) * (x1 - x0) / (s1 - s0) for end in (point.scored.low, point.scored.high)
        ]
        assert [point.left, point.right] == pytest.approx(ends, abs=0.05)
        wide = {"start": (0, 7), "end": (7, 0), "middle": (4, 4)}[point.anchor]  # one digit
        assert left <= point.label_x - wide[0] and point.label_x + wide[1] <= right
        assert top + 9 <= point.label_y <= bottom


def test_cells_that_cost_the_same_have_no_figure():
    table = table_of({cell("base", is_base=True): {0: 90.0}, cell("other"): {0: 91.0}}, seeds=(0,))
    assert cost_figures(table) == ()


def test_numbers_stand_apart_from_each_others_points():
    """As far as there is room: eight cells in a cloud."""
    facts = {f"c{place}": {"train_s": 50.0 + place % 3} for place in range(8)}
    table = table_of(
        {
            cell(name, is_base=name == "c0"): {0: 90.0 + place / 4}
            for place, name in enumerate(facts)
        },
        seeds=(0,),
        **facts,
    )
    (figure,) = cost_figures(table)
    for a, b in itertools.combinations(figure.points, 2):
        assert abs(a.label_x - b.label_x) > 6 or abs(a.label_y - b.label_y) > 6
