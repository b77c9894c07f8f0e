"""The store as tables read it: only what is theirs, damage named, and a large one without a second
look.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from support.tabled import asked, cell, key_of, row, stored_row
from trainer.ablation.cells import plan_of_cell
from trainer.ablation.failures import store_failure
from trainer.ablation.questions import CACHE_VERSION, open_question
from trainer.ablation.spec import load_ablation
from trainer.base.cache import cache_folder
from trainer.base.errors import UserError
from trainer.report import rows
from trainer.report.rows import errors_in, find_rows, open_table, stored_rows, stores_of
from trainer.report.tables import METRICS
from trainer.runs.results import RowError, store_row


def test_rows_are_read_by_name_and_those_of_others_are_not_opened(tmp_path, monkeypatch):
    for name in ("A1.v1-x", "A2.v2-x", "A2.v2-y"):
        store_row(tmp_path, row(name, 0, 90.0, run=name))
    (tmp_path / "rows" / "A3.v1-damaged.json").write_text("{")
    (tmp_path / "rows" / "A2.v2-x.json.part").write_text("{")
    assert [found.run for found in stored_rows(tmp_path, "A2.v2-")] == ["A2.v2-x", "A2.v2-y"]
    assert list(stored_rows(tmp_path / "nothing", "")) == []
    with pytest.raises(RowError, match=r"A3\.v1-damaged\.json"):
        list(stored_rows(tmp_path, ""))


def test_a_table_is_the_pages_cells_with_their_rows_failures_and_notes(page, tmp_path):
    ablation = load_ablation(page)
    base, other = ablation.cells
    assert open_question(page).prefixes == ("A2.v2-test_resnet-digits-s",)
    results, runs = tmp_path / "results", tmp_path / "runs"
    first = stored_row(base, 0, 90.0)
    store_row(results, first)
    store_row(
        results, first.model_copy(update={"run": f"{first.run}-2", "top1_pct": 50.0})
    )  # made by again=1
    store_row(results, stored_row(base, 7, 10.0))  # a seed that the page does not ask for
    store_row(results, stored_row(other, 1, 91.0))
    store_row(
        results,
        row("a neighbour", 0, 1.0, run="A2.v2-test_resnet-digits-s0-abcdef", model="test_resnet"),
    )
    store_failure(
        runs,
        key_of(other, 0),
        cell=other.name,
        seed=0,
        run=None,
        exit_code=1,
        output=["a", "RuntimeError: boom", ""],
    )
    (results / "two.notes.md").write_text("\nWhat *it* says.\n\n")
    (runs / first.run).mkdir()
    table = open_table(page, results, runs, METRICS["top1"])
    assert [(one.cell.name, one.values) for one in table.cells] == [
        ("BCE", {0: 90.0}),
        ("CE", {1: 91.0}),
    ]
    assert [result.state for one in table.cells for result in one.seeds] == [
        "finished",
        "missing",
        "failed",
        "finished",
    ]
    assert (
        table.cells[1].seeds[0].error == "RuntimeError: boom" and table.notes == "What *it* says."
    )
    assert (
        table.cells[0].seeds[0].folder == runs / first.run
        and table.cells[1].seeds[1].folder is None
    )


def test_notes_that_are_no_text_are_named(page, tmp_path):
    (tmp_path / "two.notes.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"two\.notes\.md: .*UTF-8"):
        open_table(page, tmp_path, tmp_path / "runs", METRICS["top1"])


def test_a_run_that_has_not_failed_has_no_error(tmp_path):
    one = cell("a")
    question = replace(asked([one]), identities={("a", 0): plan_of_cell(one, 0).identity})
    assert errors_in(tmp_path, question)(one, 0) is None


def test_a_large_store_is_indexed_once_and_only_where_it_is_asked_for(tmp_path, page, monkeypatch):
    """Counted work: of 300 rows of others, 40 of other seeds and 5 that may be its own, 5 files
    are read.
    """
    monkeypatch.setattr(rows, "_MIN_NEW_ROWS", 1)
    question = open_question(page)
    own = [stored_row(one, seed, 90.0) for one in load_ablation(page).cells for seed in (0, 1)]
    for made in own[:3]:
        store_row(tmp_path, made)
    for number in range(2):
        store_row(
            tmp_path, row("x", number, 1.0, run=f"A2.v2-test_resnet-digits-s{number}-00000{number}")
        )
    for number in range(300):
        (tmp_path / "rows" / f"A1.v1-resnet50-digits-s{number}-abcdef.json").write_text(
            "never read"
        )
    for number in range(10, 50):
        (tmp_path / "rows" / f"A2.v2-test_resnet-digits-s{number}-000000.json").write_text(
            "never read"
        )
    read_row_file, opened = rows.read_row_file, []
    monkeypatch.setattr(
        rows, "read_row_file", lambda path: opened.append(path.stem) or read_row_file(path)
    )
    assert {made.run for made in find_rows(tmp_path, [question]).values()} == {
        made.run for made in own[:3]
    }
    strangers = {f"A2.v2-test_resnet-digits-s{number}-00000{number}" for number in range(2)}
    assert set(opened) == strangers | {made.run for made in own[:3]}
    store_row(tmp_path, own[3])
    path = store_row(tmp_path, own[0].model_copy(update={"run": f"{own[0].run}-2"}))
    opened.clear()
    found = find_rows(tmp_path, [question])
    assert {made.run for made in found.values()} == {made.run for made in own}
    assert {own[3].run, path.stem} <= set(opened)
    assert not strangers & set(opened)  # they are in the index
    own[0] = own[0].model_copy(
        update={"data_fingerprint": "0" * 64}
    )  # another row under a name that is known
    store_row(tmp_path, own[0])
    assert {made.run for made in find_rows(tmp_path, [question]).values()} == {
        path.stem,
        *(made.run for made in own[1:]),
    }


def test_a_damaged_index_is_none(tmp_path, page, monkeypatch):
    monkeypatch.setattr(rows, "_MIN_NEW_ROWS", 1)
    question, made = (open_question(page), stored_row(load_ablation(page).cells[0], 0, 90.0))
    store_row(tmp_path, made)
    assert list(find_rows(tmp_path, [question]).values()) == [made]
    (record,) = (cache_folder() / "rows").iterdir()
    for content in (
        "",
        "{",
        "[]",
        '{"version": 0, "rows": {}}',
        f'{{"version": {CACHE_VERSION}, "rows": {{"a.json": 3}}}}',
    ):
        record.write_text(content)
        assert list(find_rows(tmp_path, [question]).values()) == [made]


def test_a_store_behind_a_url_is_refused_with_where_its_copy_is(page, tmp_path):
    with pytest.raises(UserError, match=r"results=s3:/bucket/rows: .*runs/cells/stores"):
        open_table(page, Path("s3://bucket/rows"), tmp_path, METRICS["top1"])


def test_a_damaged_row_that_may_be_the_tables_is_named(tmp_path, page):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "A2.v2-test_resnet-digits-s1-000000.json").write_text("{")
    with pytest.raises(RowError, match=r"s1-000000\.json"):
        find_rows(tmp_path, [open_question(page)])


def test_rows_of_two_stores_are_one_table_and_the_same_run_counts_once(tmp_path, page):
    question = open_question(page)
    base, other = load_ablation(page).cells
    a, b, notes = tmp_path / "a", tmp_path / "b", "two.notes.md"
    both = stored_row(base, 0, 90.0)
    store_row(a, both)
    store_row(b, both)
    store_row(b, stored_row(other, 1, 93.0))
    (a / notes).write_text("A says.")
    (b / notes).write_text("B says.")
    stores = stores_of(f"{a} {b}")
    assert stores == (a, b)
    table = open_table(page, stores, tmp_path / "runs", METRICS["top1"])
    assert [one.values for one in table.cells] == [{0: 90.0}, {1: 93.0}]
    assert table.notes == "A says.\n\nB says."
    unlike = both.model_copy(update={"top1_pct": 91.0})
    store_row(b, unlike)
    with pytest.raises(RowError) as caught:
        find_rows(stores, [question])
    for word in (both.run, str(a), str(b)):
        assert word in str(caught.value)


def test_results_names_one_folder_or_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my results").mkdir()
    (tmp_path / "a" / "rows").mkdir(parents=True)
    assert stores_of("my results") == (Path("my results"),)
    assert stores_of("new") == (Path("new"),) and stores_of("a a") == (Path("a"),)
    with pytest.raises(UserError, match="b has no folder rows"):
        stores_of("a b")
