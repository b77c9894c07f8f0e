"""Curves go on where a run is resumed: nothing that was saved is hidden, nothing that was lost is
made up.
"""

import hashlib
import io
import os
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.base.errors import UserError
from trainer.base.terminal import recorded
from trainer.runs import append_only_log as kept_file
from trainer.runs.append_only_log import whole_lines
from trainer.runs.loggers import logger as module
from trainer.runs.loggers.logger import Log, log_result


def opened(folder, first_step=0, metrics=b""):
    return Log(folder, 40, first_step, metrics, Console(file=io.StringIO(), width=200))


def opened_with(folder, console):
    return Log(folder, 40, 0, b"", console)


def write(log, steps):
    for step in steps:
        log.window(step, step / 10, 1000.0 + step, 0.1, 5.0, 0.0)


def test_the_board_keeps_the_point_at_the_first_step_and_hides_what_came_after_it(tmp_path):
    with opened(tmp_path) as log:
        write(log, (10, 20, 30))
    with opened(tmp_path, first_step=20) as log:
        write(log, (40,))
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss_nats")] == [
        (10, 1010),
        (20, 1020),
        (40, 1040),
    ]


def test_lines_after_the_saved_length_are_cut_away(tmp_path):
    with opened(tmp_path) as log:
        write(log, (10,))
        num_bytes, sha256 = log.metrics_written()
        write(log, (20,))
    path = tmp_path / "metrics.jsonl"
    saved = path.read_bytes()[:num_bytes]
    assert hashlib.sha256(saved).hexdigest() == sha256
    assert whole_lines(path, num_bytes, sha256) == saved
    with opened(tmp_path, 10, saved) as log:
        assert log.metrics_written() == (num_bytes, sha256)
    assert (tmp_path / "metrics.jsonl").read_bytes() == saved


LINES = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
SHA256 = hashlib.sha256(LINES).hexdigest()


@pytest.mark.parametrize("sha256", [SHA256, None])  # None: of an earlier version's checkpoint
@pytest.mark.parametrize(
    ("content", "num_left"),
    [
        (LINES, 3),
        (LINES + b"more", 3),
        (LINES[:-1], 2),
        (LINES[:15], 1),
        (b"\0" * len(LINES), 0),
        (LINES[:12] + b"\0" * 24, 1),
        (b"", 0),
        (None, 0),
    ],
)
def test_of_damaged_curves_the_whole_lines_before_the_damage_are_left(
    tmp_path, content, num_left, sha256
):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert whole_lines(path, len(LINES), sha256) == LINES[: 12 * num_left]


def test_a_pipe_in_a_files_place_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert whole_lines(tmp_path / "metrics.jsonl", 100) == b""
    with pytest.raises(UserError, match="metrics.jsonl: not a regular file"):
        opened(tmp_path)


class Counted:
    """The os module, its calls on files counted and the bytes that they write."""

    def __init__(self):
        self.calls, self.written = Counter(), 0

    def __getattr__(self, name):
        found = getattr(os, name)
        if name not in (
            "stat",
            "fstat",
            "open",
            "close",
            "dup",
            "fsync",
            "pread",
            "pwrite",
            "ftruncate",
        ):
            return found

        def call(*words):
            self.calls[name] += 1
            self.written += len(words[1]) if name == "pwrite" else 0
            return found(*words)

        return call


def test_a_line_costs_as_much_after_10000_steps_as_after_100(tmp_path, monkeypatch):
    """Bytes and calls on files, of steps whose numbers are as long; saved from time to time, as a
    run is.
    """
    counted, costs, first = Counted(), {}, 1_000_000
    monkeypatch.setattr(kept_file, "os", counted)
    with opened(tmp_path) as log:
        for step in range(10, 10_001, 10):
            counted.calls, counted.written = Counter(), 0
            log.window(first + step, 1.5, 2.0, 0.1, 100.0, 0.25)
            costs[step] = counted.written, dict(counted.calls)
            if step % 1000 == 0:
                log.sync()
    assert costs[100] == costs[1010] == costs[10_000]
    num_bytes, calls = costs[100]
    assert (
        300 < num_bytes < 1000 and calls["pwrite"] == 6 and sum(calls.values()) <= 3 * 6
    )  # two lines, four points
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 1000


def test_plain_lines_say_the_time_left(tmp_path, monkeypatch):
    seconds = iter([100.0, 130.0, 160.0])  # opened, then after 10 steps and after 20
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    log = opened(tmp_path)
    write(log, (10, 20))
    log.__exit__()
    lines = log.console.file.getvalue().splitlines()
    assert [line.rpartition("time left ")[2] for line in lines] == ["0:01:30", "0:01:00"]


def test_the_log_file_begins_with_what_was_printed_before_and_ends_with_the_result(tmp_path):
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print("[bold]A3.v1[/] on digits")
    with opened_with(tmp_path, console) as log:
        log.say("epoch 1")
    assert recorded(console) == "" and not console.record
    log_result(tmp_path, "top-1 90 %\n")
    assert (tmp_path / "log.txt").read_text() == "A3.v1 on digits\nepoch 1\ntop-1 90 %\n"
