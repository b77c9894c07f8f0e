"""What stands on a report: sort keys, pieces of set=, provenance told once where all rows agree."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.reported import study
from support.tabled import cell, table_of
from trainer.report.page import cell_lines, numbers_of, pieces_of, result_tables, runs_of, states_of
from trainer.report.query import make_view


def test_numbers_are_sorted_by_their_value_and_what_is_absent_has_no_key():
    first, second = result_tables(make_view(study()))
    assert [first.group, second.group] == ["resnet18 on digits", "convnext_atto on digits"]
    names = [column.name for column in first.columns]
    by_cell = {
        line.one.cell.name: dict(zip(names, line.entries, strict=True)) for line in first.lines
    }
    assert (
        float(by_cell["CE (resnet18)"]["mean"].key) == pytest.approx(94.0666667)
        and by_cell["CE (resnet18)"]["mean"].text == "94.07 ± 1.05"
    )
    assert (by_cell["none (resnet18)"]["mean"].text, by_cell["none (resnet18)"]["mean"].key) == (
        "no row",
        "",
    )
    assert (
        by_cell["none (resnet18)"]["mean"].is_absent
        and not by_cell["CE (resnet18)"]["mean"].is_absent
    )
    assert (
        by_cell["BCE (resnet18)"]["difference"].text == "base"
        and by_cell["BCE (resnet18)"]["difference"].key == ""
    )
    assert [line.number for line in second.lines] == [6, 7, 8, 9, 10]
    assert numbers_of(study())["none (convnext_atto)"] == 10
    assert "marks" not in names


def test_a_piece_of_set_is_a_cells_own_where_its_base_says_otherwise():
    lines = cell_lines(study())
    assert [[piece.text for piece in line.overrides if piece.is_own] for line in lines[:3]] == [
        [], ["loss.name=ce"], ["'loss={name: bce, reduction: sum}'"],
    ]  # fmt: skip
    assert [line.left_out for line in lines[:3]] == [(), (), ("loss.name=bce",)]
    assert (
        lines[1].command
        == 'make recipe=A2 model=resnet18 data=digits seed=0 set="epochs=10 loss.name=ce"'
    )


@given(
    st.lists(
        st.sampled_from(
            ["epochs=1", "'a={b: c, d: e}'", "x=[1, 2]", 'y="p q"', "z='", "w=}", "", "]{"]
        )
    ).map(" ".join)
)
def test_pieces_joined_are_the_text(text):
    assert " ".join(pieces_of(text)) == text


def test_pieces_are_those_of_a_shell_where_no_bracket_is_bare():
    text = "epochs=1 'mix={name: mixup, alpha: 0.2}' lr.peak=0.1"
    assert [shlex.split(piece)[0] for piece in pieces_of(text)] == shlex.split(text)
    assert (
        pieces_of("a=[1, 2] b={c: d, e: f}") == ("a=[1, 2]", "b={c: d, e: f}")
        and pieces_of("") == ()
    )


def test_what_all_rows_have_alike_is_told_once_and_the_rest_in_columns():
    table = study()
    runs = runs_of(table)
    common = dict(runs.common)
    assert (
        common["epochs"] == "10"
        and "fingerprint ffffffffffff" in common["data"]
        and common["precision"] == "float32"
    )
    assert runs.headings == ("model",) and len(runs.lines) == 30
    assert len(common) + len(runs.headings) == 21  # every fact, once
    first = runs.lines[0]
    assert first.facts == ("resnet18",) and first.address == f"rows/{first.result.row.run}.json"
    assert first.result.reproduce == f"make reproduce row={first.result.row.run}"
    failed = next(line for line in runs.lines if line.result.state == "failed")
    assert (failed.facts, failed.address, failed.score.is_absent, failed.state) == (
        ("",),
        "",
        True,
        "failed",
    )


def test_one_row_alone_has_nothing_in_common_with_others():
    runs = runs_of(table_of({cell("base", is_base=True): {0: 90.0}}, seeds=(0,)))
    assert runs.common == () and len(runs.headings) == 21
    assert runs_of(table_of({cell("base", is_base=True): {}})).headings == ()


def test_an_address_stays_within_the_store():
    runs = runs_of(
        table_of({cell("base", is_base=True): {0: 90.0}}, base={"run": "../../etc/passwd?#'"})
    )
    assert runs.lines[0].address == "rows/..%2F..%2Fetc%2Fpasswd%3F%23%27.json"


def test_runs_are_counted_by_state():
    assert states_of(study()) == (("finished", 16), ("diverged", 2), ("failed", 1), ("no row", 11))
