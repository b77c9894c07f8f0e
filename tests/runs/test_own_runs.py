"""The list of one's own runs: folders and rows, with their state."""

import json
import subprocess
import sys

import pytest

from support.commands import ROOT, rsb
from support.rows import ROW
from trainer.runs.lock import acquire
from trainer.runs.own_runs import own_runs
from trainer.runs.results import RowDeviation, store_row
from trainer.runs.watch import watched_runs

PLAN = {"model": "resnet18", "data": "digits", "seed": 3, "num_steps": 396, "steps_per_epoch": 44}


@pytest.fixture
def place(tmp_path):
    """(runs, results) with one stopped run, one finished, and one row alone."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    _begun(runs / "stopped")
    _begun(runs / ROW.run)
    (runs / ROW.run / "row.json").write_bytes(ROW.as_json())
    store_row(results, ROW)
    store_row(results, ROW.model_copy(update={"run": "alone", "status": "diverged"}))
    (runs / "lr-find-x").mkdir()
    return runs, results


def _begun(folder):
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "recipe.yaml").write_text("name: A3\nversion: 1\n")
    lines = [{"step": 44, "top1_pct": 40.0}, {"step": 66, "loss_nats": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def listed(place):
    return {one.run: one for one in own_runs(*place)}


def test_folders_and_rows_have_their_states(place):
    found = listed(place)
    assert {run: one.state for run, one in found.items()} == {
        "stopped": "stopped", ROW.run: "finished", "alone": "diverged"
    }  # fmt: skip
    stopped = found["stopped"]
    assert (stopped.recipe, stopped.model, stopped.data) == ("A3.v1", "resnet18", "digits")
    assert (stopped.epochs_done, stopped.epochs, stopped.top1_pct) == (1.5, 9.0, 40.0)
    finished = found[ROW.run]
    assert (finished.recipe, finished.epochs_done, finished.top1_pct) == ("A1.v1", 10, 97.5)
    assert finished.folder and found["alone"].folder is None


def test_a_locked_folder_is_running(place):
    with acquire(place[0] / "stopped"):
        assert listed(place)["stopped"].state == "running"
    assert listed(place)["stopped"].state == "stopped"


def test_a_killed_run_has_the_same_state_in_both_lists(place):
    """It had no time to take its lock away."""
    folder = place[0] / "stopped"
    with acquire(folder) as lock:
        (path,) = folder.glob("claim.*")
        left = path.read_bytes()
        lock.release()
    path.write_bytes(left)
    assert listed(place)["stopped"].state == "killed"
    assert {one.own.run: one.state for one in watched_runs(*place)}["stopped"] == "killed"
    search = place[0] / "lr-find-x"
    (search / path.name).write_bytes(left)
    assert listed(place)["lr-find-x"].state == "killed"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 1, "num_steps": "x"}', "\x00"])
def test_damaged_files_are_a_state_and_no_error(place, content):
    (place[0] / "stopped" / "plan.json").write_text(content)
    (place[0] / ROW.run / "row.json").write_text(content)
    found = listed(place)
    assert {found["stopped"].state, found[ROW.run].state} == {"damaged"}


def test_rows_that_came_with_the_project_are_not_ones_own():
    shipped = {path.stem for path in (ROOT / "results" / "rows").glob("*.json")}
    listing = ["git", "-C", str(ROOT), "ls-files", "results/rows"]
    tracked = subprocess.run(listing, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("no checkout")
    names = {path.rpartition("/")[2].removesuffix(".json") for path in tracked.stdout.split()}
    found = {one.run for one in own_runs(ROOT / "no runs", ROOT / "results")}
    assert found == shipped - names


def test_the_list_is_a_table_or_json(place):
    runs, results = place
    words = ("runs", "--runs", runs, "--results", results)
    shown = rsb(*words)
    assert shown.exit_code == 0 and "1.5 of 9" in shown.stdout and "97.50" in shown.stdout
    found = json.loads(rsb(*words, "--json").stdout)
    assert {one["run"]: one["state"] for one in found}["stopped"] == "stopped"
    nothing = rsb("runs", "--runs", runs / "none", "--results", runs / "none")
    assert nothing.exit_code == 0 and "no run in" in nothing.stdout


def test_of_many_rows_without_a_folder_the_table_has_the_last(place):
    runs, results = place
    for i in range(30):
        time = f"2026-11-22T00:00:{i:02}+00:00"
        store_row(results, ROW.model_copy(update={"run": f"more-{i}", "finished_utc": time}))
    words = ("runs", "--runs", runs, "--results", results)
    shown = rsb(*words).stdout
    assert "more-29" in shown and "more-9 " not in shown and "stopped" in shown
    assert "and 11 older rows" in shown
    assert len(json.loads(rsb(*words, "--json").stdout)) == 33


def test_the_list_needs_no_torch(place):
    runs, results = map(str, place)
    script = (
        "import runpy, sys\n"
        "try: runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print({'torch', 'timm', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, "runs", f"runs={runs}", f"results={results}", "json=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_an_unfinished_runs_score_is_that_of_the_weights_that_will_be_scored(place):
    folder = place[0] / "stopped"
    lines = [
        {"step": 44, "weights": name, "top1_pct": pct}
        for name, pct in (("model", 40.0), ("average", 60.0))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert listed(place)["stopped"].top1_pct == 40.0
    average = "average: {name: ema, is_scored: true}\n"
    (folder / "recipe.yaml").write_text(f"name: A3\nversion: 1\n{average}")
    assert listed(place)["stopped"].top1_pct == 60.0


def test_deviations_that_somebody_chose_are_listed(place):
    runs, results = place
    changes = [
        {"path": "epochs", "before": "100", "after": "9", "origin": "profile"},
        {"path": "loss.name", "before": "bce", "after": "ce", "origin": "set"},
    ]
    (runs / "stopped" / "plan.json").write_text(json.dumps(PLAN | {"deviations": changes}))
    row = ROW.model_copy(update={"deviations": tuple(RowDeviation(**one) for one in changes)})
    (runs / ROW.run / "row.json").write_bytes(row.as_json())
    found = listed(place)
    assert found["stopped"].deviations == found[ROW.run].deviations == ("loss.name=ce",)
    assert "loss.name=ce" in rsb("runs", "--runs", runs, "--results", results).stdout


def test_a_diverged_run_has_the_epochs_that_it_came_to(place):
    folder = place[0] / ROW.run
    row = ROW.model_copy(update={"status": "diverged", "steps": 66, "epochs": 9})
    (folder / "row.json").write_bytes(row.as_json())
    assert (listed(place)[ROW.run].epochs_done, listed(place)[ROW.run].epochs) == (1.5, 9)


def test_folders_of_lr_find_are_listed(place):
    facts = {"value": 0.01, "recipe": "A3.v1", "model": "resnet18", "data": "digits"}
    folder = place[0] / "lr-find-x"
    (folder / "trials").mkdir()
    assert listed(place)["lr-find-x"].state == "stopped"
    (folder / "suggestion.json").write_text(json.dumps(facts))
    found = listed(place)["lr-find-x"]
    assert (found.state, found.recipe, found.model) == ("finished", "A3.v1", "resnet18")
    (folder / "suggestion.json").write_text("[")
    assert listed(place)["lr-find-x"].state == "damaged"
