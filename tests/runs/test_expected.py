"""A run beside earlier ones: which rows, what is said at each evaluation, and how often in error."""

import importlib.util
import io
import json
import math

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from rich.console import Console

from support.commands import ROOT
from support.plans import small_set
from support.ranked import off_track_run, on_ranks
from support.rows import row_of
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_DONE, EXIT_FAILED
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.base.stats import sigma_off
from trainer.data.dataset import open_data
from trainer.recipe import tree
from trainer.runs.best_weights import BEST_FILE, best_epoch, keep_if_best
from trainer.runs.expected import (
    MOST_OUTSIDE,
    ExpectedCurve,
    curve_in,
    expected_curve,
    limits,
    whole_curve,
)
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.results import read_row, store_row

# ---- the statistics


def test_sigma_is_that_of_a_prediction_interval():
    """Just outside SciPy's own one-sided 99 % interval of one more value is 2.33 sigma."""
    scores = [70.2, 70.9, 71.4]
    mean, std = np.mean(scores), np.std(scores, ddof=1)
    reach = scipy.stats.t(df=2, loc=mean, scale=std * math.sqrt(1 + 1 / 3)).ppf(0.01)
    many = 10**9  # images: no floor
    assert sigma_off(reach, scores, many) == pytest.approx(-scipy.stats.norm.isf(0.01))
    assert sigma_off(2 * mean - reach, scores, many) == pytest.approx(scipy.stats.norm.isf(0.01))
    assert sigma_off(mean, scores, many) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("score", [0.0, 50.0, 100.0])
def test_equal_seeds_have_the_spread_of_the_images(score):
    """Without a floor, one image of 360 would be infinitely many sigma off."""
    off = 100 / 360 if score < 100 else -100 / 360
    sigma = sigma_off(score + off, [score] * 3, 360)
    assert 0 < abs(sigma) < limits(1)[0] and math.copysign(1, sigma) == math.copysign(1, off)


def test_one_seed_has_no_spread():
    with pytest.raises(ValueError, match="spread"):
        sigma_off(50.0, [50.0], 360)


def curves_of(generator, num_runs, num_epochs, correlation, num_images=1000):
    """Counts by epoch of runs alike in distribution, whose noise is correlated from epoch to
    epoch.
    """
    noise = generator.normal(size=(num_runs, num_epochs))
    for epoch in range(1, num_epochs):
        fresh = math.sqrt(1 - correlation**2) * noise[:, epoch]
        noise[:, epoch] = correlation * noise[:, epoch - 1] + fresh
    mean = 90 - 60 * np.exp(-np.arange(num_epochs) / 5)
    return np.clip(10 * (mean + 1.5 * noise), 0, num_images).round().astype(int)


@pytest.mark.parametrize("num_epochs", [10, 100])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("num_seeds", [2, 5])
def test_few_healthy_runs_are_called_off_track(num_seeds, correlation, num_epochs):
    """What the README states: of the evaluations at most 1 % are outside, of the runs about 1 % are
    called off track at any of theirs, however long they are and their noise lasts.
    """
    generator, num_runs = np.random.default_rng(0), 200 if num_epochs == 10 else 50
    num_outside = num_off = 0
    for _ in range(num_runs):
        counts = curves_of(generator, num_seeds + 1, num_epochs, correlation)
        rows = [curve_row(n, counts[n], epochs=num_epochs) for n in range(num_seeds)]
        found = [one.state for one in verdicts(ExpectedCurve(rows), counts[-1])]
        num_outside += sum(state in ("below", "off track") for state in found)
        num_off += "off track" in found
    assert num_outside <= MOST_OUTSIDE * num_runs * num_epochs
    assert num_off <= 0.02 * num_runs


def verdicts(expected, counts, num_images=1000):
    """What each evaluation of a run says, by its images right."""
    curve = {}
    for epoch, count in enumerate(counts, start=1):
        curve[epoch] = 100 * int(count) / num_images
        yield expected.verdict(curve)


