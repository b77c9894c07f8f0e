"""The score is pycocotools' of the whole set, to the last digit, however images are shared."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.tasks.detection.score import COLUMNS, matched, mean_precision

NUM_CLASSES = 4


def random_case(seed):
    """Of each image: what is found [D, 6], best first, and its boxes, classes and crowds."""
    draw = np.random.default_rng(seed)
    images = []
    for _ in range(draw.integers(1, 12)):
        number = draw.integers(0, 9)
        start = draw.uniform(0, 80, (number, 2))
        boxes = np.concatenate([start, start + draw.uniform(1, 60, (number, 2))], axis=1)
        labels = draw.integers(0, draw.integers(1, NUM_CLASSES + 1), number)
        is_crowd = draw.random(number) < 0.15
        near = boxes[draw.integers(0, number, 15)] if number else draw.uniform(0, 90, (15, 4))
        found = near + draw.normal(0, 4, near.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        own = labels[draw.integers(0, number, 15)] if number else np.zeros(15, int)
        classes = np.where(draw.random(15) < 0.7, own, draw.integers(0, NUM_CLASSES, 15))
        scores = -np.sort(-draw.choice([0.1, 0.25, 0.5, draw.random()], 15))  # with ties
        kept = draw.integers(0, 16)
        rows = np.concatenate([found, scores[:, None], classes[:, None]], axis=1)[:kept]
        padding = np.zeros((20 - kept, 6))
        padding[:, 5] = -1
        images.append((np.concatenate([rows, padding]), boxes, labels, is_crowd))
    return images


def by_pycocotools(images):
    """(mAP, mAP at 0.5, each class's) in percent, from whole COCO objects."""
    annotations, results = [], []
    for number, (found, boxes, labels, is_crowd) in enumerate(images):
        for box, label, crowd in zip(boxes, labels, is_crowd, strict=True):
            sides = [*box[:2], *(box[2:] - box[:2])]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(label)}
                | {"bbox": sides, "area": sides[2] * sides[3], "iscrowd": int(crowd)}
            )
        results += [
            {"image_id": number, "category_id": int(row[5]), "score": row[4]}
            | {"bbox": [*row[:2], *(row[2:4] - row[:2])]}
            for row in found
            if row[5] >= 0
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(len(images))],
            "categories": [{"id": label} for label in range(NUM_CLASSES)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    of_classes = evaluator.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    return 100 * evaluator.stats[0], 100 * evaluator.stats[1], 100 * of_classes


@pytest.mark.parametrize("seed", range(40))
def test_the_score_of_random_cases_is_pycocotools(seed):
    images = random_case(seed)
    if not any(len(found[found[:, 5] >= 0]) for found, *_ in images):
        pytest.skip("pycocotools loads no empty results")  # see the next test
    rows, num_boxes = np.zeros((len(images), 20, COLUMNS)), np.zeros(NUM_CLASSES)
    for number in np.random.default_rng(seed).permutation(len(images)):  # by any rank, in any order
        found, boxes, labels, is_crowd = images[number]
        rows[number] = matched(found, boxes, labels, is_crowd)
        num_boxes += np.bincount(labels[~is_crowd], minlength=NUM_CLASSES)
    score = mean_precision(rows.reshape(-1, COLUMNS), num_boxes)
    map_pct, map50_pct, of_classes = by_pycocotools(images)
    if not num_boxes.any():
        assert score == (0.0, 0.0, (None,) * NUM_CLASSES) and map_pct == -100
        return
    assert score.map_pct == pytest.approx(map_pct, abs=1e-12)
    assert score.map50_pct == pytest.approx(map50_pct, abs=1e-12)
    for found, expected in zip(score.class_pct, of_classes, strict=True):
        assert (found is None) == (expected == -100)
        assert found is None or found == pytest.approx(expected, abs=1e-12)


def test_nothing_found_is_a_score_of_zero():
    rows = matched(
        np.full((3, 6), -1.0), np.array([[0, 0, 5, 5.0]]), np.array([1]), np.zeros(1, bool)
    )
    assert not rows.any()
    score = mean_precision(rows, np.array([0, 1, 0]))
    assert score == (0.0, 0.0, (None, 0.0, None))


def test_no_more_than_a_hundred_answers_of_a_class_count_in_an_image():
    box = np.array([[0, 0, 10, 10.0]])
    found = np.array([[50, 50, 60, 60, 0.9, 0.0]] * 100 + [[0, 0, 10, 10, 0.5, 0.0]])
    score = mean_precision(matched(found, box, np.zeros(1, int), np.zeros(1, bool)), np.ones(1))
    assert score.map_pct == 0.0
