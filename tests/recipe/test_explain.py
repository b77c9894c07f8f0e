"""Where values come from, how recipes differ, and the committed tables."""

import functools
import io
import re
import textwrap

import pytest
from rich.console import Console

from trainer.models.spec import Model
from trainer.recipe import explain, tree
from trainer.recipe.explain import (
    RecipeDifference,
    assumed_table,
    diff_rows,
    diff_table,
    explain_rows,
    explain_table,
    recipes_table,
    roadmap_table,
    scores_table,
    shown,
    unconfirmed_table,
)
from trainer.recipe.load import parse_recipe
from trainer.recipe.schema import ABOUT, apply_overrides, load_recipe, open_recipe
from trainer.recipe.shipped import find_recipe, newest_recipe_paths, recipes_folder

A1, A1_POSITIONS = open_recipe(find_recipe("A1.v1"))
A1_LINES = find_recipe("A1.v1").read_text().split("\n")


@pytest.fixture(scope="module", autouse=True)
def _each_page_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "load_recipe", functools.cache(load_recipe))
        yield


def printed(table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_every_value_has_an_origin():
    recipe, by_profile = apply_overrides(
        A1.for_model("efficientnet_b2"), {"image.train_px": 32}, "profile"
    )
    recipe, by_user = apply_overrides(recipe, "epochs=5 mix=null loss.name=ce")
    rows = explain_rows(A1, A1_POSITIONS, recipe, "efficientnet_b2", by_profile + by_user)
    found = {row.path: row for row in rows}
    assert len(found) == len(rows)
    assert found["lr.peak"][1:4] == (
        0.005,
        "recipe",
        1 + A1_LINES.index(next(x for x in A1_LINES if "peak: " in x)),
    )
    assert found["lr.warmup_from"].origin == "assumed"
    assert found["lr.warmup_from"].note == A1.assumed["lr.warmup_from"]
    assert "warmup_from: 1.0e-4" in A1_LINES[found["lr.warmup_from"].line - 1]
    assert found["image.test_px"].origin == "per_model"
    assert "efficientnet_b2: {image" in A1_LINES[found["image.test_px"].line - 1]
    assert found["image.train_px"][1:] == (32, "profile", None, "was 260")
    assert found["epochs"][1:] == (5, "override", None, "was 600")
    assert found["mix"][1:4] == (None, "override", None)
    assert found["loss.name"].note == "was bce"
    assert "loss.threshold" not in found  # ce has none


def test_every_leaf_is_explained_and_nothing_that_is_off():
    rows = explain_rows(A1, A1_POSITIONS, A1.for_model("resnet50"), "resnet50")
    leaves = {
        key: value
        for key, value in tree.leaves(tree.plain(A1)).items()
        if key.partition(".")[0] not in ABOUT
    }
    off = {row.path for row in rows if row.value is None}
    assert {row.path: row.value for row in rows if row.value is not None} == leaves
    assert off == {
        "lr.scaling",
        "loss.threshold",
        "loss.sum_classes",
        "model.zero_init_last",
    }  # their being off is assumed
    for row in rows:
        assert (
            row.line is not None
            and row.path.rpartition(".")[2].split("_")[0] in A1_LINES[row.line - 1]
        )


def test_what_is_off_is_shown_on_request():
    rows = explain_rows(A1, A1_POSITIONS, A1.for_model("resnet50"), "resnet50", with_off=True)
    off = {row.path for row in rows if row.value is None}
    assert {"average", "lr.warmup_ends_at_peak"} <= off
    assert len({row.path for row in rows}) == len(rows)


def test_two_pages_differ_in_what_they_do():
    a2, a3 = (load_recipe(find_recipe(f"A{number}.v1")) for number in (2, 3))
    assert set(diff_rows(a2, a3)) == {
        RecipeDifference("epochs", 300, 100),
        RecipeDifference("lr.peak", 0.005, 0.008),
        RecipeDifference("augment.rand_augment.magnitude", 7.0, 6.0),
        RecipeDifference("repeats", 3, None),
        RecipeDifference("image.train_px", 224, 160),
        RecipeDifference("drop_path", 0.05, None),
    }
    assert diff_rows(a2, a2) == []


def test_a_part_that_only_one_page_has_is_one_line():
    a1, v1 = load_recipe(find_recipe("A1.v1")), load_recipe(find_recipe("torchvision-v1.v1"))
    rows = {row.path: row for row in diff_rows(a1, v1)}
    assert rows["mix"].a["name"] == "mixup_or_cutmix" and rows["mix"].b is None
    assert rows["augment.rand_augment"].b is None
    assert rows["optimizer.momentum"] == ("optimizer.momentum", None, 0.9)


def test_tables_show_brackets_and_off():
    rows = explain_rows(A1, A1_POSITIONS, A1.for_model("resnet50"), "resnet50")
    text = printed(explain_table(rows, "A1"))
    assert "[vectors, biases]" in text and "off" in text
    rows = diff_rows(A1, load_recipe(find_recipe("torchvision-v2")))
    text = printed(diff_table(rows, "A1.v1", "torchvision-v2"))
    assert "[norms]" in text and "torchvision-v2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "off"),
        (True, "true"),
        (1e-6, "1e-06"),
        (4 / 3, "1.33333"),
        ((0.9, 1.0), "[0.9, 1]"),
        ({"a": 1}, "{a: 1}"),
    ],
)
def test_values_are_shown_as_pages_write_them(value, text):
    assert shown(value) == text