def curve_row(seed, counts, **changes):
    """A finished row of so many images right by epoch."""
    facts = {"seed": seed, "num_val_images": 1000, "num_top1_by_epoch": tuple(map(int, counts))}
    return ROW.model_copy(update=facts | changes)


# ---- what is said


PLAN = plan_of(Job("A2", "test_resnet", overrides=small_set("epochs=3")))
ROW = row_of(PLAN)


def states(counts, rows=None):
    expected = ExpectedCurve(
        rows or [curve_row(seed, (500 + seed, 700 + 2 * seed, 800 - seed)) for seed in range(3)]
    )
    return [one.state for one in verdicts(expected, counts)]


def test_two_evaluations_in_a_row_below_or_one_far_below_are_off_track():
    assert states([501, 702, 799]) == ["on track"] * 3
    assert states([456, 702, 799]) == ["below", "on track", "on track"]
    assert states([501, 657, 760]) == ["on track", "below", "off track"]
    assert states([300, 702, 799]) == ["off track", "on track", "on track"]
    assert states([900, 950, 799]) == ["above", "above", "on track"]


def test_a_verdict_names_the_numbers_and_a_run():
    rows = [curve_row(seed, (500 + 10 * seed,)) for seed in range(3)]
    verdict = ExpectedCurve(rows).verdict({1: 30.0})
    assert (verdict.epoch, verdict.score_pct, verdict.num_seeds) == (1, 30.0, 3)
    assert (verdict.mean_pct, verdict.std_pct) == (pytest.approx(51.0), pytest.approx(1.0))
    assert verdict.sigma < -limits(3)[0] and verdict.see == rows[0].run
    assert "51.00 ± 1.00 (3 seeds)" in str(verdict)


def test_an_evaluation_that_is_not_known_makes_no_pair():
    rows = [curve_row(seed, (500, 500, 500)) for seed in range(3)]
    assert ExpectedCurve(rows).verdict({1: 45.6, 3: 45.6}).state == "below"
    assert ExpectedCurve(rows).verdict({1: 45.6, 3: 45.6}, every_epochs=2).state == "off track"


def test_curves_are_read_from_lines_and_damaged_ones_are_skipped():
    lines = [
        b'{"step": 10, "epoch": 0.5, "loss_nats": 1.0}',
        b'{"step": 20, "epoch": 1, "weights": "model", "top1_pct": 7.5, "top5_pct": 9}',
        b'{"step": 20, "epoch": 1, "weights": "average", "mIoU_pct": 9.25}',
        b'{"step": 40, "epoch": 2, "weights": "model", "top1_pct": true}', b"[1]", b"\x00", b'{"step": 4',
    ]  # fmt: skip
    assert curve_in(lines, "model") == {1: 7.5}
    assert curve_in(lines, "average") == {1: 9.25}
    assert whole_curve({1: 7, 2: 8}, 2) == (7, 8) and whole_curve({2: 8}, 2) == ()


# ---- which rows


class Data:
    fingerprint, content_sha256 = "0" * 64, None


def stored(results, seeds, overrides="epochs=3", **changes):
    """Rows of a small recipe in a store."""
    rows = []
    for seed in seeds:
        plan = plan_of(Job("A2", "test_resnet", seed=seed, overrides=small_set(overrides)))
        recipe = json.loads(json.dumps(tree.plain(plan.recipe)))
        facts = {"num_top1_by_epoch": (100, 200, 300), "resolved_recipe": recipe}
        rows.append(row_of(plan, **facts | {"bad_images": "fail"} | changes))
        store_row(results, rows[-1])
    return rows


def chosen(results, expect="", is_needed=False, plan=PLAN):
    def plan_of_recipe(recipe):
        return plan_of(Job(recipe, "test_resnet", overrides=small_set("epochs=3")))

    return expected_curve(results, plan, Data, expect, is_needed, plan_of_recipe)


