"""The study of the range test says what its rows say, and other finders' rules are what their
descriptions say.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.runs.job import Job, deviation_rows, plan_of

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "tests" / "benchmarks"


def loaded(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


foreign_rules = loaded("foreign_rules")
study = loaded("study_lr_find")
STORE = study.Store(ROOT / "results")
VALUES = np.geomspace(1e-6, 10, 200)
PLACE = np.log10(VALUES)


@pytest.mark.parametrize("table", ["grid_table", "seeds_table", "rules_table", "row_list"])
def test_the_page_says_what_the_rows_say(table):
    assert getattr(study, table)(STORE) in (ROOT / "results/lr-find.md").read_text()


def test_the_rows_are_whole_and_of_a_clean_checkout():
    for row in STORE.rows.values():
        assert not row["dirty"] and row["epochs"] == 9 and row["device"], row["run"]


def test_every_kept_range_test_says_a_value_or_why_there_is_none():
    for path in (ROOT / "results/lr-find").glob("*.json"):
        found = json.loads(path.read_text())
        assert (found["value"] is None) == found["reason"].startswith("no reliable suggestion: "), (
            path.name
        )
        assert len(found["ramps"]) == 3


@pytest.mark.parametrize("pair", study.PAIRS, ids=str)
def test_every_peak_of_the_study_makes_a_plan_and_its_row_is_found_again(pair):
    for peak in ("1e-07", "0.0123", "10"):
        plan = plan_of(Job(pair.page, pair.model, overrides=pair.overrides(peak)))
        assert plan.recipe.lr.peak == float(peak) and plan.recipe.average is None
        row = {"recipe": pair.page, "model": pair.model, "data": "digits", "seed": 0}
        row["deviations"] = [change.model_dump() for change in deviation_rows(plan)]
        assert study.Store._place(row) == (pair.page, pair.model, float(peak), 0)


def test_a_grid_of_factors_of_three_goes_on_in_both_directions():
    assert study.on_ladder(0.01, 0.0301) == pytest.approx(0.03)
    assert study.on_ladder(0.01, 1e-5) == pytest.approx(0.01 / 3**6)
    assert study.on_ladder(0.01, 0.013) == 0.01


def test_the_rules_of_other_finders_on_a_curve_whose_answer_is_known():
    """Flat to 1e-4, a straight fall to 1e-1, flat to 1, then up: what each description says of it."""
    losses = np.interp(PLACE, [-6, -4, -1, 0, 0.5], [2.3, 2.3, 0.5, 0.5, 9.0])
    assert foreign_rules.valley(VALUES, losses) == pytest.approx(10**-2.0, rel=0.1)
    assert foreign_rules.minimum(VALUES, losses) == pytest.approx(0.01, rel=0.1)
    assert 1e-4 < foreign_rules.steep(VALUES, losses) < 0.1
    bent = losses - 0.3 * np.exp(-((PLACE + 2) ** 2))  # steepest in one place
    assert foreign_rules.steep(VALUES, bent) == foreign_rules.steepest_gradient(VALUES, bent), (
        "the ratios are equal"
    )
    left = foreign_rules.slide(VALUES[:160], losses[:160])
    assert left == VALUES[160 - 1 - 15], (
        "both ends of the first interval lie on the same straight line"
    )


def test_averages_are_those_of_the_descriptions():
    losses = [2.0, 1.0, 4.0]
    corrected = [2.0, (0.9 * 2 + 1) / 1.9, (0.81 * 2 + 0.9 * 1 + 4) / 2.71]
    assert foreign_rules.averaged(losses, 0.9, True) == pytest.approx(corrected)
    assert foreign_rules.averaged(losses, 0.5, False) == pytest.approx([2.0, 1.5, 2.75])


def test_a_curve_ends_where_it_diverged_and_short_ones_have_no_answer():
    values, losses = foreign_rules.until_diverged(
        np.arange(6.0), np.array([2.0, 1.0, 1.5, 3.9, 4.1, 1.0]), 4.0
    )
    assert len(values) == len(losses) == 4
    values, losses = foreign_rules.until_diverged(np.arange(3.0), np.array([2.0, np.nan, 1.0]), 4.0)
    assert list(losses) == [2.0]
    for rule in foreign_rules.RULES:
        assert foreign_rules.suggestion(rule, [(VALUES[:6], np.full(6, 2.3))]) is None


def made_up_ramps():
    losses = np.interp(PLACE, [-6, -4, -1, 0, 0.5], [2.3, 2.3, 0.5, 0.5, 9.0])
    return [{"seed": seed, "values": list(VALUES), "losses": list(losses)} for seed in range(3)]


def made_up_score(peak):
    """Best at 0.01; above 0.5 it diverges."""
    return None if peak > 0.5 else 98 - 10 * np.log10(peak / 0.01) ** 2


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A study whose range test finds 0.03 and whose runs score by made_up_score; the list of runs
    that were trained.
    """
    (tmp_path / "rows").mkdir()
    (tmp_path / "lr-find.md").write_text((ROOT / "results/lr-find.md").read_text())
    trained = []

    def train(pair, peak, runs, results, seed=0):
        if len(trained) == 3:
            trained.append("stopped")
            return 75
        text = study.peak_text(peak)
        trained.append(text if seed == 0 else f"{text} seed {seed}")
        row = {
            "run": f"{pair}-{text}-s{seed}",
            "recipe": pair.page,
            "model": pair.model,
            "data": "digits",
            "seed": seed,
        }
        row["deviations"] = [{"path": "lr.peak", "before": "1", "after": text, "origin": "set"}]
        (results / "rows" / f"{row['run']}.json").write_text(
            json.dumps(row | {"top1_pct": seed and 90 + seed or made_up_score(peak)})
        )
        return 0

    def find(pair, runs):
        return {"value": 0.03, "reason": "made up", "rules": {}, "ramps": made_up_ramps()}

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "find", find)
    return tmp_path, trained


