"""The plan of an ablation: its cells, what is missing, what that takes."""

import io
import math
import re

import pytest
from rich.console import Console
from statsmodels.stats.power import TTestIndPower
from typer.testing import CliRunner

from support.loss_ablation import PAGE, written
from support.loss_ablation import results as results
from support.rows import row_of
from trainer.ablation.cell_run import repeats_of
from trainer.ablation.cells import plan_of_cell
from trainer.ablation.questions import question_of
from trainer.ablation.spec import load_ablation
from trainer.cli.main import app
from trainer.cli.plan_ablation import print_plan
from trainer.recipe.load import ConfigError
from trainer.report.rows import by_cell, find_rows
from trainer.report.tables import METRICS, summarize
from trainer.runs.results import store_row


def printed(path, results, width=120, **choices) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    machine = {"device": "cpu", "precision": "auto", "workers": "0"}
    print_plan(
        out, str(path), choices.get("data_dir"), machine, results, choices.get("num_measured", 0)
    )
    return out.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_of_an_ablation_lists_its_cells_and_missing_runs(results, tmp_path, width):
    text = printed(tmp_path / "loss.yaml", results, width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for said in (
        "loss BCE or CE",
        "Which loss?",
        "one at a time",
        "A2 with test_resnet on digits",
        "2 epochs",
        "0, 1",
        "test_resnet on digits: 3 cells, 44 steps each, 2 epochs",
        "batch.images 64",
        "79.8",
        "published: Table 1",
        "6 runs: 3 with a row",
        "3 to run",
        "first: make recipe=A2 model=test_resnet data=digits seed=0",
    ):
        assert said in flat, said
    rows = {
        line.split("  ")[0].strip("│┃ ").split("│")[0].strip(): line
        for line in text.splitlines()
        if "of 2" in line
    }
    assert "1 of 2" in rows["BCE"] and "the base, A2.v2" in rows["BCE"]
    assert "2 of 2, 1 diverged" in rows["CE"] and "loss ce" in rows["CE"]
    assert "0 of 2" in rows["soft BCE"] and "loss.threshold off" in rows["soft BCE"]


def test_cumulative_steps_are_described_by_what_they_add(tmp_path):
    text = PAGE.replace("name: one_at_a_time", "name: cumulative").replace(
        "  factors:\n    - name: loss\n      levels:", "  steps:"
    )
    text = text.replace("        - {name: CE", "    - {name: CE").replace(
        "        - {name: soft BCE, set: {loss.threshold: null}}",
        "    - {name: + GELU, set: {model.activation: {name: gelu}}}\n    - {name: A3, recipe: A3}",
    )
    lines = printed(written(tmp_path, text), tmp_path / "results").splitlines()
    shown_cells = {
        cells[0].strip(): cells[1].strip()
        for cells in (line.strip("│┃").split("│") for line in lines)
        if len(cells) > 3
    }
    assert shown_cells["CE"] == "loss ce" and shown_cells["+ GELU"] == "model.activation gelu"
    assert shown_cells["A3"].startswith("recipe A3.v2: ") and "repeats off" in shown_cells["A3"]


def test_the_estimate_is_of_what_is_missing_and_says_what_it_rests_on(results, tmp_path):
    text = " ".join(printed(tmp_path / "loss.yaml", results, num_measured=2).split())
    assert re.search(
        r"3 runs to do, (about )?[\d.]+ (seconds?|minutes|hours) one after another", text
    )
    assert "estimated from 2 steps and one batch of val for each of 1 kind of" in text
    assert "cpu, float32, 1 thread;" in text
    table = text.partition("minutes/run")[2]
    assert "soft BCE" in table and "CE │ 0" not in table.replace("soft BCE", "")


@pytest.mark.parametrize(("load", "is_told"), [(2.0, True), (0.1, False), (None, False)])
def test_an_estimate_that_was_measured_beside_other_work_says_so(
    results, tmp_path, monkeypatch, load, is_told
):
    monkeypatch.setattr("trainer.cli.plan_ablation.load_per_core", lambda: load)
    text = printed(tmp_path / "loss.yaml", results, num_measured=1)
    assert ("busy machine" in text) == is_told
    assert ("to do, about " in text) == is_told


def test_the_first_command_is_of_the_run_that_the_sweep_begins_with(results, tmp_path):
    """Rows of BCE seed 0 and CE: what is left begins with the first seed of the third cell."""
    path = tmp_path / "loss.yaml"
    stored = by_cell(question := question_of(load_ablation(path)), find_rows(results, [question]))
    first = next(
        repeat for repeat in repeats_of(load_ablation(path)) if not stored[repeat.cell, repeat.seed]
    )
    assert (first.cell, first.seed) == ("soft BCE", 0)
    words = printed(path, results, width=400).partition("command of the first: ")[2].split("\n")[0]
    assert "seed=0" in words and "loss.threshold=null" in words


def test_a_plan_of_cells_that_learn_nothing_says_so(tmp_path):
    text = printed(written(tmp_path, PAGE.replace("epochs: 2", "epochs: 1")), tmp_path / "none")
    assert "about chance in every cell" in text
    assert "chance" not in printed(
        written(tmp_path, PAGE.replace("epochs: 2", "epochs: 6")), tmp_path / "none"
    )


def test_a_plan_whose_rows_are_all_at_chance_says_so(tmp_path):
    path = written(tmp_path, PAGE.replace("epochs: 2", "epochs: 6"))
    for cell in load_ablation(path).cells:
        for seed in (0, 1):
            row = row_of(plan_of_cell(cell, seed), top1_pct=10.0, majority_pct=10.0)
            store_row(tmp_path / "results", row)
    assert "no run is above chance" in " ".join(printed(path, tmp_path / "results").split())


def test_plan_and_table_have_the_same_seeds_needed(tmp_path):
    path = written(tmp_path, PAGE.replace("[0, 1]", "[0, 1, 2]"))
    ablation = load_ablation(path)
    for number, cell in enumerate(ablation.cells):
        for seed in (0, 1, 2):
            score = 80.0 + number * seed + seed**2 / 4
            store_row(tmp_path / "results", row_of(plan_of_cell(cell, seed), top1_pct=score))
    question = question_of(ablation)
    rows = by_cell(question, find_rows(tmp_path / "results", [question]))
    cells = summarize(question, rows, METRICS["top1"]).cells
    needed = [one.needed.num_seeds for one in cells if one.needed]
    text = " ".join(printed(path, tmp_path / "results").split())
    assert f"seeds needed: {min(needed)} to {max(needed)} a cell" in text


def test_where_the_data_is_not_here_nothing_is_estimated(tmp_path):
    path = written(
        tmp_path,
        PAGE.replace("[digits]", "[imagenet-1k]").replace("batch.images: 64", "batch.images: 512"),
    )
    text = printed(path, tmp_path / "results", num_measured=2)
    assert "no time estimate: " in text and "hours" not in text


def test_a_model_that_a_cell_cannot_have_is_refused_at_its_line(tmp_path):
    path = written(
        tmp_path, PAGE.replace("loss.name: ce", "model.stem: {name: patchify, patch_px: 64}")
    )
    with pytest.raises(ConfigError, match=r"loss\.yaml:18: the cell CE, test_resnet on digits: "):
        printed(path, tmp_path / "results")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--ablation", "norm-micro-batch", "--recipe", "A1"],
            "recipe=: ablation=norm-micro-batch sets it",
        ),
        (
            ["--ablation", "norm-micro-batch", "--set", "epochs=1"],
            "set=: ablation=norm-micro-batch sets it",
        ),
        (["--measure", "0"], "measure=: only for the plan of an ablation"),
        (["--workers", "2"], "workers=: only for the plan of an ablation"),
        (["--ablation", "norm-micro-bach"], "did you mean norm-micro-batch?"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, sentence):
    done = CliRunner().invoke(app, ["plan", *words], prog_name="rsb")
    assert done.exit_code == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_the_plan_has_the_seeds_that_the_stated_difference_needs(results, tmp_path):
    """By RSB's spread on 360 images, unpaired, at the level of one of the two comparisons."""
    path = written(tmp_path, PAGE.replace("seeds:", "smallest_points: 2.5\nseeds:"))
    std = 0.10 * math.sqrt(50_000 / 360)
    num = math.ceil(TTestIndPower().solve_power(2.5 / std, power=0.8, alpha=0.05 / 2))
    text = " ".join(printed(path, results).split())
    assert f"seeds needed: {num} a cell, to show a difference of 2.5 points" in text


def test_the_command_prints_the_plan(results, tmp_path):
    words = [
        "plan",
        "--ablation",
        str(tmp_path / "loss.yaml"),
        "--results",
        str(results),
        "--measure",
        "0",
    ]
    done = CliRunner().invoke(app, words, prog_name="rsb")
    assert done.exit_code == 0 and "Which loss?" in done.output and "3 to run" in done.output
