"""Curves go on where a run is taken up: nothing that was saved is hidden, nothing that was lost is made up."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import log as module
from trainer.errors import UserError
from trainer.log import Log


def opened(folder, first_step=0, metrics_bytes=0):
    return Log(folder, 40, first_step, metrics_bytes, Console(file=io.StringIO(), width=200))


def write(log, steps):
    for step in steps:
        log.window(step, step / 10, 1000.0 + step, 0.1, 5.0, 0.0)


def test_the_board_keeps_the_point_at_the_first_step_and_hides_what_came_after_it(tmp_path):
    with opened(tmp_path) as log:
        write(log, (10, 20, 30))
    with opened(tmp_path, first_step=20) as log:
        write(log, (40,))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss_nats")] == [(10, 1010), (20, 1020), (40, 1040)]


def test_lines_after_the_saved_length_are_cut_away(tmp_path):
    with opened(tmp_path) as log:
        write(log, (10,))
        num_bytes = log.metrics_bytes()
        write(log, (20,))
    saved = (tmp_path / "metrics.jsonl").read_bytes()[:num_bytes]
    with opened(tmp_path, 10, num_bytes):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == saved


@pytest.mark.parametrize("content", [None, b"{}\n"])
def test_curves_shorter_than_saved_are_refused_and_left_as_they_are(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"\d bytes, but its checkpoint counts 100.*checkpoints") as caught:
        opened(tmp_path, 10, 100)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == content


def test_plain_lines_say_the_time_left(tmp_path, monkeypatch):
    seconds = iter([100.0, 130.0, 160.0])  # opened, then after 10 steps and after 20
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    log = opened(tmp_path)
    write(log, (10, 20))
    log.__exit__()
    lines = log.console.file.getvalue().splitlines()
    assert [line.rpartition("time left ")[2] for line in lines] == ["0:01:30", "0:01:00"]
