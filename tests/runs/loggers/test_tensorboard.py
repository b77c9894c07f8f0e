"""TensorBoard reads what a run wrote, and no disk of it ends the run."""

import errno
import itertools
import os

import numpy as np
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
        board.scalar("loss", 0.5 * step, step)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    board.image("first_batch", pixels, 0)
    assert points(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("first_batch")
    assert (image.height, image.width) == (4, 6)


def test_points_that_were_lost_with_a_process_are_hidden(tmp_path):
    first, second = Board(tmp_path, 0), Board(tmp_path, 2)
    for step in (1, 2, 3):
        first.scalar("loss", step, step)
    second.scalar("loss", 30, 3)
    assert points(tmp_path) == [(1, 1), (2, 2), (3, 30)]


def test_many_boards_of_one_second_are_read_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1.7e9)
    monkeypatch.setattr(module, "_numbers", itertools.count(8))
    for first_step in range(4):
        Board(tmp_path, first_step).scalar("loss", first_step, first_step + 1)
    assert points(tmp_path) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def test_a_full_disk_loses_no_point(tmp_path, monkeypatch):
    board = Board(tmp_path, 0)
    with monkeypatch.context() as patch:

        def full(*given):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(kept_file.os, "pwrite", full)
        board.scalar("loss", 1, 1)
        assert board.file.error is not None
    board.scalar("loss", 2, 2)
    assert board.file.error is None and points(tmp_path) == [(1, 1), (2, 2)]
