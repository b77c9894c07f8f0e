"""A run of detection: killed and resumed, by any workers and ranks, its row, tables and pictures."""

import csv
import io
import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from support import boxed, forked
from support.boxed import DETECTORS, coco_folder, recipe
from support.commands import rsb
from support.endings import ending
from support.ranked import on_ranks
from trainer.base.errors import PlanError, UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import alone
from trainer.engine.state import TrainingState
from trainer.inference.pictures import csv_of
from trainer.runs.job import Job, plan_of
from trainer.tasks import task_of

SETTINGS = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coco_folder(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture(scope="module", params=DETECTORS)
def lines(request):
    """Those of RECIPE that a detector has in other words."""
    return DETECTORS[request.param]


@pytest.fixture(scope="module")
def ended(data, lines, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("ended")
    code, printed = forked.end_of(boxed.words(folder, data, **lines))
    assert code == 0, printed
    return folder


def test_killed_and_resumed_with_other_workers_it_ends_the_same(data, lines, ended, tmp_path):
    for step, workers in ((2, 0), (4, 2)):
        words = boxed.words(tmp_path, data, workers, **lines)
        assert forked.end_of(words, "step", step)[0] == -signal.SIGKILL
    code, printed = forked.end_of(boxed.words(tmp_path, data, 1, **lines))
    assert code == 0 and "resumed after step" in printed, printed
    expected = ending(ended)
    assert ending(tmp_path) == expected
    assert expected["row"]["task"] == "detection" and expected["row"]["bitwise"]


def test_a_row_and_a_table_have_its_scores(ended):
    row = ending(ended)["row"]
    assert list(row["scores_pct"]) == ["map_pct", "map50_pct"]
    assert row["top1_pct"] is None and set(row["class_pct"]) == {"bar", "block"}
    lines = [json.loads(line) for line in ending(ended)["metrics"].splitlines()]
    last = [line for line in lines if "map_pct" in line][-1]
    assert last["map_pct"] == pytest.approx(row["scores_pct"]["map_pct"])
    shown = rsb("runs", "--results", ended / "results", "--runs", ended / "runs")
    assert shown.exit_code == 0 and f"{row['scores_pct']['map_pct']:.2f}" in shown.output, (
        shown.output
    )


def test_predict_writes_pictures_and_the_boxes(ended, data, tmp_path):
    (run,) = (ended / "runs").glob("tiny-boxes*")
    images = data / "images" / "val"
    out = tmp_path / "answers"
    done = rsb("predict", "--run", run, "--images", images, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    paths = sorted(images.glob("*.png"))
    for path in paths:
        assert Image.open(out / path.name).size == Image.open(path).size
    assert len(list(out.glob("*.png"))) == len(paths)


def test_an_export_is_refused_by_the_tasks_name(ended):
    (run,) = (ended / "runs").glob("tiny-boxes*")
    done = rsb("export", "--run", run, "--to", "torch_export")
    assert done.exit_code == 2 and "a run of detection" in done.output, done.output


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_rank_of_four_micro_batches_is_several_ranks(data, lines, tmp_path, num_ranks):
    given = str(recipe(tmp_path, **lines)), str(data), 3
    expected = on_ranks(boxed.steps, 1, *given)[0]
    for found in on_ranks(boxed.steps, num_ranks, *given):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, weight in expected["weights"].items():
            own = found["weights"][name]
            # keys' biases, the middle third, do nothing: their gradient is rounding
            if name.endswith("in_proj_bias"):
                weight, own = (torch.cat([one[:32], one[64:]]) for one in (weight, own))
            torch.testing.assert_close(own, weight, rtol=1e-3, atol=1e-5)


def test_scores_are_the_same_on_any_number_of_ranks(data, lines, tmp_path):
    given = str(recipe(tmp_path, **lines)), str(data)
    expected = on_ranks(boxed.scores, 1, *given)[0]
    for num_ranks in (2, 3):
        for found in on_ranks(boxed.scores, num_ranks, *given):
            assert found.keys() == expected.keys()
            assert found.pop("loss_nats") == pytest.approx(expected["loss_nats"], rel=1e-12)
            assert found == {key: one for key, one in expected.items() if key != "loss_nats"}


def test_it_learns_and_the_level_of_knowing_nothing_is_left_behind(data, lines, tmp_path):
    overrides = "epochs=24 batch.norm_images=8 lr.peak=4e-3 augment.letterbox.scale=null"
    plan = boxed.planned(alone(), str(recipe(tmp_path, **lines)), str(data), overrides)
    opened = open_data(plan.profile, data)
    state, task = TrainingState(plan, SETTINGS), task_of(plan, SETTINGS)
    losses = []
    window = opened.train_stream(plan, SETTINGS, 0)
    for step in range(plan.num_steps):
        losses.append(boxed.train.optimizer_step(state, window, step).item())
    level = task.constant_loss(opened.train)
    assert math.isfinite(level) and np.mean(losses[-6:]) < 0.8 * level < losses[0]
    scores = boxed.evaluate(plan, SETTINGS, state.model, opened.val_batches(plan, SETTINGS))
    assert scores.map50_pct > 5, scores.summary()
    assert task.restored(scores.record()) == scores
    image, boxes = opened.val.read(0), opened.val.read_target(0)
    answer = task.predict(state.model.eval(), image, opened.classes)
    assert answer.pictures[".png"].size == image.size
    best = answer.answers[0]
    overlap = box_iou(torch.tensor([best["box"]]), torch.from_numpy(boxes.sides))
    assert overlap.max() > 0.3 and best["class"] in boxed.CLASSES
    table = list(csv.DictReader(io.StringIO(csv_of(answer.answers).decode())))
    assert len(table) == len(answer.answers) and float(table[0]["box_3"]) == best["box"][2]


def test_the_first_batch_is_shown_with_its_boxes(data, tmp_path):
    plan = boxed.planned(alone(), str(recipe(tmp_path)), str(data))
    batch = next(iter(open_data(plan.profile, data).train_stream(plan, SETTINGS, 0)))
    task = task_of(plan, SETTINGS)
    _, targets = task.prepare(batch)
    plain = batch.images.permute(0, 2, 3, 1).numpy() / 255
    shown = task.shown(plain, targets, ("bar", "block"))
    assert len(shown) == 2 and shown[0].picture.shape == (64, 64, 3)
    assert not np.allclose(shown[0].picture, plain[0])


REFUSED = {
    "loss={name: ce}": "ce",
    "smoothing=0.1": "smoothing",
    "mix={name: mixup, alpha: 0.2, partner: reversed}": "mix",
    "image.train_px=100": "train_px 100",
    "image.test_px=72": "test_px 72",
    "image.test_flip=true": "whole images",
    "image.test_crop_share=0.9": "whole images",
    "repeats=2": "repeats",
    "loss.class_weights=[1.0, 2.0]": "class_weights",
    "augment.random_erasing={share: 0.5, area: [0.02, 0.3], aspect: [0.3, 3.3], fill: noise}": "random_erasing",
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_what_means_whole_images_is_refused_by_name(data, tmp_path, override):
    key, value = override.split("=", 1)
    job = Job(
        recipe=str(recipe(tmp_path)),
        model=boxed.MODEL,
        data=str(data),
        overrides=f"'{key}={value}'",
    )
    with pytest.raises(UserError, match=REFUSED[override]):
        plan_of(job)


def test_data_of_another_task_are_refused_either_way(data, tmp_path):
    with pytest.raises(PlanError, match="detection"):
        plan_of(Job(recipe="A3", model="resnet18", data=str(data)))
    with pytest.raises(PlanError, match="classification"):
        plan_of(Job(recipe=str(recipe(tmp_path)), model="resnet18", data="digits"))


def test_without_pycocotools_a_run_is_refused_before_it_begins(data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.cocoeval", None)
    done = rsb(*boxed.words(tmp_path, data))
    assert done.exit_code == 2 and 'pip install "rsb[detection]"' in done.output
