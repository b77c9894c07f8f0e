"""What can be seen of runs from their files, and that looking changes none of them."""

import json
import os
import time

import numpy as np
import pytest

from support.commands import rsb
from support.rows import ROW
from trainer.base.errors import UserError
from trainer.cli import watch_runs
from trainer.lr_finder.trial import TrialFolder
from trainer.runs.lock import STALE_S, acquire
from trainer.runs.watch import watched_runs

PLAN = {"model": "resnet18", "data": "digits", "seed": 3, "num_steps": 396, "steps_per_epoch": 44}


@pytest.fixture
def place(tmp_path):
    """(runs, results) with a run that was begun and one that has finished."""
    runs = tmp_path / "runs"
    for name in ("begun", ROW.run):
        folder = runs / name
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(PLAN))
        (folder / "recipe.yaml").write_text("name: A3\nversion: 1\nbatch: {images: 32}\n")
        lines = [{"step": 44, "top1_pct": 40.0}, {"step": 66, "loss_nats": 1.25}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        speed = {"step": 66, "images_per_s": 320.0, "wait_share": 0.25}
        (folder / "speed.jsonl").write_text(json.dumps(speed) + "\n")
        (folder / "log.txt").write_text("first\nlast line <b>\x1b[2J\n")
    (runs / ROW.run / "row.json").write_bytes(ROW.as_json())
    return runs, tmp_path / "results"


def seen(place):
    return {one.own.run: one for one in watched_runs(*place)}


def test_a_running_run_has_its_progress_and_the_time_left(place):
    with acquire(place[0] / "begun"):
        one = seen(place)["begun"]
    assert one.state == "running" and one.done_share == pytest.approx(66 / 396, rel=0.01)
    assert (one.loss_nats, one.own.top1_pct, one.wait_share) == (1.25, 40.0, 0.25)
    assert one.left_s == pytest.approx((396 - 66) * 32 / 320)
    assert 0 <= one.silent_s < 60


def test_stopped_killed_and_silent_runs_are_told_apart(place):
    folder = place[0] / "begun"
    assert seen(place)["begun"].state == "stopped" and seen(place)["begun"].left_s is None
    with acquire(folder) as lock:
        (path,) = folder.glob("claim.*")
        old = time.time() - 2 * STALE_S
        os.utime(path, (old, old))
        assert seen(place)["begun"].state == "no heartbeat"
        left = path.read_bytes()
        lock.release()
    path.write_bytes(left)  # as of a process that had no time to take it away
    assert seen(place)["begun"].state == "killed"
    finished = seen(place)[ROW.run]
    assert finished.state == "finished" and finished.done_share == 1.0


def test_a_search_for_a_learning_rate_has_its_trials_so_far(place):
    """As `make runs` lists it, from its first trial on; of a run there are no trials."""
    folder = place[0] / "lr-find-A3.v1-resnet18-digits-b1c11e"
    trials, lines = TrialFolder(folder / "trials"), []
    with acquire(folder):
        for number in range(3):
            one = seen(place)[folder.name]
            assert (one.state, one.own.num_trials, one.loss_nats) == ("running", number, None)
            done = rsb("watch", "--runs", place[0], "--results", place[1])
            lines += [line for line in done.output.splitlines() if folder.name in line]
            trials.write({"seed": number, "purpose": "ramp"}, np.array([0.1]))
        assert 0 <= seen(place)[folder.name].silent_s < 60
    assert all(f" {number} trial" in line for number, line in enumerate(lines)), lines
    assert len(lines) == 3 and seen(place)["begun"].own.num_trials is None
    assert seen(place)[folder.name].state == "stopped"
    (folder / "suggestion.json").write_text("{}")
    assert seen(place)[folder.name].state == "finished"


def test_half_written_files_end_no_look(place):
    folder = place[0] / "begun"
    for name in ("metrics.jsonl", "speed.jsonl", "recipe.yaml", "log.txt"):
        (folder / name).write_bytes(b'{"step": 66, "loss')
        with acquire(folder):
            one = seen(place)["begun"]
        assert one.state == "running"
    assert one.left_s is None
    (folder / "metrics.jsonl").unlink()
    assert seen(place)["begun"].loss_nats is None


def test_nothing_is_written_or_locked(place):
    def files():
        return {path: path.stat().st_mtime_ns for path in place[0].rglob("*") if path.is_file()}

    before = files()
    seen(place)
    assert files() == before


def test_the_command_prints_once_where_the_output_is_no_terminal(place):
    done = rsb("watch", "--runs", place[0], "--results", place[1])
    assert done.exit_code == 0
    for text in ("begun", ROW.run, "stopped", "finished", "1.2500", "40.00", "320", "25%"):
        assert text in done.output, text
    one = rsb("watch", "--run", "begun", "--runs", place[0], "--results", place[1])
    assert ROW.run not in one.output and "last line <b>" in one.output and "\x1b" not in one.output
    wrong = rsb("watch", "--run", "begin", "--runs", place[0], "--results", place[1])
    assert wrong.exit_code == 2 and "did you mean begun" in wrong.output


def test_a_page_loads_itself_again_and_holds_texts_as_texts(place):
    page = place[0] / "watch.html"
    words = ("--runs", place[0], "--results", place[1], "--once", "--run", "begun", "--page")
    assert rsb("watch", *words, "1").exit_code == 0
    text = page.read_text()
    assert 'http-equiv="refresh"' in text and "last line &lt;b&gt;" in text and "<b>" not in text
    assert rsb("watch", *words, place[0] / "other" / "page.html").exit_code == 0
    assert (place[0] / "other" / "page.html").is_file()
    assert rsb("watch", *words, "/proc/no/page.html").exit_code == 2


def test_it_looks_again_until_interrupted(place):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    page = place[0] / "page.html"
    watch_runs.watch(*place, "", False, str(page), 2.0, wait)
    assert waits == [2.0] * 3 and "0 of 2 runs running" in page.read_text()


def test_no_runs_are_no_error(tmp_path):
    assert rsb("watch", "--runs", tmp_path / "none", "--results", tmp_path).exit_code == 0
    with pytest.raises(UserError):
        watch_runs.watch(tmp_path, tmp_path, "x", True, "", 2.0)