def test_an_exact_value_is_the_shortest_text_that_gives_it_back():
    assert (
        shown(0.0012345678, exact=True) == "0.0012345678"
        and shown((4 / 3, 1.0), exact=True) == f"[{4 / 3!r}, 1]"
    )


@pytest.mark.parametrize(
    "table", [recipes_table, roadmap_table, scores_table, assumed_table, unconfirmed_table]
)
def test_the_committed_tables_are_current(table):
    assert table() in (recipes_folder() / "README.md").read_text()


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


def test_every_page_has_a_row_and_every_score_a_place():
    pages = rows_of(recipes_table("recipes/")) + rows_of(roadmap_table("recipes/"))
    header, _, *models = rows_of(scores_table())
    for path in newest_recipe_paths():
        page = load_recipe(path)
        [row] = [row for row in pages if f"](recipes/{path.name})" in row[0]]
        names = {score.model for score in page.published}
        shown = row[2].partition(" ")[2]
        if not names:
            assert row[2] == "none stated" and f"({path.name})" not in " ".join(header)
        if len(names) > 1:
            column = next(place for place, cell in enumerate(header) if f"({path.name})" in cell)
            cells = {row[0]: row[column] for row in models}
            assert {name for name, cell in cells.items() if cell} == names
            assert all(
                f"{score.top1_pct}" in numbers_in(cells[score.model]) for score in page.published
            )
        for score in page.published if len(names) == 1 else ():
            assert row[2].startswith(f"{score.model} ") and f"{score.top1_pct}" in numbers_in(shown)


def test_pages_of_one_recipe_share_a_row_in_the_order_of_their_lengths():
    [row] = [row for row in rows_of(recipes_table()) if "ffcv-rn50-16.v1.yaml" in row[0]]
    assert re.findall(r"-(\d+)\.v1\.yaml", row[0]) == ["16", "24", "32", "40", "56", "88"]
    assert "16, 24, 32, 40, 56 or 88 epochs" in row[1]
    assert row[2] == "resnet50 73.8, 75.6, 76.6, 77.2, 78.0, 78.4"


def test_the_roadmap_is_in_the_papers_order():
    _, _, *rows = rows_of(roadmap_table())
    steps = [row[1].partition(":")[0] for row in rows]
    assert steps == [
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8a",
        "8b",
        "8c",
        "8d",
        "9",
        "10",
        "11",
        "12",
        "13",
    ]
    assert rows[-1][2] == "resnet50 81.97 ± 0.06 (3 seeds)"


def test_assumptions_of_pages_in_a_row_are_told_by_the_first_and_the_last():
    rows = [row for row in rows_of(assumed_table()) if row[0] == "`model.body.block`"]
    assert [row[2] for row in rows] == ["roadmap-04-depthwise.v1 … roadmap-13-downsampling.v1"]
    assert len({line.count("|") for line in assumed_table().split("\n")}) == 1


def test_the_readme_shows_a_line_of_every_part_of_a_model():
    text = (recipes_folder() / "README.md").read_text()
    shown = textwrap.dedent(re.search(r"```yaml\nmodel:\n(.*?)```", text, re.S)[1])
    section, positions = parse_recipe(shown, "README.md", Model)
    assert {path[0] for path in positions.lines if path} == set(Model.model_fields)
    assert section.zero_init_last is False
