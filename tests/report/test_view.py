"""sort=, columns=, filter=: comparisons of the table's columns, and nothing else is accepted."""

import pytest

from support.tabled import cell, table_of
from trainer.base.errors import UserError
from trainer.report.view import COLUMNS, fields_of, make_view

CELLS = {
    cell("batch_norm", is_base=True, levels=(("model.norm", "batch"), ("images", "64"))): {
        0: 90.0,
        1: 92.0,
        2: 91.0,
    },
    cell("group_norm", levels=(("model.norm", "group"), ("images", "64"))): {
        0: 93.0,
        1: 96.0,
        2: 94.5,
    },
    cell("batch_norm 8", levels=(("model.norm", "batch"), ("images", "8"))): {0: 60.0},
    cell("no row", levels=(("model.norm", "none"), ("images", "8"))): {},
}
TABLE = table_of(CELLS)


def names(**query):
    return [one.cell.name for one in make_view(TABLE, **query).table.cells]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("mean > 90", ["batch_norm", "group_norm"]),
        ("mean >= 91 and mean <= 92", ["batch_norm"]),
        ("90 < mean < 92", ["batch_norm"]),
        ("not mean > 90", ["batch_norm 8", "no row"]),
        ("n == 1 or n == 0", ["batch_norm 8", "no row"]),
        ("n in (1, 3)", ["batch_norm", "group_norm", "batch_norm 8"]),
        ("n not in [3]", ["batch_norm 8", "no row"]),
        ('cell == "group_norm"', ["group_norm"]),
        ('"norm" in cell and "8" not in cell', ["batch_norm", "group_norm"]),
        ('model.norm == "batch"', ["batch_norm", "batch_norm 8"]),
        ('images in ("8",)', ["batch_norm 8", "no row"]),
        ("difference > 0", ["group_norm"]),
        ("difference < -20.5", ["batch_norm 8"]),
        ("p < 0.05", ["group_norm"]),
        ("mean > 1000", []),
        ("mean > 9" + "9" * 30, []),
        ("mean < 1e999", ["batch_norm", "group_norm", "batch_norm 8"]),
        ("p not in (0.05,)", ["batch_norm", "group_norm", "batch_norm 8", "no row"]),
        ("num_params > 1e7 and n >= 3", ["batch_norm", "group_norm"]),
        ("mean != 91", ["group_norm", "batch_norm 8"]),  # what is not there is not unequal either
        ('group == "resnet18 on digits"', ["batch_norm", "group_norm", "batch_norm 8", "no row"]),
    ],
)
def test_a_filter_keeps_the_cells_that_it_says(text, kept):
    assert names(filter_=text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch pwned')", "mean.__class__", "().__class__.__bases__", "open('pwned', 'w')",
        "(lambda: 1)() > 0", "[x for x in (1,)] == cell", "mean + 1 > 3", "2 ** 999999999 > mean", "f'{cell}' == 'a'",
        "mean if n else p", "mean > 90; n", "import os", "@cell", "mean = 3", "mean", "n", "1", "1 < 2", "'a' == 'b'",
        "cell > 3", "mean == 'a'", "cell is 'a'", "mean in 3", "3 in mean", "True == n", "None == n", "b'a' == cell",
        "mean[0] > 1", "cell.str.len() > 3", "nosuch > 3", "model.nosuch == 'a'", "(mean := 3) > 1", "*mean > 3",
        "mean > 1_000" * 50, "(" * 300 + "mean", "not " * 99 + "mean", "mean >\x00 1", "",
    ],
)  # fmt: skip
def test_what_is_no_comparison_of_columns_is_refused_and_never_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "":
        assert make_view(TABLE, filter_=text).is_whole
        return
    with pytest.raises(UserError, match="filter="):
        make_view(TABLE, filter_=text)
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_part_of_the_filter_that_is_wrong():
    with pytest.raises(UserError, match=r"filter=abs\(mean\): "):
        make_view(TABLE, filter_="n > 1 and abs(mean) > 3")
    with pytest.raises(UserError, match=r"filter=mena: .*did you mean mean\?"):
        make_view(TABLE, filter_="mena > 3")


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("mean", ["batch_norm 8", "batch_norm", "group_norm", "no row"]),
        ("-mean", ["group_norm", "batch_norm", "batch_norm 8", "no row"]),
        ("-n, cell", ["batch_norm", "group_norm", "batch_norm 8", "no row"]),
        ("images -cell", ["group_norm", "batch_norm", "no row", "batch_norm 8"]),
    ],
)
def test_cells_are_sorted_and_those_without_a_value_come_last(text, order):
    assert names(sort=text) == order


def test_cells_stay_in_their_groups():
    other = [cell("b base", "b on digits", is_base=True), cell("b", "b on digits")]
    table = table_of(CELLS | {other[0]: {0: 1.0}, other[1]: {0: 99.0}})
    assert [one.cell.name for one in make_view(table, sort="-mean").table.cells] == [
        "group_norm", "batch_norm", "batch_norm 8", "no row", "b", "b base",
    ]  # fmt: skip


def test_columns_are_those_asked_for_in_that_order():
    assert make_view(TABLE, columns="mean, cell model.norm").columns == (
        "mean",
        "cell",
        "model.norm",
    )
    for text, expected in (
        ("cell menas", r"columns=menas: unknown.*valid: group, cell"),
        ("n n", "columns=n n: duplicate"),
        ("sort", "columns=sort: unknown"),
    ):
        with pytest.raises(UserError, match=expected):
            make_view(TABLE, columns=text)
    with pytest.raises(UserError, match="sort=menas: unknown"):
        make_view(TABLE, sort="-menas")


def test_a_view_of_some_cells_keeps_the_p_of_all():
    view = make_view(TABLE, filter_='cell == "group_norm"')
    assert (
        view.table.cells[0].p_holm == TABLE.cells[1].p_holm
        and view.table.num_compared == TABLE.num_compared
    )
    assert not view.is_whole and make_view(TABLE).is_whole


def test_every_cell_has_every_field_and_none_where_there_is_no_value():
    fields = fields_of(TABLE)
    names = {field for shown in COLUMNS.values() for field in shown} | {"model.norm", "images"}
    assert all(set(one) == names for one in fields)
    assert [one["mean"] for one in fields] == [91.0, 94.5, 60.0, None]
    assert [one["n"] for one in fields] == [3, 3, 1, 0]
    assert [one["difference"] is None for one in fields] == [True, False, False, True]


def test_a_factor_named_like_a_field_does_not_replace_it():
    table = table_of({cell("base", is_base=True, levels=(("low", "x"), ("n", "y"))): {0: 90.0}})
    assert fields_of(table)[0]["low"] is None and fields_of(table)[0]["n"] == 1
