"""How often a run evaluates and logs, and on how many images at once: nothing it learns changes."""

import json

import pytest

from support.commands import rsb
from support.plans import small_set
from trainer.api import evaluate, load_run, train

SET = small_set("epochs=5 batch.images=240 batch.norm_images=48")


def go(folder, **settings):
    places = {"runs": folder / "runs", "results": folder / "results", "progress": False}
    settings = {"set": SET, "device": "cpu", "workers": 0} | places | settings
    return train("A2", "test_resnet", **settings)


def lines_of(run):
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["step"] for line in found if "loss_nats" in line]
    return losses, [line["epoch"] for line in found if "weights" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return go(tmp_path_factory.mktemp("plain"))


def test_rare_evaluations_give_the_same_run(plain, tmp_path):
    run = go(tmp_path, eval_every=2, log_every=3, eval_batch=50)
    steps = plain.row.steps // 5
    assert lines_of(plain)[1] == [1, 2, 3, 4, 5]
    losses, epochs = lines_of(run)
    assert epochs == [2, 4, 5]  # the last always
    ends = {steps * epoch for epoch in range(1, 6)}
    assert losses == sorted({*range(3, 5 * steps + 1, 3), *ends})
    same = ("run", "weights_sha256", "top1_pct")
    assert [getattr(run.row, name) for name in same] == [getattr(plain.row, name) for name in same]
    assert (run.row.eval_batch, run.row.num_top1_by_epoch) == (50, ())
    assert evaluate(run).top1_pct == run.row.top1_pct
    done = rsb("verify", "--run", run.folder, "--results", tmp_path / "results", "--workers", "0")
    assert done.exit_code == 0, done.output


def test_a_stopped_run_goes_on_with_its_own_lines(plain, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _stopped_at(8, tmp_path, eval_every=3)
    with pytest.raises(ValueError, match="eval_every=3"):
        go(tmp_path)
    run = go(tmp_path, eval_every=3)
    assert lines_of(run)[1] == [3, 5] and run.row.weights_sha256 == plain.row.weights_sha256


def _stopped_at(step, folder, **settings):
    from trainer.runs.guard import Guard

    before = Guard.before_step

    def striking(guard, number, run):
        if number == step:
            run.stop.signal_name = "SIGINT"
        return before(guard, number, run)

    Guard.before_step = striking
    try:
        return go(folder, **settings)
    finally:
        Guard.before_step = before


PLATEAU = small_set(
    "epochs=6 batch.images=240 batch.norm_images=48 lr.warmup_epochs=1"
    " lr.schedule='{name: plateau, factor: 0.5, patience_epochs: 0, threshold: 0.5, end: 0.0}'"
)


def test_a_rate_that_waits_for_the_score_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    whole = go(tmp_path / "whole", set=PLATEAU)
    rates = whole.history.dropna(subset=["lr"]).groupby("epoch")["lr"].last()
    assert rates.nunique() > 2, "nothing was reduced"
    with pytest.raises(KeyboardInterrupt):
        _stopped_at(17, tmp_path / "halted", set=PLATEAU)
    resumed = go(tmp_path / "halted", set=PLATEAU)
    assert resumed.row.weights_sha256 == whole.row.weights_sha256
    text = [(run.folder / "metrics.jsonl").read_bytes() for run in (whole, resumed)]
    assert text[0] == text[1]
    done = rsb(
        "verify", "--run", whole.folder, "--results", tmp_path / "whole/results", "--workers", "0"
    )
    assert done.exit_code == 0, done.output
    with pytest.raises(ValueError, match="eval_every=2"):
        go(tmp_path / "rare", set=PLATEAU, eval_every=2)


@pytest.mark.parametrize("name", ["eval_every", "eval_batch", "log_every"])
def test_less_than_one_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=0"):
        go(tmp_path, **{name: 0})
    done = rsb("train", "--recipe", "A2", f"--{name}", "0")
    assert done.exit_code == 2


def test_the_run_is_found_and_loaded(plain):
    assert load_run(plain.folder).row == plain.row
