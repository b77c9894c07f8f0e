"""Checkpoints are written beside the training: one at a time, from one copy, and no failure of the
disk ends it.
"""

import errno
import gc
import os
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from trainer.runs import checkpoint_writer as module
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.checkpoint_writer import Saver, copied_state


def nothing() -> None:
    pass


def state(step: int) -> dict:
    return {"weights": torch.full((5,), float(step)), "progress": {"step": step}}


class Writing:
    """Stands for save_checkpoint: each call waits until it is let go, and notes how many write at
    once.
    """

    def __init__(self, patch) -> None:
        self.entered, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.now, self.most, self.seen, self.error = 0, 0, [], None
        patch.setattr(module, "save_checkpoint", self)

    def __call__(self, folder, step, held, is_kept, before_write):
        self.now += 1
        self.most = max(self.most, self.now)
        self.entered.release()
        assert self.may_end.acquire(timeout=10)
        self.seen.append((step, held["weights"].tolist(), is_kept))
        self.now -= 1
        if self.error is not None:
            raise self.error


def test_the_step_goes_on_while_its_state_as_it_was_is_written(tmp_path, monkeypatch):
    writing = Writing(monkeypatch)
    saver, made = Saver(tmp_path, 60), state(1)
    saver.start(1, made, nothing)
    assert writing.entered.acquire(
        timeout=10
    )  # the writer is in the middle, and this thread is here
    made["weights"].fill_(7)
    assert not saver.is_due()
    writing.may_end.release()
    saver.wait()
    assert writing.seen == [(1, [1.0] * 5, False)] and saver.last_step == 1


def test_never_two_write_at_once(tmp_path, monkeypatch):
    writing = Writing(monkeypatch)
    saver = Saver(tmp_path, 60)
    for _ in range(20):
        writing.may_end.release()
    for step in range(20):
        saver.start(step, state(step), nothing, is_kept=step == 3)
    saver.wait()
    assert writing.most == 1
    assert [(step, kept) for step, _, kept in writing.seen] == [
        (step, step == 3) for step in range(20)
    ]


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, "No space left on device")])
def test_the_one_copy_is_let_go_when_it_is_written_or_not(tmp_path, monkeypatch, error):
    copies = []

    def noting(value):
        made, wait = copied_state(value)
        copies.append(weakref.ref(made["weights"]))
        return made, wait

    monkeypatch.setattr(module, "copied_state", noting)
    writing = Writing(monkeypatch)
    writing.error = error
    saver = Saver(tmp_path, 60)
    for step in range(3):
        saver.start(step, state(step), nothing)
        assert writing.entered.acquire(timeout=10)
        gc.collect()
        assert (
            sum(copy() is not None for copy in copies) == 1
        )  # that of the checkpoint being written, and no other
        writing.may_end.release()
    saver.wait()
    gc.collect()
    assert all(copy() is None for copy in copies)


def test_a_full_disk_is_kept_as_an_error_until_a_checkpoint_is_written(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 60)
    saver.start(1, state(1), nothing)
    saver.wait()

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver.start(2, state(2), full)
    saver.wait()
    assert saver.error.errno == errno.ENOSPC and saver.last_step == 1
    assert load_checkpoint(tmp_path, print)["progress"]["step"] == 1
    saver.start(3, state(3), nothing)
    saver.wait()
    assert saver.error is None and saver.last_step == 3
    assert load_checkpoint(tmp_path, print)["progress"]["step"] == 3


def test_what_is_no_error_of_the_disk_is_raised_where_the_run_waits(tmp_path):
    def wrong() -> None:
        raise ZeroDivisionError("a mistake of ours")

    saver = Saver(tmp_path, 60)
    saver.start(1, state(1), wrong)
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_after_a_failure_a_checkpoint_is_due_sooner(tmp_path, monkeypatch):
    clock = {"s": 0.0}
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock["s"]))
    saver = Saver(tmp_path, 60)
    due = []
    for clock["s"] in (9, 11, 59, 60):
        due.append(saver.is_due())
    assert due == [False, False, False, True]
    saver.error = OSError(errno.ENOSPC, "No space left on device")
    due = []
    for clock["s"] in (9, 10):
        due.append(saver.is_due())
    assert due == [False, True]


def test_with_no_time_between_them_every_step_waits_for_its_own(tmp_path):
    saver = Saver(tmp_path, 0)
    for step in range(1, 4):
        saver.start(step, state(step), nothing)
        assert (
            saver.last_step == step and not saver._thread
        )  # on the disk before the next step begins


def test_a_copied_state_loads_as_the_state_itself_and_shares_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(
        memory_format=torch.contiguous_format
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    original = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "none": None,
        "list": [1, (torch.ones(2), "x")],
    }
    made, wait = copied_state(original)
    wait()
    assert (
        type(made["model"]) is type(original["model"])
        and made["model"]._metadata == original["model"]._metadata
    )
    assert (
        made["list"][1][1] == "x"
        and torch.equal(made["list"][1][0], torch.ones(2))
        and made["none"] is None
    )
    before = {name: tensor.clone() for name, tensor in original["model"].items()}
    moment = made["optimizer"]["state"][0]["exp_avg"].clone()
    for tensor in model.state_dict().values():
        tensor.zero_()
    optimizer.state[next(model.parameters())]["exp_avg"].zero_()
    assert all(torch.equal(made["model"][name], tensor) for name, tensor in before.items())
    assert torch.equal(made["optimizer"]["state"][0]["exp_avg"], moment) and moment.abs().sum() > 0
