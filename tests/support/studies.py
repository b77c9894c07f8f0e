"""A small ablation with rows."""

import pytest

from support.commands import rsb
from support.tabled import stored_row
from trainer.ablation.spec import load_ablation
from trainer.runs.results import store_row

PAGE = """
name: two
title: "Two"
question: "Which of two?"
source: "none"
recipe: A2
models: [test_resnet]
data: [digits]
seeds: [0, 1]
budget: {epochs: 2}
design: {name: listed, cells: [{name: BCE}, {name: CE, set: {loss: {name: ce}}}]}
"""


@pytest.fixture()
def page(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(PAGE)
    return path


@pytest.fixture()
def study(page, tmp_path):
    """An ablation of two cells and two seeds with all rows but one: (its path, results, runs)."""
    results = tmp_path / "results"
    base, other = load_ablation(page).cells
    for one, seed, value in ((base, 0, 90.0), (base, 1, 92.0), (other, 0, 93.5)):
        store_row(results, stored_row(one, seed, value))
    return page, results, tmp_path / "runs"


def table(study, *words):
    page, results, runs = study
    return rsb("table", "--ablation", page, "--results", results, "--runs", runs, *words)