def test_rows_of_the_same_recipe_and_other_seeds_are_compared_with(tmp_path):
    assert chosen(tmp_path) == (None, "")
    stored(tmp_path, [0, 1])  # 0 is the run's own
    stored(tmp_path, [1, 2, 3], "epochs=3 lr.peak=1e-4")
    curve, line = chosen(tmp_path)
    assert curve is None and "1 of the 2 rows" in line
    stored(tmp_path, [2])
    assert chosen(tmp_path)[0].num_seeds == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_top1_by_epoch": ()},
        {"data_fingerprint": "1" * 64},
        {"status": "diverged"},
        {"num_val_images": 10},
    ],
)
def test_rows_that_cannot_be_compared_are_left_out(tmp_path, changes):
    stored(tmp_path, [1, 2, 3], **changes)
    with pytest.raises(UserError, match="stop_if=off_track"):
        chosen(tmp_path, is_needed=True)
    (tmp_path / "rows" / f"{PLAN.identity.prefix}x.json").write_text("{")
    assert chosen(tmp_path)[0] is None


def test_expect_names_a_run_a_cell_or_a_recipe(tmp_path):
    rows = stored(tmp_path, [0, 1, 2])
    other = plan_of(Job("A2", "test_resnet", overrides=small_set("epochs=3 lr.peak=0.05")))
    assert chosen(tmp_path, plan=other) == (None, "")
    assert chosen(tmp_path, rows[0].run, plan=other)[0].num_seeds == 3
    assert chosen(tmp_path, "A2", plan=other)[0].num_seeds == 3
    stored(tmp_path, [5, 6], "epochs=3 lr.peak=0.01", ablation="rates", cell="low")
    assert chosen(tmp_path, "rates/low", plan=other)[0].num_seeds == 2
    for wrong in ("rates/none", "no-such-recipe"):
        with pytest.raises(UserError):
            chosen(tmp_path, wrong, plan=other)
    longer = plan_of(Job("A2", "test_resnet", overrides=small_set("epochs=4")))
    with pytest.raises(UserError, match="4 epochs"):
        chosen(tmp_path, rows[0].run, plan=longer)


# ---- in a run

SMALL = small_set("epochs=3 batch.images=96 batch.norm_images=48")


def go(folder, seed=0, overrides=SMALL, **settings):
    """(exit code, row, what was printed)."""
    job = Job("A2", "test_resnet", seed=seed, overrides=overrides)
    plan = plan_of(job)
    data = open_data(plan.profile, None)
    where = {"runs": folder / "runs", "results": folder / "results"}
    out = Console(file=io.StringIO(), width=140)
    with StopRequest() as stop:
        made = make_settings("cpu", workers="0", **where, **settings)
        code, row = run_job(job, plan, made, data, out, stop)
    return code, row, out.file.getvalue()


def test_a_run_off_track_is_saved_and_resumes_to_the_same_bits(tmp_path):
    """Beside rows that are far better: called at once, exit 1, no row; without
    stop_if it resumes, to the weights of a run that was never compared.
    """
    _, alone, printed = go(tmp_path / "alone")
    assert "expected" not in printed and len(alone.num_top1_by_epoch) == 3
    assert alone.num_top1_by_epoch[-1] == round(alone.top1_pct * alone.num_val_images / 100)
    for seed in (1, 2, 3):
        counts = tuple(350 - n * seed for n in range(3))
        run = alone.run.replace("-s0-", f"-s{seed}-")
        better = {"seed": seed, "num_top1_by_epoch": counts, "run": run}
        store_row(tmp_path / "results", alone.model_copy(update=better))
    cell = {"expect": alone.run.replace("-s0-", "-s1-")}
    code, row, printed = go(tmp_path, stop_if="off_track", **cell)
    assert (code, row) == (EXIT_FAILED, None)
    assert "off track:" in printed and "without stop_if=off_track" in printed
    assert read_row(tmp_path / "results", alone.run) is None
    code, row, printed = go(tmp_path, **cell)
    assert code == EXIT_DONE and "resumed after step" in printed and "off track:" in printed
    assert row.weights_sha256 == alone.weights_sha256
    assert row.num_top1_by_epoch == alone.num_top1_by_epoch and row.stop_if == ""


