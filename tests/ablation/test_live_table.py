"""What a sweep shows: cells, seeds, epochs, losses, scores, states, on a terminal and in a file."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from support.repeats import repeat_of, row_of, shared_in
from trainer.ablation.cell_run import record_failure
from trainer.ablation.live_table import (
    RunProgress,
    SweepTable,
    closing_lines,
    read_progress,
    summary,
)
from trainer.ablation.runner import (
    DIVERGED,
    ELSEWHERE,
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    RunStatus,
)
from trainer.runs.plan_file import write_plan


def status(smoothing: float, state: str, **facts) -> RunStatus:
    repeat = replace(repeat_of(0.1), cell=f"{smoothing:g}", key=f"{smoothing:g}")  # all of one plan
    return RunStatus(repeat, 0, state=state, **facts)


@pytest.fixture
def shared(tmp_path):
    return shared_in(tmp_path)


def run_folder(shared, repeat):
    folder = shared.runs / (repeat.prefix + "abcdef")
    write_plan(folder, repeat.job, repeat.plan)
    return folder


def text_of(table, statuses, width=120, height=40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(table.table(statuses))
    return console.file.getvalue()


def test_progress_is_read_from_the_last_lines_and_a_half_written_one_is_left_out(tmp_path):
    lines = [{"step": 10 * number, "loss_nats": 1 / number, "lr": 1.0} for number in range(1, 400)]
    lines.insert(-1, {"step": 3980, "top1_pct": 55.5, "weights": "model"})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4000, "lo'
    )
    (tmp_path / "speed.jsonl").write_text(
        '{"step": 3990, "images_per_s": 64.0, "wait_share": 0.0}\n'
    )
    assert read_progress(tmp_path) == RunProgress(3990, 1 / 399, 55.5, 64.0)
    assert read_progress(None) == read_progress(tmp_path / "nothing") == RunProgress()


def test_the_time_left_is_the_images_left_at_the_last_speed():
    repeat = repeat_of(0.1)  # steps of 32 images
    assert RunProgress(step=repeat.plan.num_steps - 10, images_per_s=64.0).left_s(repeat) == 5.0
    assert RunProgress().left_s(repeat) is None


def test_every_state_has_its_line_and_what_runs_its_progress(shared):
    running = status(0.1, RUNNING)
    folder = run_folder(shared, running.repeat)
    per_epoch = running.repeat.plan.steps_per_epoch
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": per_epoch, "loss_nats": 0.25, "lr": 1.0}) + "\n"
    )
    (folder / "speed.jsonl").write_text(
        json.dumps({"step": per_epoch, "images_per_s": per_epoch * 32 / 61}) + "\n"
    )
    failed = status(0.3, FAILED)
    failed.failure = record_failure(failed.repeat, shared, -9)
    done = status(0.2, FINISHED)
    done.row = row_of(done.repeat)
    table = SweepTable(
        Console(file=io.StringIO(), force_terminal=True, height=40), shared, "smoothings"
    )
    text = text_of(table, [done, status(0.4, WAITING), failed, running])
    lines = {
        line.split("│")[1].strip(): [part.strip() for part in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.count("│") > 5
    }
    assert lines["0.1"] == ["0", "1.0/2", "0.2500", "", "running", "0:01:01"]
    assert lines["0.2"][2:5] == ["0.0500", "97.50", "finished"]
    assert lines["0.3"][4].startswith("failed: ended by SIGKILL") and lines["0.4"][4] == "waiting"
    assert list(lines) == ["0.1", "0.3", "0.2", "0.4"]  # what runs and what went wrong first
    assert "4 runs: 1 finished, 1 failed, 1 running, 1 waiting" in text


def test_a_small_terminal_shows_what_fits(shared):
    table = SweepTable(
        Console(file=io.StringIO(), force_terminal=True, width=100, height=14), shared, "smoothings"
    )
    statuses = [status(number / 100, WAITING) for number in range(1, 30)]
    statuses[20].state = ELSEWHERE
    text = text_of(table, statuses)
    assert "0.21" in text and "… 23 more" in text and text.count("\n") <= 14


def test_without_a_terminal_each_change_is_one_line(shared):
    console = Console(file=io.StringIO(), width=200)
    one, two = status(0.1, WAITING), status(0.2, FINISHED, is_done_before=True)
    two.row = row_of(two.repeat)
    with SweepTable(console, shared, "smoothings") as table:
        for state in (WAITING, RUNNING, RUNNING, DIVERGED, DIVERGED):
            one.state = state
            one.row = (
                row_of(one.repeat, status="diverged", top1_pct=None, loss_nats=None)
                if state == DIVERGED
                else None
            )
            table([one, two])
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("0.1  seed 0  running") and second == "0.1  seed 0  diverged"


def test_on_a_terminal_one_table_is_drawn_in_place(shared):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    with SweepTable(console, shared, "smoothings") as table:
        table([status(0.1, WAITING)])
        table([status(0.1, FINISHED)])
    text = console.file.getvalue()
    assert "\x1b[1A\x1b[2K" in text and text.count("time left") >= 2  # the second over the first


def test_the_last_lines_name_each_failure_its_output_and_what_to_do(shared):
    failed = status(0.3, FAILED)
    failed.failure = record_failure(failed.repeat, shared, -9)
    (shared.runs / "cells" / failed.repeat.key / "output.txt").write_text("x")
    first, second, third = closing_lines([failed, status(0.1, FINISHED)], shared, "losses")
    assert first == "2 runs: 1 finished, 1 failed"
    assert "0.3  seed 0  exit -9: ended by SIGKILL" in second and second.endswith("output.txt")
    assert "make ablate ablation=losses" in third
    assert closing_lines([status(0.1, FINISHED)], shared, "losses") == ["1 run: 1 finished"]


@pytest.mark.parametrize(("top1_pct", "is_told"), [((10.0, 11.0), True), ((10.0, 60.0), False)])
def test_the_last_lines_say_where_no_run_is_above_chance(shared, top1_pct, is_told):
    statuses = []
    for smoothing, score in zip((0.1, 0.2), top1_pct, strict=True):
        one = status(smoothing, FINISHED)
        one.row = row_of(one.repeat, top1_pct=score, majority_pct=10.0)
        statuses.append(one)
    lines = closing_lines(statuses, shared, "losses")
    assert any("above chance" in line for line in lines) == is_told


def test_what_a_name_could_do_to_a_terminal_is_shown_not_done(shared):
    bad = status(0.1, FAILED)
    record = record_failure(bad.repeat, shared, 1)
    bad.failure = record.model_copy(update={"error": "a\x1b[2J [bold]b"})
    table = SweepTable(Console(file=io.StringIO(), force_terminal=True, height=40), shared, "x")
    text = text_of(table, [bad])
    assert "\x1b[2J" not in text and "[bold]b" in text
    assert "\x1b" not in closing_lines([bad], shared, "x")[1]


def test_the_summary_counts_what_was_there_before():
    statuses = [
        status(0.1, FINISHED, is_done_before=True),
        status(0.2, FINISHED),
        status(0.3, DIVERGED),
    ]
    assert summary(statuses) == "3 runs: 2 finished, 1 diverged (1 before this call)"
