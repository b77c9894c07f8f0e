"""Schedules made of pieces: steps, at given epochs or where the score stands still; lines; a
constant rate and then a fall.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from trainer.base.component import NonNegative, Share
from trainer.base.errors import UserError
from trainer.components.epochs import EpochLength, NumEpochs, scaled_epochs, whole_epochs
from trainer.components.schedules import Constant, Factor, Schedule, ShareOfPeak, ToEnd


class Plateau(Schedule):
    """The peak, multiplied by `factor` wherever the validation score has not risen for more than
    `patience_epochs` evaluations after the warm-up; never below `end`.

    threshold: a score has risen where it is above the best one times 1 + threshold.
    cooldown_epochs: so many evaluations after a reduction count for nothing; absent, none.

    The scores steer the training: that of its end is a little tuned to the validation images. They
    are part of a run's state, so that a run that was stopped goes on as if it had not been.
    Source: torch's ReduceLROnPlateau; timm's --sched plateau.
    """

    name: Literal["plateau"] = "plateau"
    factor: Factor
    patience_epochs: Annotated[int, Field(ge=0)]
    threshold: NonNegative
    cooldown_epochs: NumEpochs | None = None
    end: NonNegative
    example: ClassVar[dict[str, Any]] = {
        "factor": 0.1, "patience_epochs": 10, "threshold": 1e-4, "end": 0.0,
    }  # fmt: skip

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        return peak

    def after_scores(self, rate: float, scores: Sequence[float]) -> float:
        best, num_bad, cooling = -math.inf, 0, 0
        for score in scores:
            if score > best * (1 + self.threshold):
                best, num_bad = score, 0
            else:
                num_bad += 1
            if cooling:
                cooling, num_bad = cooling - 1, 0
            if num_bad > self.patience_epochs:
                rate = max(rate * self.factor, self.end)
                num_bad, cooling = 0, self.cooldown_epochs or 0
        return rate

    def end_rate(self) -> float:
        return self.end

    def scaled_by(self, ratio: float) -> Self:
        return self.model_copy(update={"end": self.end * ratio})

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        """Patience keeps its share of the run, at least one epoch."""
        places = {
            key: whole_epochs(value, epochs, epochs_before)
            for key in ("patience_epochs", "cooldown_epochs")
            if (value := getattr(self, key))
        }
        return self.model_copy(update=places)

    def check_settings(self, plan, settings) -> None:
        if settings.eval_every_epochs != 1:
            raise UserError(
                f"eval_every={settings.eval_every_epochs}: lr.schedule plateau looks at the score"
                " of every epoch",
                "leave eval_every out",
            )


class StepDecay(ShareOfPeak):
    """The peak, multiplied by `factor` after every `every_epochs` epochs, counted from the start of
    the run.

    every_epochs: also a fraction. A rate that is kept for a whole epoch then falls at the first
    epoch that begins after it, one that moves at every step in the middle of an epoch.

    Source: timm's StepLRScheduler; EfficientNet's 2.4 epochs are Tan and Le 2019, arXiv:1905.11946.
    """

    name: Literal["step"] = "step"
    every_epochs: EpochLength
    factor: Factor
    example: ClassVar[dict[str, Any]] = {"every_epochs": 30, "factor": 0.1}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        return peak * self.factor ** int(update // (self.every_epochs * updates_per_epoch))

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        """A whole number of epochs stays one."""
        scaled = whole_epochs if isinstance(self.every_epochs, int) else scaled_epochs
        return self.model_copy(
            update={"every_epochs": scaled(self.every_epochs, epochs, epochs_before)}
        )


class MultiStep(ShareOfPeak):
    """The peak, multiplied by `factor` at the start of each epoch in `at_epochs`, counted from the
    start of the run.

    Raises ValueError for epochs that do not rise.
    Source: He et al. 2015, arXiv:1512.03385.
    """

    name: Literal["multi_step"] = "multi_step"
    at_epochs: Annotated[tuple[NumEpochs, ...], Field(min_length=1)]
    factor: Factor
    example: ClassVar[dict[str, Any]] = {"at_epochs": (30, 60, 90), "factor": 0.1}

    @field_validator("at_epochs")
    @classmethod
    def _rising(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if any(after <= before for before, after in pairwise(epochs)):
            raise ValueError(
                f"{list(epochs)} does not rise; write each epoch once, the earlier first"
            )
        return epochs

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        return peak * self.factor ** bisect_right(self.at_epochs, update // updates_per_epoch)

    def scaled_to(self, epochs: int, epochs_before: int) -> Schedule:
        """Whole epochs, each once and inside the run: those that fall together in a short run
        become one.
        """
        scaled = {round(scaled_epochs(epoch, epochs, epochs_before)) for epoch in self.at_epochs}
        kept = tuple(sorted(epoch for epoch in scaled if 1 <= epoch < epochs))
        return self.model_copy(update={"at_epochs": kept}) if kept else Constant()

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        yield "at_epochs", self.at_epochs[-1], epochs - 1


class PiecewiseLinear(ShareOfPeak):
    """Straight lines between points, each (epoch, share of the peak); the last share holds to the
    end of the run.

    Its rise is its warm-up: a recipe gives it no other.

    Raises ValueError for points that do not start at epoch 0 and rise, or of which none is the
    peak. Source: ffcv's ImageNet training script, which interpolates the same lines.
    """

    name: Literal["piecewise_linear"] = "piecewise_linear"
    has_own_warmup: ClassVar[bool] = True
    points: Annotated[tuple[tuple[NonNegative, Share], ...], Field(min_length=2)]
    example: ClassVar[dict[str, Any]] = {"points": ((0.0, 1e-4), (2.0, 1.0), (16.0, 0.0))}

    @field_validator("points")
    @classmethod
    def _rising(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        epochs = [epoch for epoch, _ in points]
        if epochs[0] != 0 or any(after <= before for before, after in pairwise(epochs)):
            shown = ", ".join(f"{epoch:g}" for epoch in epochs)
            raise ValueError(
                f"the points' epochs {shown} do not rise from 0; start at 0, the earlier first"
            )
        highest = max(share for _, share in points)
        if highest != 1:
            raise ValueError(
                f"the highest share is {highest:g}; one point must be at the peak, share 1.0"
            )
        return points

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        epoch = update / updates_per_epoch
        for (start, share_before), (end, share_after) in pairwise(self.points):
            if epoch < end:
                return peak * (
                    share_before + (share_after - share_before) * (epoch - start) / (end - start)
                )
        return peak * self.points[-1][1]

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        points = (
            (scaled_epochs(epoch, epochs, epochs_before), share) for epoch, share in self.points
        )
        return self.model_copy(update={"points": tuple(points)})

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        yield "points", self.points[-1][0], epochs


class WarmupStableDecay(ToEnd):
    """The peak until the run's last `decay_epochs`, then down to `end`.

    shape: with t the share of the decay that is over, the excess over `end` is multiplied by 1 - t
    ("linear"), (1 + cos(pi t)) / 2 ("cosine") or 1 - sqrt(t) ("one_minus_sqrt").

    Sources: Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392 (shapes).
    """

    name: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_epochs: NumEpochs
    end: NonNegative
    shape: Literal["linear", "cosine", "one_minus_sqrt"]
    example: ClassVar[dict[str, Any]] = {"decay_epochs": 2, "end": 0.0, "shape": "one_minus_sqrt"}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        num_decay = self.decay_epochs * updates_per_epoch
        done_share = max(0.0, (update - (num_updates - num_decay)) / num_decay)
        left = {
            "linear": 1 - done_share,
            "cosine": 0.5 * (1 + math.cos(math.pi * done_share)),
            "one_minus_sqrt": 1 - math.sqrt(done_share),
        }[self.shape]
        return self.end + (peak - self.end) * left

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        return self.model_copy(
            update={"decay_epochs": whole_epochs(self.decay_epochs, epochs, epochs_before)}
        )

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        yield "decay_epochs", self.decay_epochs, epochs - warmup_epochs

    def min_steps_after_warmup(self, steps_per_epoch: int) -> int:
        return self.decay_epochs * steps_per_epoch