def test_a_run_off_track_at_its_last_evaluation_has_a_row_and_exit_1(tmp_path):
    short = small_set("epochs=2 batch.images=96 batch.norm_images=48")
    _, alone, _ = go(tmp_path / "alone", overrides=short)
    for seed in (1, 2):
        counts = (alone.num_top1_by_epoch[0] + seed, 350 + seed)
        changes = {"seed": seed, "num_top1_by_epoch": counts, "ablation": "a", "cell": "b"}
        run = alone.run.replace("-s0-", f"-s{seed}-")
        store_row(tmp_path / "results", alone.model_copy(update=changes | {"run": run}))
    code, row, _ = go(tmp_path, overrides=short, stop_if="off_track", expect="a/b")
    assert code == EXIT_FAILED and row.status == "finished" and row.stop_if == "off_track"


def test_all_ranks_agree_to_stop(tmp_path):
    """Rank 0 alone has rows and scores to compare."""
    found = on_ranks(off_track_run, 2, str(tmp_path), small_set())
    assert found == [{"end": ("stopped", True), "epoch": 1.0}] * 2


def test_stop_if_without_rows_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="2 are needed"):
        go(tmp_path, stop_if="off_track")
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))
    with pytest.raises(UserError, match="did you mean off_track"):
        make_settings("cpu", stop_if="offtrack")


def test_the_committed_study_says_what_its_page_says():
    """Ten times the learning rate is off track by the second evaluation, healthy seeds never."""
    path = ROOT / "tests" / "benchmarks" / "study_expected_curve.py"
    spec = importlib.util.spec_from_file_location("study_expected_curve", path)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    text = (ROOT / "results" / "expected-curve.md").read_text()
    assert study.page(ROOT / "results") == text
    for overrides, seeds in ((study.OVERRIDES, study.HEALTHY), (study.WILD_OVERRIDES, study.WILD)):
        for seed in seeds:
            row = study.row_of(seed, overrides, ROOT / "results")
            before = [
                study.row_of(n, study.OVERRIDES, ROOT / "results")
                for n in range(min(seed, study.WILD[0]))
            ]
            counts = row.num_top1_by_epoch, row.num_val_images
            found = [one.state for one in verdicts(ExpectedCurve(before), *counts)]
            assert ("off track" in found[:2]) == (seeds is study.WILD), (row.run, found)


# ---- keep=best


def test_the_best_epochs_weights_are_kept_beside_the_result(tmp_path):
    _, alone, _ = go(tmp_path / "alone")
    code, row, _ = go(tmp_path, keep="best")
    assert code == EXIT_DONE and row.weights_sha256 == alone.weights_sha256
    assert row.top1_pct == alone.top1_pct and alone.best_epoch is None
    counts = row.num_top1_by_epoch
    assert row.best_epoch == 1 + counts.index(max(counts))
    kept = safetensors.torch.load_file(tmp_path / "runs" / row.run / BEST_FILE)
    last = safetensors.torch.load_file(tmp_path / "runs" / row.run / "model.safetensors")
    is_last = all(torch.equal(kept[name], last[name]) for name in last)
    assert set(kept) == set(last) and is_last == (row.best_epoch == row.epochs)


def test_only_better_epochs_are_kept_and_those_of_another_curve_are_not_named(tmp_path):
    model = torch.nn.Linear(1, 1)
    for counts, best in (((5,), 1), ((5, 5), 1), ((5, 5, 7), 3), ((5, 5, 7, 6), 3)):
        curve = dict(enumerate(counts, start=1))
        keep_if_best(tmp_path, model, curve)
        assert best_epoch(tmp_path, curve) == best
    assert best_epoch(tmp_path, {1: 5, 2: 5, 3: 4}) is None
    (tmp_path / BEST_FILE).write_bytes(b"no weights")
    assert best_epoch(tmp_path, {1: 5}) is None
    (tmp_path / BEST_FILE).unlink()
    assert best_epoch(tmp_path, {1: 5}) is None
