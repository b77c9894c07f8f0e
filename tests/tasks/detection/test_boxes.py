"""Boxes go where their pixels go, and are the same for any workers."""

import numpy as np
import pytest
import torch

from support.boxed import MODEL, changed, coco_folder, recipe
from trainer.base.settings import make_settings
from trainer.components.letterbox import Letterbox, whole_box
from trainer.data.dataset import open_data
from trainer.data.profile import find_profile
from trainer.runs.job import Job, plan_of
from trainer.tasks.detection.boxes import Boxes, BoxEvaluation, moved_boxes

SETTINGS = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return coco_folder(tmp_path_factory.mktemp("data") / "boxes")


def planned(folder, tmp_path, overrides="", **job):
    made = recipe(tmp_path)
    return plan_of(Job(recipe=str(made), model=MODEL, data=str(folder), overrides=overrides, **job))


def boxes_of(*sides):
    return Boxes(np.array(sides, np.float32), np.arange(len(sides)), np.zeros(len(sides), bool))


def test_a_box_is_cut_off_and_gone_where_nothing_is_left():
    boxes = boxes_of([0, 0, 10, 10], [40, 40, 60, 60], [19.5, 0, 30, 30])
    found = moved_boxes(boxes, (0, 0, 20, 20), False, 40)  # twice as large
    assert found.sides.tolist() == [[0, 0, 20, 20], [39, 0, 40, 40]] and found.labels.tolist() == [
        0,
        2,
    ]
    found = moved_boxes(boxes, (0, 0, 20, 20), True, 40)
    assert found.sides.tolist() == [[20, 0, 40, 20], [0, 0, 1, 40]]
    found = moved_boxes(boxes, (10, 10, 100, 50), False, 50)
    assert found.sides.tolist() == [[30, 15, 50, 25], [9.5, 0, 20, 10]]


def test_letterbox_keeps_proportions_and_draws_by_sample():
    heights, widths = np.array([48, 64, 10]), np.array([64, 48, 200])
    ids = np.array([[0, 3, 0], [0, 4, 0], [2, 5, 1]])
    boxes, _ = Letterbox(interpolation="bilinear").draw(1, ids, heights, widths)
    assert boxes.tolist() == [[0, 0, 64, 64], [0, 0, 64, 64], [0, 0, 200, 200]]
    part = Letterbox(scale=(0.5, 2.0), interpolation="bilinear")
    boxes, is_bicubic = part.draw(1, ids, heights, widths)
    again, _ = part.draw(1, ids[1:2], heights[1:2], widths[1:2])
    assert again.tolist() == boxes[1:2].tolist() and not is_bicubic.any()
    ids = np.stack([np.zeros(4000, int), np.arange(4000), np.zeros(4000, int)], axis=1)
    boxes, _ = part.draw(7, ids, np.full(4000, 100), np.full(4000, 200))
    top, left, height, width = boxes.T
    assert (height == width).all() and height.min() >= 100 and height.max() <= 400
    assert height.mean() == pytest.approx(200 * np.log(4) / 1.5, rel=0.03)  # of an even scale
    inside = (left + width <= 200) | ((left == 0) & (width >= 200))
    assert inside.all() and (top[height >= 100] == 0).all() and left.max() > 50
    assert whole_box(48, 64) == (0, 0, 64, 64)


def test_boxes_move_exactly_as_their_pixels(folder, tmp_path):
    """Every box of a training micro-batch holds its colour, and a little outside there is none."""
    plan = planned(folder, tmp_path, "augment.letterbox.scale=[0.6,1.7]")
    stream = open_data(plan.profile, folder).stream(plan, SETTINGS)
    colors, num_boxes = torch.tensor([[200, 30, 30], [30, 30, 220]]), 0
    for key in stream.keys(0, 6):
        batch = stream[key]
        assert batch.labels.shape[0] == 2 and batch.labels.dtype == torch.float32
        for image, rows in zip(batch.images, batch.labels, strict=True):
            is_color = (image[None].int() - colors[:, :, None, None]).abs().amax(1) < 60
            for left, top, right, bottom, label in rows[rows[:, 4] >= 0].tolist():
                mask = is_color[int(label)]
                inner = mask[round(top + 1) : round(bottom - 1), round(left + 1) : round(right - 1)]
                if inner.numel() > 20:
                    num_boxes += 1
                    assert inner.float().mean() > 0.25, (left, top, right, bottom)  # or covered
            covered = torch.zeros_like(is_color)
            for left, top, right, bottom, label in rows[rows[:, 4] >= 0].tolist():
                covered[int(label), max(0, round(top - 1)) : round(bottom + 2),
                        max(0, round(left - 1)) : round(right + 2)] = True  # fmt: skip
            assert (is_color & ~covered).float().sum() <= 12  # slivers of boxes that are gone
    assert num_boxes > 30


def test_any_workers_and_any_first_step_give_the_same_samples(folder, tmp_path):
    plan = planned(folder, tmp_path)
    data = open_data(plan.profile, folder)

    def samples(first, workers):
        settings = make_settings("cpu", workers=str(workers))
        batches = data.train_stream(plan, settings, first)
        return [(one.images, one.labels) for one in batches][-8:]

    whole = samples(0, 0)
    for first, workers in ((0, 2), (4, 0), (4, 1)):
        for found, expected in zip(samples(first, workers), whole, strict=True):
            assert all(map(torch.equal, found, expected))


def test_bad_images_skip_leaves_out_an_image_with_a_bad_box(folder, tmp_path):
    own = coco_folder(tmp_path / "own")
    changed(
        own / "instances_train.json", lambda data: data["annotations"][0].update(bbox=[1, 1, -5, 5])
    )
    plan = planned(own, tmp_path, bad_images="skip")
    batches = list(open_data(plan.profile, own).train_stream(plan, SETTINGS, 0))
    assert sum(batch.num_replaced for batch in batches) == 2  # once an epoch
    assert all(0 not in batch.shown for batch in batches)


def test_an_evaluation_shows_each_image_whole_with_its_boxes_in_its_own_px(folder):
    val = open_data(find_profile(str(folder)), folder).val
    stream = BoxEvaluation(val, 96, "bilinear", 4)
    assert len(stream) == 3
    for number in range(3):
        images, targets = stream[number]
        for row, (image, own) in enumerate(zip(images, targets, strict=True)):
            place, boxes = number * 4 + row, val.read_target(number * 4 + row)
            width, height = val.read(place).size
            assert own[0].tolist() == [place, width, height, pytest.approx(64 / 96), 0, 0]
            rows = own[1:][own[1:, 4] >= 0]
            assert torch.equal(rows[:, :4], torch.from_numpy(boxes.sides))
            assert rows[:, 4].tolist() == boxes.labels.tolist() and not rows[:, 5].any()
            seen = image[:, : height * 3 // 2, : width * 3 // 2].float()
            assert seen.std() > 5 and image[:, height * 3 // 2 + 1 :].float().sum() == 0
