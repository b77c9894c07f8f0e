"""The committed compatibility matrix is complete, and a sample of its cells is as computed now."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from trainer.base.errors import UserError
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import newest_recipe_paths
from trainer.runs import summary as show
from trainer.tools import matrix
from trainer.tools.matrix import (
    MODELS,
    MatrixCell,
    chosen_models,
    chosen_recipes,
    fill,
    matrix_markdown,
    noise_plan,
    try_cell,
    untested_family,
)

TABLE = (Path(__file__).parents[2] / "results" / "matrix.md").read_text()
ROWS = {
    cells[0]: dict(zip(MODELS, cells[1:], strict=True))
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| recipe")
    for cells in [[cell.strip() for cell in line.strip("| \n").split("|")]]
}
CLASSIFYING = [path.stem for path in newest_recipe_paths() if load_recipe(path).task is None]
REASONS = dict(re.findall(r"^(\d+)\. (.*)$", TABLE, re.M))


def test_the_matrix_has_every_recipe_and_every_model():
    (head,) = [line for line in TABLE.splitlines() if line.startswith("| recipe")]
    assert [cell.strip() for cell in head.strip("| ").split("|")] == ["recipe", *MODELS]
    assert list(ROWS) == CLASSIFYING


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnet34.a1_in1k", ""),
        ("convnext_base", ""),
        ("vit_tiny_patch16_224", "vision_transformer"),
        ("beit_base_patch16_224", "beit"),
        ("swinv2_tiny_window8_256", "swin_transformer_v2"),
    ],
)
def test_a_family_that_the_matrix_has_no_model_of_is_untested(model, family):
    assert untested_family(model) == family


def test_every_cell_is_a_size_or_a_reason():
    for row in ROWS.values():
        for cell in row.values():
            assert re.fullmatch(r"ok \d+\.\d{3}", cell) or cell.strip("[]") in REASONS, cell
    assert all("; " in reason or "leave" in reason for reason in REASONS.values())


def sample() -> list[tuple[str, str]]:
    """Small models, a recipe of each kind, and the first cell of each of the first reasons."""
    steps = [
        ("A3.v2", "resnet18"),
        ("convnext.v2", "convnext_atto"),
        ("gn-ws.v1", "resnet18"),
        ("ffcv-rn18-16.v1", "resnet18"),
    ]
    cells = [(recipe, model, cell) for recipe, row in ROWS.items() for model, cell in row.items()]
    refused = [
        next((recipe, model) for recipe, model, cell in cells if cell == f"[{number}]")
        for number in REASONS
    ]
    return steps + refused[:3]


@pytest.mark.parametrize(("recipe", "model"), sample())
def test_a_cell_is_as_computed_now(recipe, model):
    cell = try_cell(recipe, model)
    shown = ROWS[recipe][model]
    if cell.num_params is None:
        assert REASONS[shown.strip("[]")] == cell.reason
    else:
        assert shown == f"ok {cell.num_params / 1e6:.3f}"


def test_a_cell_deviates_from_its_recipe_in_sizes_alone():
    for recipe in ("A1.v2", "torchvision-v1.v1", "convnext.v2"):
        for change in noise_plan(recipe, "resnet18").deviations:
            assert change.origin == "profile"
            assert change.path.split(".")[0] in ("batch", "mix", "image", "lr", "average"), (
                change.path
            )


def test_a_refusal_is_a_cell_and_a_failure_is_none(monkeypatch):
    def refuses(plan):
        raise UserError("model.norm: no such place; use another")

    monkeypatch.setattr(matrix, "stepped", refuses)
    assert try_cell("A3", "resnet18") == MatrixCell(
        "A3", "resnet18", None, "model.norm: no such place; use another"
    )

    def fails(plan):
        raise RuntimeError("a bug")

    monkeypatch.setattr(matrix, "stepped", fails)
    with pytest.raises(RuntimeError) as caught:
        try_cell("A3", "resnet18")
    assert caught.value.__notes__ == ["in A3 on resnet18"]


def test_equal_reasons_share_a_number():
    cells = [
        MatrixCell("a", "m", None, "one"),
        MatrixCell("a", "n", 1_500_000),
        MatrixCell("b", "m", None, "two"),
        MatrixCell("b", "n", None, "one"),
    ]
    lines = matrix_markdown(cells).splitlines()
    assert "| a | [1] | ok 1.500 |" in lines and "| b | [2] | [1] |" in lines
    assert lines[-2:] == ["1. one", "2. two"]


def test_the_matrix_is_filled_row_by_row_and_the_bar_moves_with_it(monkeypatch):
    monkeypatch.setattr(matrix, "try_cell", lambda recipe, model: MatrixCell(recipe, model, 1))
    with show.progress(Console(), "cells", 4) as each:
        counted = []
        cells = list(fill(["a", "b"], ["m", "n"], lambda: (counted.append(1), each())))
    assert [(cell.recipe, cell.model) for cell in cells] == [
        ("a", "m"),
        ("a", "n"),
        ("b", "m"),
        ("b", "n"),
    ]
    assert len(counted) == 4


def test_recipes_and_models_are_chosen_by_name():
    assert chosen_recipes("A1, A2.v1") == ["A1.v2", "A2.v1"] and list(
        chosen_models("resnet18 resnet101")
    ) == ["resnet18", "resnet101"]
    assert chosen_recipes("") == CLASSIFYING and chosen_models("") == MODELS
    with pytest.raises(UserError, match="did you mean resnet101"):
        chosen_models("resnet1O1")
