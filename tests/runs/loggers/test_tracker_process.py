"""Whatever a tracker does, the run is as without it; and what it is told, it is told once."""

import os
import signal
import sys
import time
from collections import Counter

import pytest

from support import forked
from support.commands import rsb
from support.fake_tracker import FakeTracker
from support.repeats import repeat_of, shared_in
from support.unwritable import at_steps, go, left_by, run_folder
from trainer.ablation.cell_run import run_repeat
from trainer.base import settings
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings, trackers_of
from trainer.runs.loggers import tracker_process as module
from trainer.runs.loggers.tracker import About
from trainer.runs.loggers.tracker_process import Tracking
from trainer.runs.results import read_row_file

CURVES = {"train/loss_nats", "train/lr", "speed/images_per_s", "speed/wait_share"}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeTracker:
    return FakeTracker(tmp_path / "fake", monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert go(folder)[0] == EXIT_DONE
    return left_by(folder)


def tracking(folder, said: list[str]) -> Tracking:
    about = About("name", str(folder), (), {"seed": 0})
    return Tracking(["wandb"], lambda: about, said.append)


def test_a_run_tells_its_start_its_curves_its_picture_and_its_row(undisturbed, tmp_path, fake):
    code, row, printed = go(tmp_path, track="wandb")
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed and fake.is_over()
    (start,) = fake.calls("init")
    assert start["name"] == row.run
    assert start["config"]["recipe"]["loss"] and start["config"]["seed"] == row.seed
    assert start["config"]["deviations"]["batch.images"].endswith("-> 96 (set)")
    said = {(name, call["step"]) for call in fake.calls("log") for name in call["names"]}
    assert said > {(name, step) for name in CURVES for step in (10, 14)}
    assert said > {("view/first_batch", 0), ("val_average/top1_pct", 14)}
    (summary,) = fake.calls("summary")
    assert summary["values"]["status"] == "finished"
    assert summary["values"]["row"]["top1_pct"] == row.top1_pct
    assert [call["exit_code"] for call in fake.calls("finish")] == [0]
    assert "printed by the package" not in printed
    log = run_folder(tmp_path) / "trackers" / "wandb.log"
    assert "printed by the package" in log.read_text()


@pytest.mark.parametrize("kind", ["raise", "exit", "kill", "hang"])
@pytest.mark.parametrize("call", ["import", "init", "save", "log", "summary", "finish"])
def test_no_fault_of_a_tracker_reaches_the_run(tmp_path, fake, monkeypatch, call, kind):
    fake.fail(call, kind)
    if kind == "hang":
        monkeypatch.setattr(module, "END_S", 2.0)
    said = []
    about = About("name", str(tmp_path), ("recipe.yaml",), {"seed": 0})
    with Tracking(["wandb"], lambda: about, said.append) as open_:
        (tracker,) = open_.trackers
        for step in range(3):
            tracker.scalars({"loss": 1.0}, step)
        open_.row = {"status": "finished", "steps": 3}
    assert fake.is_over()
    assert fake.calls(call) and len(said) in (1, 2)
    assert all(line.startswith("wandb: ") and "\n" not in line for line in said)


@pytest.mark.parametrize(("call", "kind"), [("init", "hang"), ("log", "kill"), ("log", "raise")])
def test_the_row_and_the_curves_are_those_of_a_run_without_it(
    undisturbed, tmp_path, fake, monkeypatch, call, kind
):
    fake.fail(call, kind)
    monkeypatch.setattr(module, "END_S", 1.0)
    code, _, printed = go(tmp_path, track="wandb")
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed and fake.is_over()
    assert "wandb: " in printed


def test_a_tracker_that_takes_nothing_costs_no_wait_and_no_memory(tmp_path, fake, monkeypatch):
    fake.fail("init", "hang")
    monkeypatch.setattr(module, "MOST_WAITING_BYTES", 1000)
    monkeypatch.setattr(module, "STOP_S", 0.0)
    said, started_s = [], time.monotonic()
    with tracking(tmp_path, said) as open_:
        (tracker,) = open_.trackers
        for step in range(5000):  # some 5000 x 60 bytes, where a pipe takes 65536
            tracker.scalars({"train/loss_nats": 1.0}, step)
        assert len(tracker._waiting) <= 1000
        assert len(tracker.news()) == 1
    assert time.monotonic() - started_s < 20 and fake.is_over()


def test_a_stopped_run_is_resumed_as_the_same_one(undisturbed, tmp_path, fake, monkeypatch):
    with monkeypatch.context() as patch:
        at_steps(patch, {12: lambda run: os.kill(os.getpid(), signal.SIGTERM)})
        assert go(tmp_path, track="wandb")[0] == EXIT_STOPPED
    assert [call["exit_code"] for call in fake.calls("finish")] == [EXIT_STOPPED]
    code, _, _ = go(tmp_path, track="wandb")
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed
    told_once(fake)
    assert [call["exit_code"] for call in fake.calls("finish")] == [EXIT_STOPPED, 0]


def test_after_kill_9_nothing_is_told_twice(tmp_path, fake):
    words = [*forked.words(tmp_path, checkpoint_s=3600), "--track=wandb"]
    code, _ = forked.end_of(words, "step", 17, prepare=fake.prepare())
    assert code == -signal.SIGKILL
    code, printed = forked.end_of(words, prepare=fake.prepare())
    assert code == 0, printed
    told_once(fake)


def told_once(fake: FakeTracker) -> None:
    """Two processes told one run each of its points once."""
    starts = fake.calls("init")
    assert len(starts) == 2 and len({start["id"] for start in starts}) == 1
    told = Counter((name, call["step"]) for call in fake.calls("log") for name in call["names"])
    assert set(told.values()) == {1}
    assert {name for name, _ in told} > CURVES


def test_a_cell_of_an_ablation_is_grouped_by_both(tmp_path, fake):
    repeat = repeat_of(0.1, overrides="epochs=1 batch.images=256", ablation="sizes", cell="small")
    assert run_repeat(repeat, shared_in(tmp_path, track="wandb", workers="0")) == EXIT_DONE
    (start,) = fake.calls("init")
    assert (start["group"], start["job_type"]) == ("sizes", "small")


def test_only_the_first_rank_has_trackers(tmp_path, fake):
    words = [*forked.words(tmp_path), "--track=wandb", "--procs=2"]
    done = forked.end_of(words, prepare=fake.prepare())
    assert done[0] == 0, done[1]
    assert len(fake.calls("init")) == 1


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    for command in (["train"], ["ablate", "--ablation=norm-micro-batch"]):
        done = rsb(*command, "--track=mlflow")
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1 and 'pip install "rsb[mlflow]"' in done.stderr


def test_a_folder_named_like_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as a run of W&B leaves it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="track=wandb: not installed"):
        trackers_of("wandb")


def test_a_mistyped_tracker_is_refused():
    with pytest.raises(UserError, match=r"track=wanbd: unknown \(did you mean wandb\?\)"):
        make_settings("cpu", track="wanbd")


def test_trackers_are_named_with_commas_or_spaces(fake):
    assert trackers_of("") == trackers_of("tensorboard") == ()
    assert trackers_of("wandb, tensorboard wandb") == ("wandb",)


def test_the_row_says_nothing_of_trackers(tmp_path, fake):
    code, _, printed = go(tmp_path, track="wandb")
    assert code == EXIT_DONE, printed
    (path,) = (tmp_path / "results" / "rows").glob("*.json")
    assert "wandb" not in path.read_text() and read_row_file(path).status == "finished"
