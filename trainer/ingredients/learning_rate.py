"""The learning rate of every step, in pure Python."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.ingredients.base import Ingredient, NonNegative, Page

NumEpochs = Annotated[int, Field(ge=1)]


class Cosine(Ingredient):
    """Half a cosine from the peak down to `end`.

    period: what the half wave spans. "run" spans all epochs, so that the warm-up covers its beginning and the rate
    after it starts a little under the peak (timm without prefix); "after_warmup" spans the epochs that are left
    (torchvision, ConvNeXt).

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983.
    """

    name: Literal["cosine"] = "cosine"
    end: NonNegative
    period: Literal["run", "after_warmup"]

    def at(self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int) -> float:
        """The rate of one update at or after the warm-up's end; all counts in updates."""
        skipped = 0 if self.period == "run" else num_warmup
        angle = math.pi * (update - skipped) / (num_updates - skipped)
        return self.end + 0.5 * (peak - self.end) * (1 + math.cos(angle))


class StepDecay(Ingredient):
    """The peak, multiplied by `factor` after every `every_epochs` epochs, counted from the start of the run."""

    name: Literal["step"] = "step"
    every_epochs: NumEpochs
    factor: Annotated[float, Field(gt=0, lt=1)]

    def at(self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int) -> float:
        """The rate of one update at or after the warm-up's end; all counts in updates."""
        return peak * self.factor ** (update // updates_per_epoch // self.every_epochs)


class LearningRate(Page):
    """The learning rate as a function of the step.

    peak: the highest rate, for the page's own batch.images.
    warmup_epochs, warmup_from: a straight line from warmup_from to the peak; both or neither.
    warmup_ends_at_peak: the line's last update is the peak already (numpy.linspace, as ConvNeXt), not the one after.
    updated: "per_epoch" keeps one value for a whole epoch, also in the warm-up; "per_step" moves at every step.
    scaling: how the peak follows the number of images per step when a profile changes it; None keeps it.

    Raises ValueError for half a warm-up, or a warm-up or an end above the peak.
    """

    peak: Annotated[float, Field(gt=0, le=100)]
    warmup_epochs: NumEpochs | None = None
    warmup_from: NonNegative | None = None
    warmup_ends_at_peak: bool = False
    updated: Literal["per_epoch", "per_step"]
    scaling: Literal["linear", "sqrt"] | None = None
    schedule: Annotated[Cosine | StepDecay, Field(discriminator="name")]

    @model_validator(mode="after")
    def _warmup_is_whole(self) -> Self:
        if (self.warmup_epochs is None) != (self.warmup_from is None):
            given, absent = ("warmup_from", "warmup_epochs")[:: 1 if self.warmup_epochs is None else -1]
            raise ValueError(f"{given} stands without {absent}: give both, or leave both out")
        if self.warmup_ends_at_peak and self.warmup_epochs is None:
            raise ValueError("warmup_ends_at_peak stands without warmup_epochs: leave it out, or give a warm-up")
        return self

    @model_validator(mode="after")
    def _peak_is_highest(self) -> Self:
        if self.warmup_from is not None and self.warmup_from > self.peak:
            raise ValueError(f"warmup_from {self.warmup_from:g} is above the peak {self.peak:g}: start at or below it")
        if isinstance(self.schedule, Cosine) and self.schedule.end > self.peak:
            raise ValueError(f"schedule.end {self.schedule.end:g} is above the peak {self.peak:g}: end at or below it")
        return self

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The rate of step `step`, counted from 0, in a run of epochs * steps_per_epoch steps."""
        updates_per_epoch = 1 if self.updated == "per_epoch" else steps_per_epoch
        update = step * updates_per_epoch // steps_per_epoch
        num_warmup = (self.warmup_epochs or 0) * updates_per_epoch
        if update < num_warmup:
            num_rises = max(num_warmup - 1, 1) if self.warmup_ends_at_peak else num_warmup
            return self.warmup_from + (self.peak - self.warmup_from) * update / num_rises
        return self.schedule.at(self.peak, update, num_warmup, epochs * updates_per_epoch, updates_per_epoch)

    def scaled(self, images_from: int, images_to: int) -> float:
        """The peak for another number of images per step, by the page's own rule.

        Sources: Goyal et al. 2017, arXiv:1706.02677 (linear); Krizhevsky 2014, arXiv:1404.5997 (square root).
        """
        ratio = images_to / images_from
        return self.peak * {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scaling]
