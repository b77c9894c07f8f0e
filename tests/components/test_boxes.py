"""Boxes have the drawn areas and aspects."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.components.boxes import (
    NUM_ATTEMPTS,
    AreaRange,
    AspectRange,
    drawn_sides,
    drawn_start,
    first_fitting,
)


def test_area_is_uniform_and_aspect_log_uniform():
    draws = np.random.default_rng(0).random((5, 2 * NUM_ATTEMPTS))
    long, short = drawn_sides(draws, np.full(5, 10**10), (0.1, 0.5), (0.25, 4.0))
    assert np.allclose(long * short / 10**10, 0.1 + 0.4 * draws[:, 0::2], rtol=1e-3)
    assert np.allclose(np.log(long / short), np.log(0.25) + np.log(16) * draws[:, 1::2], atol=1e-3)


def test_the_first_that_fits_is_taken():
    fits = np.array([[False, True, True], [False, False, False]])
    found, side = first_fitting(fits, np.array([[1, 2, 3], [4, 5, 6]]))
    assert found.tolist() == [True, False] and side.tolist() == [2, 4]


def test_a_start_reaches_both_ends():
    assert drawn_start(np.array([0.0, 0.249, 0.25, 0.99999]), np.array([3, 3, 3, 3])).tolist() == [
        0,
        0,
        1,
        3,
    ]


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        (AreaRange, (0.5, 0.1)),
        (AreaRange, (0.1, 1.1)),
        (AspectRange, (0.0, 1.0)),
        (AspectRange, (2.0, 1.0)),
    ],
)
def test_absurd_ranges_are_refused(kind, pair):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(pair)
