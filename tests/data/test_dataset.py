"""Both splits as a run opens them: where images are augmented and decoded changes no input."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.base.settings import make_settings
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.builtin import FolderSet, open_set
from trainer.data.index import open_index
from trainer.distributed.communicator import alone
from trainer.recipe.profiles import PROFILES
from trainer.runs.job import Job, plan_of
from trainer.tasks import task_of


@pytest.fixture(scope="module")
def digits():
    return OpenedData(*(open_set(PROFILES["digits"], None, split) for split in ("train", "val")))


@pytest.mark.parametrize(
    ("page", "departures"),
    [
        ("A2", ""),
        (
            "A2",
            "mix=null repeats=null augment_splits=3 "
            "'loss={name: jensen_shannon, weight: 12, loss: {name: ce}}'",
        ),
        ("torchvision-v2", ""),
    ],
    ids=["rand_augment", "splits", "trivial_augment and erasing"],
)
def test_workers_that_augment_give_the_model_the_same_bits(digits, page, departures):
    plan = plan_of(Job(page, "resnet18", "digits", None, 0, departures))
    settings = make_settings("cpu", workers="0")
    task, ahead = (
        task_of(plan, settings),
        digits.train_stream(plan, replace(settings, num_workers=2), 3),
    )
    for own in (
        batch for batch, _ in zip(digits.train_stream(plan, settings, 3), range(3), strict=False)
    ):
        other = next(ahead)
        assert (
            not own.is_augmented
            and other.is_augmented
            and not torch.equal(own.images, other.images)
        )
        for mine, theirs in zip(task.prepare(own), task.prepare(other), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("repeats", ["null", "3"])  # in parts of a step, with repeats
def test_one_set_of_processes_makes_training_and_evaluations(make_folder, repeats):
    root = make_folder(train={"a": 12, "b": 12}, val={"a": 3, "b": 3})
    words = f"repeats={repeats} batch.images=12 batch.norm_images=6 epochs=2 image.train_px=32"
    plan = plan_of(
        Job("A2", "resnet18", str(root), None, 0, f"{words} image.test_px=32 lr.warmup_epochs=1")
    )
    data, none = open_data(plan.profile, root), make_settings("cpu", workers="0")
    settings, said = replace(none, num_workers=2), []
    expected = list(data.val_batches(plan, none))
    with data.started_for(plan, settings, alone(), said.append) as started:
        pids = {process.pid for process in multiprocessing.active_children()}
        training = started.train_stream(plan, settings, 0)
        for own in data.train_stream(plan, none, 0):
            found = next(training)
            assert torch.equal(own.ids, found.ids) and torch.equal(own.labels, found.labels)
            evaluated = list(started.val_batches(plan, settings))
            assert all(
                torch.equal(mine, theirs)
                for one, other in zip(expected, evaluated, strict=True)
                for mine, theirs in zip(one, other, strict=True)
            )
            assert {process.pid for process in multiprocessing.active_children()} == pids
    assert len(pids) == 2 and not multiprocessing.active_children() and not said


def test_the_row_names_the_loader_and_its_decoder(digits, make_folder, monkeypatch):
    settings = make_settings("cpu", workers="0")
    root = make_folder(train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    files = OpenedData(*(FolderSet(open_index(Path(root), split)) for split in ("train", "val")))
    assert digits.loader_name(settings) == "torch"
    assert files.loader_name(settings).startswith("torch, simplejpeg ")
    assert files.loader_name(replace(settings, loader="pil")) == "pil"
