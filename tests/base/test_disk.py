"""A disk that takes nothing is told of once a minute, and tried for a while at the end."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.base import disk as module
from trainer.base.disk import Troubles, keep_trying, must_write
from trainer.base.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(s=1000.0, slept=[])
    made.monotonic = lambda: made.s

    def sleep(seconds: float) -> None:
        made.slept.append(seconds)
        made.s += seconds

    made.sleep = sleep
    monkeypatch.setattr(module, "time", made)
    return made


def test_one_line_a_minute_says_all_that_is_not_written_and_one_that_it_is_over(clock):
    lines = []
    troubles = Troubles(Path("runs/x"), lines.append)
    for second in range(150):
        clock.s = 1000.0 + second
        troubles.note("metrics.jsonl", FULL)
        troubles.note("a checkpoint", FULL, "; the last one there is that of step 30")
    assert len(lines) == 3  # at once, after 60 s, after 120 s
    for word in ("runs/x", "metrics.jsonl", "No space left on device", "continues"):
        assert word in lines[0]
    assert (
        "metrics.jsonl (No space left on device), a checkpoint (No space left on device; the last"
        " one there is that of step 30)" in lines[1]
    )
    troubles.note("metrics.jsonl", None)
    assert len(lines) == 3
    troubles.note("a checkpoint", None)
    assert lines[3:] == ["runs/x: all is written again"]
    troubles.note("a checkpoint", None)
    assert len(lines) == 4
    troubles.note("a checkpoint", FULL)  # again: told at once
    assert len(lines) == 5


def test_where_the_line_itself_cannot_be_written_it_is_told_once(clock):
    lines = []

    def say(line: str) -> None:  # as a log does, whose own file is on the full disk
        lines.append(line)
        troubles.note("log.txt", FULL)

    troubles = Troubles(Path("runs/x"), say)
    troubles.note("metrics.jsonl", FULL)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("num_failures", "is_written", "slept"), [(0, True, 0), (3, True, 6), (100, False, 10)]
)
def test_the_end_is_tried_for_a_while(clock, num_failures, is_written, slept):
    calls = []

    def write() -> None:
        calls.append(1)
        if len(calls) <= num_failures:
            raise FULL

    assert (keep_trying(write, 10) is None) == is_written
    assert sum(clock.slept) == slept


def test_a_signal_ends_the_trying(clock):
    def write() -> None:
        raise FULL

    assert keep_trying(write, 1000, lambda: clock.s > 1003) is FULL
    assert sum(clock.slept) == 4


def test_a_run_that_cannot_begin_is_one_line(tmp_path):
    with (
        pytest.raises(
            UserError,
            match=(
                r"runs/x: cannot write there \(No space left on device\); check free space.*runs="
            ),
        ) as caught,
        must_write(Path("runs/x")),
    ):
        raise FULL
    assert "\n" not in str(caught.value)
