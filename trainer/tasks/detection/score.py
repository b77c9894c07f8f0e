"""COCO's mean average precision in two halves, both pycocotools' own code: what is found in each
image is matched with its boxes where they are, and what that gives, a few numbers, is gathered from
all batches and ranks.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.base.errors import UserError

_THRESHOLDS = 10  # of IoU: 0.5, 0.55 ... 0.95
_BITS = 2 ** np.arange(_THRESHOLDS)
_ALL_SIZES = (0.0, 1e10)
_MOST_PER_CLASS = 100  # answers in one image, the best
_NO_LIMIT = 2**31 - 1
COLUMNS = 4  # of `matched`


class MeanPrecision(NamedTuple):
    """In percent. map_pct: the mean over IoU thresholds from 0.5 to 0.95 and classes. map50_pct: at
    0.5. class_pct: of each class over all thresholds, None where no image has it.
    """

    map_pct: float
    map50_pct: float
    class_pct: tuple[float | None, ...]


def check_pycocotools() -> None:
    """Raises UserError where it is not installed."""
    _evaluator(1)


def matched(
    found: np.ndarray, boxes: np.ndarray, labels: np.ndarray, is_crowd: np.ndarray
) -> np.ndarray:
    """What is found in one image against its boxes, all in the same px: of each answer its score,
    its class, and whether it is right and is not counted, a bit for each threshold, [D, COLUMNS]
    float64; zeros where there is no answer. All but the score are whole numbers below 2**24, which
    float32 holds.

    found: [D, 6], best first, (left, top, right, bottom), score, class; -1 for none. boxes: [n,
    4]. labels: [n]. is_crowd: [n] bool.
    """
    made, place = np.zeros((len(found), COLUMNS)), 0
    for label in np.unique(found[:, 5][found[:, 5] >= 0]).astype(int).tolist():
        answers = found[found[:, 5] == label][:_MOST_PER_CLASS]
        own = labels == label
        result = _matched_of_class(answers, boxes[own], is_crowd[own])
        right, uncounted = (np.asarray(result[key]) > 0 for key in ("dtMatches", "dtIgnore"))
        columns = result["dtScores"], label, _BITS @ right, _BITS @ uncounted
        for column, values in enumerate(columns):
            made[place : place + len(answers), column] = values
        place += len(answers)
    return made


def _matched_of_class(
    answers: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
) -> Mapping[str, Any]:
    evaluator = _evaluator(len(answers))
    evaluator._gts[1, 1] = [
        _entry(number, box) | {"iscrowd": int(crowd), "ignore": int(crowd)}
        for number, (box, crowd) in enumerate(zip(boxes, is_crowd, strict=True), 1)
    ]
    evaluator._dts[1, 1] = [
        _entry(number, row[:4]) | {"score": float(row[4])} for number, row in enumerate(answers, 1)
    ]
    evaluator.ious = {(1, 1): evaluator.computeIoU(1, 1)}
    return evaluator.evaluateImg(1, 1, _ALL_SIZES, len(answers))


def _entry(number: int, box: np.ndarray) -> dict[str, Any]:
    left, top, right, bottom = box.tolist()
    sides = [left, top, right - left, bottom - top]
    return {"id": number, "bbox": sides, "area": sides[2] * sides[3]}


def mean_precision(rows: np.ndarray, num_boxes: np.ndarray) -> MeanPrecision:
    """The score of all images. rows: [N * D, COLUMNS], those of `matched` in the images' order.
    num_boxes: [K], of each class, crowds not counted.
    """
    rows = rows[rows[:, 0] > 0]
    labels, right, uncounted = rows[:, 1:].astype(np.int64).T
    evaluator = _evaluator(_NO_LIMIT)
    evaluator.params.catIds = list(range(len(num_boxes)))
    evaluator._paramsEval = evaluator.params
    evaluator.evalImgs = [
        {
            "dtScores": rows[labels == label, 0],
            "dtMatches": right[labels == label] & _BITS[:, None] > 0,
            "dtIgnore": uncounted[labels == label] & _BITS[:, None] > 0,
            "gtIgnore": np.zeros(int(number), np.int64),
        }
        for label, number in enumerate(num_boxes)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, :, 0, 0]  # [thresholds, recalls, K]
    has_boxes = np.asarray(num_boxes) > 0
    if not has_boxes.any():
        return MeanPrecision(0.0, 0.0, (None,) * len(num_boxes))
    of_classes = 100 * precision.mean(axis=(0, 1))
    return MeanPrecision(
        float(100 * precision[:, :, has_boxes].mean()),
        float(100 * precision[0][:, has_boxes].mean()),
        tuple(float(one) if has else None for one, has in zip(of_classes, has_boxes, strict=True)),
    )


def _evaluator(most_found: int) -> Any:
    """pycocotools' evaluator of one image. Raises UserError where it is not installed."""
    try:
        from pycocotools.cocoeval import COCOeval  # an extra
    except ImportError:
        raise UserError(
            "task detection: pycocotools, which computes its score, is not installed",
            'use pip install "rsb[detection]"',
        ) from None
    made = COCOeval(iouType="bbox")
    made.params.imgIds, made.params.catIds = [1], [1]
    made.params.areaRng, made.params.areaRngLbl = [_ALL_SIZES], ["all"]
    made.params.maxDets = [most_found]
    return made
