"""Lengths in epochs, and what becomes of them in a run of another length."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def one_spelling(number: float) -> float:
    """30.0 as 30: one spelling, one digest."""
    return int(number) if number == int(number) else number


NumEpochs = Annotated[int, Field(ge=1)]
EpochLength = Annotated[float, Field(gt=0), AfterValidator(one_spelling)]


def scaled_epochs(length: float, epochs: int, epochs_before: int) -> float:
    """So many epochs of one run as the same share of a run of another length."""
    return round(length * epochs / epochs_before, 6)


def whole_epochs(length: float, epochs: int, epochs_before: int) -> int:
    """The same in whole epochs, at least one."""
    return max(1, round(scaled_epochs(length, epochs, epochs_before)))


def until_epochs_in(epochs: int, epochs_before: int, until_epochs: int | None) -> int | None:
    """The same share of a run of another length, before its last epoch; None where nothing ends
    before, or no whole epoch is left after it.
    """
    if until_epochs is None:
        return None
    return min(whole_epochs(until_epochs, epochs, epochs_before), epochs - 1) or None
