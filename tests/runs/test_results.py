"""The store: written once, read back whole, damage named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from support.committed import ROOT, committed_root
from support.rows import ROW
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.results import Row, RowError, read_row, row_path, store_row


def test_a_row_is_read_back_as_it_was_stored(tmp_path):
    path = store_row(tmp_path, ROW)
    assert path == row_path(tmp_path, ROW.run)
    assert read_row(tmp_path, ROW.run) == ROW
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_of_the_recipe_is_read_back_to_the_last_bit(value):
    row = ROW.model_copy(
        update={"resolved_recipe": {"lr": {"peak": value}, "points": [[0, value]]}}
    )
    read = Row.model_validate_json(row.as_json()).resolved_recipe
    assert [number.hex() for number in (read["lr"]["peak"], read["points"][0][1])] == [
        value.hex()
    ] * 2


@pytest.mark.parametrize(
    "recipe", [{"a": "\x1b[2J"}, {"\x07": 1}, {"a": [{"b": float("nan")}]}, {"a": {1, 2}}, [1]]
)
def test_a_recipe_that_is_no_printable_json_is_refused(recipe):
    with pytest.raises(ValidationError):
        Row(**ROW.model_dump() | {"resolved_recipe": recipe})


def test_a_run_without_a_row_has_none(tmp_path):
    assert read_row(tmp_path, "nothing") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 3}', "\x00"])
def test_a_damaged_row_is_named_with_a_remedy(tmp_path, content):
    path = row_path(tmp_path, "broken")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(RowError, match="broken.json.*move it away"):
        read_row(tmp_path, "broken")


def test_a_row_with_an_unknown_key_is_refused(tmp_path):
    path = row_path(tmp_path, ROW.run)
    path.parent.mkdir()
    path.write_text(json.dumps(json.loads(ROW.model_dump_json()) | {"best_top1_pct": 99.0}))
    with pytest.raises(RowError):
        read_row(tmp_path, ROW.run)


RESULTS = committed_root() / "results"
STORED = sorted(RESULTS.rglob("rows/*.json"))


@pytest.mark.parametrize("path", STORED, ids=[str(path.relative_to(RESULTS)) for path in STORED])
def test_a_page_that_a_stored_row_cites_is_frozen(path):
    """Its digest is still the recipe's: who wants other numbers writes the next version."""
    row = read_row(path.parent.parent, path.stem)
    page = load_recipe(find_recipe(f"{row.recipe}.v{row.version}")).for_model(row.model)
    assert row.run == path.stem and row.digest == page.digest


def test_every_stored_row_is_told_of_with_its_score():
    told = "".join(page.read_text() for page in [ROOT / "README.md", *RESULTS.glob("*.md")])
    assert len(STORED) >= 2
    for path in STORED:
        score_pct = read_row(path.parent.parent, path.stem).main_pct
        assert (
            f"`{path.stem}`" in told
            and ("diverged" if score_pct is None else f"{score_pct:.2f}") in told
        )
