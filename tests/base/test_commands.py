"""Printed commands run as they are printed, by make and by rsb."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from support.committed import ROOT
from trainer.ablation.cells import command as cell_command
from trainer.ablation.spec import load_ablation
from trainer.base.commands import command
from trainer.cli.main import app
from trainer.cli.words import options_of

GROUP = typer.main.get_command(app)
# text about make itself, and files that only make writes
ABOUT_MAKE = (
    "cli/hints.py",
    "datasets/beton.py",
    "tools/doctor.py",
    "tools/doctor_probes.py",
    "tools/matrix.py",
)


@pytest.fixture(params=["make", "rsb"])
def called_as(request, monkeypatch):
    monkeypatch.setenv("RSB_CALLED_AS", request.param if request.param == "make" else "")
    return request.param


def parsed(printed: str, called_as: str) -> tuple[str, dict]:
    """The command and its options, as the program's own parser takes the printed words."""
    first, *words = shlex.split(printed)
    assert first == called_as
    name, *options = options_of(words, GROUP)
    return name, GROUP.commands[name].make_context(name, options).params


def test_a_cells_command_is_the_programs(called_as):
    for cell in load_ablation("norm-micro-batch").cells:
        name, params = parsed(cell_command(cell, 3), called_as)
        assert (name, params["recipe"], params["seed"]) == ("train", cell.recipe, 3)
        assert params["set_"] == cell.overrides


def test_a_file_elsewhere_is_named_by_its_path(called_as):
    path = "my studies/it's.yaml"
    name, params = parsed(command("ablate", ablation=path), called_as)
    assert (name, params["ablation"]) == ("ablate", path)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_value_arrives_as_it_was(text):
    printed = command(recipe="A1", set=text)
    assert shlex.split(printed)[1:] == ["recipe=A1", f"set={text}"]


def test_empty_words_are_left_out_and_zero_is_not():
    assert command("plan", recipe="A1", seed=0, set="", data_dir=None).split(" ", 1)[1] == (
        "plan recipe=A1 seed=0"
    )


def constants(path: Path) -> list[str]:
    """The texts of a file that may be printed: all but docstrings."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_no_text_names_make_by_itself():
    """Whoever installed the package by pip has no make: `command` knows how it was called."""
    targets = "|".join([*GROUP.commands, "recipe="])
    files = [path for path in (ROOT / "trainer").rglob("*.py") if "report" not in path.parts]
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in files
        if not str(path).endswith(ABOUT_MAKE)
        for text in constants(path)
        if re.search(rf"\bmake ({targets})\b", text)
    ]
    assert not found
