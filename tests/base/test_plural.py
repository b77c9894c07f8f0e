"""Numbers with their words."""

import pytest

from trainer.base.plural import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "1 second"),
        (119, "119 seconds"),
        (0.053 * 3600, "3.2 minutes"),
        (3600, "60 minutes"),
        (7200, "2.0 hours"),
        (54_000, "15 hours"),
        (259_200, "3.0 days"),
    ],
)
def test_a_duration_is_in_the_largest_unit_of_which_it_has_two(seconds, text):
    assert duration(seconds) == text
