"""The learning rate of every step, in pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

import trainer.components.piecewise_schedules  # noqa: F401  a recipe may name one
from trainer.base.component import NonNegative, Positive, Share, StrictModel
from trainer.base.errors import ConfigError
from trainer.base.streams import uniforms
from trainer.components.epochs import NumEpochs
from trainer.components.schedules import Schedule

_ABOUT_WARMUP = ("warmup_ends_at_peak", "warmup_holds", "warmup_multiplies", "warmup_updated")


class RateNoise(StrictModel):
    """A rate that is multiplied by a random number around 1, a new one at each update.

    from_share, to_share: between which shares of the epochs before a cooldown. std: deviation of a
    normal number; limit: it is drawn again until it is nearer to 1 than this.

    Raises ValueError for a range that does not rise.
    Source: timm's Scheduler, in distribution (--lr-noise 0.42 0.9: std 1, limit 0.67); its draws
    are of another generator.
    """

    from_share: Share
    to_share: Share
    std: Positive
    limit: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.from_share >= self.to_share:
            raise ValueError(
                f"from_share {self.from_share:g} is not before to_share {self.to_share:g}: start"
                " earlier"
            )
        return self

    def factor_at(self, seed: int, update: int, num_updates: int) -> float:
        """What the rate of one update is multiplied by, in (1 - limit, 1 + limit)."""
        if not self.from_share * num_updates <= update < self.to_share * num_updates:
            return 1.0
        normal = NormalDist(1.0, self.std)
        below = normal.cdf(1 - self.limit)
        # A draw is a multiple of 2**-32, 0 among them: half a unit more keeps it inside.
        drawn = float(uniforms(seed, "rate_noise", np.array([update]), 1)[0, 0]) + 2.0**-33
        return normal.inv_cdf(below + drawn * (1 - 2 * below))


class LearningRate(StrictModel):
    """The learning rate as a function of the step.

    peak: the highest rate but for noise, for the recipe's own batch.images.
    warmup_epochs or warmup_steps, warmup_from: a straight line from warmup_from to the peak; one
        length and the start, or none of them. A warm-up in optimizer steps moves at every step.
    warmup_ends_at_peak: the line's last update is the peak already (numpy.linspace, as ConvNeXt),
        not the one after.
    warmup_holds: no line: the rate stays at warmup_from to the warm-up's end (torchvision's
        constant).
    warmup_multiplies: the warm-up is a factor on the schedule, which runs from the first step on,
        and not a line up to its start: the factor rises from warmup_from / peak to 1 (mmcv, pycls).
    warmup_updated: "per_step" moves the warm-up at every step where the rate after it is kept for
        a whole epoch; None is as `updated`.
    updated: "per_epoch" keeps one value for a whole epoch, also in the warm-up; "per_step" moves at
        every step.
    scaling: how the peak follows the number of images per step when a profile changes it; None
        keeps it.
    cooldown_epochs: so many epochs at the end of the run stay at the schedule's end; the schedule
        spans those before. The run's `epochs` count both (timm counts the latter alone).
    noise: a random factor, absent for none.

    Raises ValueError for half a warm-up or two, a warm-up or an end above the peak, or a cooldown
    at no rate.
    """

    peak: Annotated[float, Field(gt=0, le=100)]
    warmup_epochs: NumEpochs | None = None
    warmup_steps: Annotated[int, Field(ge=1)] | None = None
    warmup_from: NonNegative | None = None
    warmup_ends_at_peak: bool = False
    warmup_holds: bool = False
    warmup_multiplies: bool = False
    warmup_updated: Literal["per_step"] | None = None
    updated: Literal["per_epoch", "per_step"]
    scaling: Literal["linear", "sqrt"] | None = None
    schedule: Schedule
    cooldown_epochs: NumEpochs | None = None
    noise: RateNoise | None = None

    @model_validator(mode="after")
    def _cools_down_to_an_end(self) -> Self:
        if self.cooldown_epochs is not None and not self.schedule.has_end:
            raise ValueError(
                f"{self.schedule.name} has no end at which cooldown_epochs could stay: leave them"
                " out, or write a schedule with an end, such as cosine"
            )
        return self

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
            raise ConfigError(
                f"{given} stands without {absent}",
                "give both, or leave both out",
                fix={"lr.warmup_from": 0.0} if lengths else self._without_a_length(),
            )
        for key in _ABOUT_WARMUP:
            if getattr(self, key) and not lengths:
                raise ConfigError(
                    f"{key} stands without warmup_epochs",
                    "leave it out, or give a warm-up",
                    fix=self._without_a_length(),
                )
        if self.warmup_holds and self.warmup_ends_at_peak:
            raise ValueError(
                "warmup_holds and warmup_ends_at_peak are both there: keep one of them"
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
        return {f"lr.{length}": None, **self._without_a_length()}

    def _without_a_length(self) -> dict[str, bool | None]:
        """The overrides that turn off what is about a warm-up, but for its length."""
        values = {key: getattr(self, key) for key in ("warmup_from", *_ABOUT_WARMUP)}
        return {
            f"lr.{key}": False if value is True else None
            for key, value in values.items()
            if value is not None and value is not False
        }

    def num_warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the warm-up, 0 without one."""
        return self.warmup_steps or (self.warmup_epochs or 0) * steps_per_epoch

    def scheduled_epochs(self, epochs: int) -> int:
        """The epochs of a run of `epochs` that come before the cooldown."""
        return epochs - (self.cooldown_epochs or 0)

    def at(
        self,
        step: int,
        steps_per_epoch: int,
        epochs: int,
        seed: int = 0,
        scores: Sequence[float] = (),
    ) -> float:
        """The rate of step `step`, counted from 0, in a run of epochs * steps_per_epoch steps.

        seed: of the noise. scores: of the epochs before the step, for a schedule that looks at
        them.
        """
        rate = self._smooth_at(step, steps_per_epoch, epochs)
        rate = self.schedule.after_scores(rate, scores[self.warmup_epochs or 0 :])
        if self.noise is None:
            return rate
        updates_per_epoch = 1 if self.updated == "per_epoch" else steps_per_epoch
        update = step * updates_per_epoch // steps_per_epoch
        num_updates = self.scheduled_epochs(epochs) * updates_per_epoch
        return rate * self.noise.factor_at(seed, update, num_updates)

    def _smooth_at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The same without noise."""
        if step >= self.scheduled_epochs(epochs) * steps_per_epoch:
            return self.schedule.end_rate()
        warming = self._warmup_at(step, steps_per_epoch)
        if warming is not None and not self.warmup_multiplies:
            return warming
        updates_per_epoch = 1 if self.updated == "per_epoch" else steps_per_epoch
        rate = self.schedule.at(
            self.peak,
            step * updates_per_epoch // steps_per_epoch,
            self.num_warmup_steps(updates_per_epoch),
            self.scheduled_epochs(epochs) * updates_per_epoch,
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
        if self.warmup_holds:
            return self.warmup_from
        num_rises = max(num_warmup - 1, 1) if self.warmup_ends_at_peak else num_warmup
        return self.warmup_from + (self.peak - self.warmup_from) * update / num_rises

    def scaled(self, images_from: int, images_to: int) -> float:
        """The peak for another number of images per step, by the recipe's own rule.

        Sources: Goyal et al. 2017, arXiv:1706.02677 (linear); Krizhevsky 2014, arXiv:1404.5997
        (square root).
        """
        ratio = images_to / images_from
        return self.peak * {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scaling]
