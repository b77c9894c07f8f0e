"""ReaL's score against a loop over its rule."""

import json

import numpy as np
import pytest

from trainer.base.errors import UserError
from trainer.inference.quality import Judged
from trainer.inference.real_labels import read_real, real_top1

CLASSES = tuple(map(str, range(1000)))


def judged_of(predicted, classes=CLASSES):
    predicted = np.array(predicted)
    ones = np.ones(len(predicted))
    return Judged(predicted * 0, predicted, ones, ones, predicted * 0, classes)


def names_of(*numbers):
    return [f"val/n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers]


def test_an_answer_among_the_labels_is_right_and_images_without_any_do_not_count():
    real = [[3], [], [5, 7], [9], [1]]
    predicted, numbers = [7, 4, 3, 9, 2], (3, 2, 1, 4, 5)
    counted = [(p, real[n - 1]) for p, n in zip(predicted, numbers, strict=True) if real[n - 1]]
    expected = sum(p in labels for p, labels in counted), len(counted)
    assert real_top1(judged_of(predicted), names_of(*numbers), real) == expected == (3, 4)


@pytest.mark.parametrize(
    ("names", "classes"),
    [(["a.png"], CLASSES), (names_of(2), CLASSES), (names_of(0), CLASSES), (names_of(1), ("a",))],
)
def test_other_images_and_other_models_are_refused(names, classes):
    with pytest.raises(UserError) as error:
        real_top1(judged_of([0], classes), names, [[1]])
    assert error.value.hint


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[[1000]]", "[[true]]", '[["a"]]'])
def test_what_is_no_file_of_labels_is_refused(content, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError, match=r"real=.*real\.json"):
        read_real(tmp_path / "real.json")


def test_labels_are_read_as_they_are_written(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], []]))
    assert read_real(tmp_path / "real.json") == [[1, 2], []]