def test_the_study_goes_on_where_it_was_stopped_and_tables_what_it_found(made_up):
    results, trained = made_up
    pair = study.PAIRS[0]
    assert study.study([pair], results / "runs", results, True) == 75
    assert trained == ["0.00333", "0.01", "0.03", "stopped"]
    assert study.study([pair], results / "runs", results, True) == 0
    assert trained[4:6] == ["0.09", "0.27"] and len(set(trained)) == len(trained), (
        "nothing is trained twice"
    )
    count = len(trained)
    assert study.study([pair], results / "runs", results, True) == 0 and len(trained) == count
    store = study.Store(results)
    assert study.best_of_grid(store, pair) == 98
    assert study.distance_of(store, pair, 0.03) == pytest.approx(10 * np.log10(3) ** 2)
    assert study.distance_of(store, pair, 0.011) == 0
    page = (results / "lr-find.md").read_text()
    assert (
        "| A1 | resnet18 | 0.03 | 95.72 | 98.00 | 95.72 |" in page
        and study.rules_table(store) in page
    )
    assert "| recommended | 0.03: 2.28 | 2.28 | 2.28 |" in page
    assert "| fastai minimum | " in page and "not run" not in study.rules_table(store)


def test_a_rate_that_beats_the_recommended_one_and_that_one_are_trained_on_more_seeds(made_up):
    results, trained = made_up
    pair = study.PAIRS[0]
    while study.study([pair], results / "runs", results, False) == 75:
        pass
    del trained[:]
    trained.extend(["another call"] * 4)  # this one is not stopped
    assert study.more_seeds(study.PAIRS, results / "runs", results) == 0
    assert trained[4:] == ["0.03 seed 1", "0.03 seed 2", "0.01 seed 1", "0.01 seed 2"]
    page = (results / "lr-find.md").read_text()
    assert "| A1 | resnet18 | 0.03 | 95.72 | 91.00 | 92.00 | 92.91 | recommended |" in page
    assert "| A1 | resnet18 | 0.01 | 98.00 | 91.00 | 92.00 | 93.67 |  |" in page


def test_a_pair_without_a_reliable_suggestion_says_so_in_its_cell(made_up):
    results, _ = made_up
    pair = study.PAIRS[1]
    store = study.Store(results)
    store.path(pair).parent.mkdir(parents=True)
    store.path(pair).write_text(
        json.dumps(
            {"value": None, "reason": "no reliable suggestion: the seeds differ", "ramps": []}
        )
    )
    assert f"| {pair.page} | {pair.model} | none: the seeds differ |" in study.grid_table(store)
    assert study.best_of_grid(store, pair) is None and not list(study.wanted(store, [pair], True))
