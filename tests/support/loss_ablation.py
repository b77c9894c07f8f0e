"""An ablation of three losses, two seeds each, and a store with a part of its rows."""

import pytest

from support.rows import row_of
from trainer.ablation.cells import plan_of_cell
from trainer.ablation.spec import load_ablation
from trainer.runs.results import store_row

PAGE = """\
name: loss
title: "BCE or CE"
question: "Which loss?"
source: "nobody"
recipe: A2
models: [test_resnet]
data: [digits]
seeds: [0, 1]
budget: {epochs: 2}
set:
  batch.images: 64
design:
  name: one_at_a_time
  base: BCE
  factors:
    - name: loss
      levels:
        - {name: CE, set: {loss.name: ce}}
        - {name: soft BCE, set: {loss.threshold: null}}
published:
  - {cell: BCE, top1_pct: 79.8, source: "Table 1"}
"""


def written(folder, text: str, name: str = "loss"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def results(tmp_path):
    """A store with a row of one cell and seed, and one of another cell that diverged."""
    cells = load_ablation(written(tmp_path, PAGE)).cells
    for cell, seed, status in (
        (cells[0], 0, "finished"),
        (cells[1], 0, "diverged"),
        (cells[1], 1, "finished"),
    ):
        plan = plan_of_cell(cell, seed)
        store_row(tmp_path / "results", row_of(plan, status=status))
    return tmp_path / "results"
