"""TensorBoard reads what a run wrote, and no disk of it ends the run."""

import errno
import itertools
import os

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.runs import append_only_log as kept_file
from trainer.runs.loggers import tensorboard as module
from trainer.runs.loggers.tensorboard import Board


def points(folder) -> list:
    return [
        (point.step, point.value)
        for point in EventAccumulator(str(folder)).Reload().Scalars("loss")
    ]


def test_tensorboard_reads_points_and_pictures(tmp_path):
    board = Board(tmp_path, 0)
    for step in (1, 2, 3):
        board.scalars({"loss": 0.5 * step}, step)
    Image.new("RGB", (6, 4)).save(tmp_path / "first_batch.png")
    board.picture("first_batch", tmp_path / "first_batch.png", 0)
    assert points(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("first_batch")
    assert (image.height, image.width) == (4, 6)


def test_points_that_were_lost_with_a_process_are_hidden(tmp_path):
    first, second = Board(tmp_path, 0), Board(tmp_path, 2)
    for step in (1, 2, 3):
        first.scalars({"loss": step}, step)
    second.scalars({"loss": 30}, 3)
    assert points(tmp_path) == [(1, 1), (2, 2), (3, 30)]


def test_many_boards_of_one_second_are_read_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1.7e9)
    monkeypatch.setattr(module, "_numbers", itertools.count(8))
    for first_step in range(4):
        Board(tmp_path, first_step).scalars({"loss": first_step}, first_step + 1)
    assert points(tmp_path) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def test_a_full_disk_loses_no_point(tmp_path, monkeypatch):
    board = Board(tmp_path, 0)
    with monkeypatch.context() as patch:

        def full(*given):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(kept_file.os, "pwrite", full)
        board.scalars({"loss": 1}, 1)
        assert board.file.error is not None
    board.scalars({"loss": 2}, 2)
    assert board.file.error is None and points(tmp_path) == [(1, 1), (2, 2)]
