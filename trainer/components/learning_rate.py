"""The learning rate of every step, in pure Python."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.base.component import NonNegative, StrictModel
from trainer.components.schedules import NumEpochs, Schedule


class LearningRate(StrictModel):
    """The learning rate as a function of the step.

    peak: the highest rate, for the recipe's own batch.images.
    warmup_epochs or warmup_steps, warmup_from: a straight line from warmup_from to the peak; one
        length and the start, or none of them. A warm-up in optimizer steps moves at every step.
    warmup_ends_at_peak: the line's last update is the peak already (numpy.linspace, as ConvNeXt),
        not the one after.
    warmup_multiplies: the warm-up is a factor on the schedule, which runs from the first step on,
        and not a line up to its start: the factor rises from warmup_from / peak to 1 (mmcv, pycls).
    warmup_updated: "per_step" moves the warm-up at every step where the rate after it is kept for
        a whole epoch; None is as `updated`.
    updated: "per_epoch" keeps one value for a whole epoch, also in the warm-up; "per_step" moves at
        every step.
    scaling: how the peak follows the number of images per step when a profile changes it; None
        keeps it.

    Raises ValueError for half a warm-up or two, or a warm-up or an end above the peak.
    """

    peak: Annotated[float, Field(gt=0, le=100)]
    warmup_epochs: NumEpochs | None = None
    warmup_steps: Annotated[int, Field(ge=1)] | None = None
    warmup_from: NonNegative | None = None
    warmup_ends_at_peak: bool = False
    warmup_multiplies: bool = False
    warmup_updated: Literal["per_step"] | None = None
    updated: Literal["per_epoch", "per_step"]
    scaling: Literal["linear", "sqrt"] | None = None
    schedule: Schedule

    @model_validator(mode="after")
    def _warmup_is_whole(self) -> Self:
        lengths = [
            key for key in ("warmup_epochs", "warmup_steps") if getattr(self, key) is not None
        ]
        if len(lengths) == 2:
            raise ValueError("warmup_epochs and warmup_steps are both there: keep one of them")
        if bool(lengths) != (self.warmup_from is not None):
            given, absent = (
                (lengths[0], "warmup_from") if lengths else ("warmup_from", "warmup_epochs")
            )
            raise ValueError(f"{given} stands without {absent}: give both, or leave both out")
        for key in ("warmup_ends_at_peak", "warmup_multiplies", "warmup_updated"):
            if getattr(self, key) and not lengths:
                raise ValueError(
                    f"{key} stands without warmup_epochs: leave it out, or give a warm-up"
                )
        if self.warmup_multiplies and self.schedule.starts_after_warmup:
            raise ValueError(
                "warmup_multiplies needs a schedule that runs from the first step on: write"
                " schedule.period: run"
            )
        if self.warmup_steps is not None and self.updated == "per_epoch":
            raise ValueError(
                "warmup_steps needs a rate that moves at every step: write updated: per_step"
            )
        if lengths and self.schedule.has_own_warmup:
            raise ValueError(
                f"{self.schedule.name} holds its own warm-up: leave {lengths[0]} and"
                " warmup_from out"
            )
        return self

    @model_validator(mode="after")
    def _peak_is_highest(self) -> Self:
        if self.warmup_from is not None and self.warmup_from > self.peak:
            raise ValueError(
                f"warmup_from {self.warmup_from:g} is above the peak {self.peak:g}: start at or"
                " below it"
            )
        end = self.schedule.end_rate()
        if end > self.peak:
            raise ValueError(
                f"schedule.end {end:g} is above the peak {self.peak:g}: end at or below it"
            )
        return self

    def without_warmup(self, length: str) -> dict[str, bool | None]:
        """The overrides that turn the warm-up off, with all that is about it. length: the key of
        its length.
        """
        keys = ("warmup_from", "warmup_ends_at_peak", "warmup_multiplies", "warmup_updated")
        values = {key: getattr(self, key) for key in keys}
        off = {
            f"lr.{key}": False if value is True else None
            for key, value in values.items()
            if value is not None and value is not False
        }
        return {f"lr.{length}": None, **off}

    def num_warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the warm-up, 0 without one."""
        return self.warmup_steps or (self.warmup_epochs or 0) * steps_per_epoch

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The rate of step `step`, counted from 0, in a run of epochs * steps_per_epoch steps."""
        warming = self._warmup_at(step, steps_per_epoch)
        if warming is not None and not self.warmup_multiplies:
            return warming
        updates_per_epoch = 1 if self.updated == "per_epoch" else steps_per_epoch
        rate = self.schedule.at(
            self.peak,
            step * updates_per_epoch // steps_per_epoch,
            self.num_warmup_steps(updates_per_epoch),
            epochs * updates_per_epoch,
            updates_per_epoch,
        )
        return rate if warming is None else rate * warming / self.peak

    def _warmup_at(self, step: int, steps_per_epoch: int) -> float | None:
        """The line from warmup_from to the peak at one step, None after it."""
        is_per_step = "per_step" in (self.updated, self.warmup_updated)
        updates_per_epoch = steps_per_epoch if is_per_step else 1
        update = step * updates_per_epoch // steps_per_epoch
        num_warmup = self.num_warmup_steps(updates_per_epoch)
        if update >= num_warmup:
            return None
        assert self.warmup_from is not None  # _warmup_is_whole
        num_rises = max(num_warmup - 1, 1) if self.warmup_ends_at_peak else num_warmup
        return self.warmup_from + (self.peak - self.warmup_from) * update / num_rises

    def scaled(self, images_from: int, images_to: int) -> float:
        """The peak for another number of images per step, by the recipe's own rule.

        Sources: Goyal et al. 2017, arXiv:1706.02677 (linear); Krizhevsky 2014, arXiv:1404.5997
        (square root).
        """
        ratio = images_to / images_from
        return self.peak * {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scaling]
