"""What the learning rate does after its warm-up, as a function of the update."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from trainer.base.component import Component, NonNegative, Positive, Share
from trainer.base.errors import UserError


def _whole(number: float) -> float:
    """30.0 as 30: one spelling, one digest."""
    return int(number) if number == int(number) else number


NumEpochs = Annotated[int, Field(ge=1)]
EpochLength = Annotated[float, Field(gt=0), AfterValidator(_whole)]
Factor = Annotated[float, Field(gt=0, lt=1)]
Period = Literal["run", "after_warmup"]


class Schedule(Component):
    """What the rate does after its warm-up. All epochs are counted from the start of the run.

    has_own_warmup: it says what happens from the first step on, and a recipe gives it no other
    warm-up. has_end: it falls to a rate of its own, at which a cooldown may go on.
    """

    kind: ClassVar[str] = "schedule"
    has_own_warmup: ClassVar[bool] = False
    has_end: ClassVar[bool] = False

    @abstractmethod
    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        """The rate of one update at or after the warm-up's end; all counts in updates."""

    def after_scores(self, rate: float, scores: Sequence[float]) -> float:
        """The rate that `at` gives, after these scores of the epochs since the warm-up, the larger
        the better.
        """
        return rate

    @abstractmethod
    def scaled_to(self, epochs: int, epochs_before: int) -> Schedule:
        """The same schedule in a run of other length: what it counts in epochs keeps its share of
        the run.
        """

    @abstractmethod
    def scaled_by(self, ratio: float) -> Schedule:
        """The same schedule under a peak that is `ratio` times as high: rates of its own follow,
        shares stay.
        """

    def end_rate(self) -> float:
        """The rate of its own that it ends at; 0 where its end is a share of the peak."""
        return 0.0

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        """(field, epochs in it, the most that a run of `epochs` has room for) of each field that
        counts in epochs.
        """
        return iter(())

    def min_steps_after_warmup(self, steps_per_epoch: int) -> int:
        """How many steps it needs between the warm-up's end and the run's."""
        return 0

    @property
    def starts_after_warmup(self) -> bool:
        """Does it begin where the warm-up ends, and have no value before?"""
        return False


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


class _Unscaled(Schedule):
    """Schedules that count nothing in epochs."""

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        return self


class _ShareOfPeak(Schedule):
    """Schedules all of whose rates are shares of the peak."""

    def scaled_by(self, ratio: float) -> Self:
        return self


class _ToEnd(Schedule):
    """Schedules that fall to a rate of their own, in their field `end`."""

    has_end: ClassVar[bool] = True

    if TYPE_CHECKING:  # each has the field in its own place

        @property
        def end(self) -> float: ...

    def scaled_by(self, ratio: float) -> Self:
        return self.model_copy(update={"end": self.end * ratio})

    def end_rate(self) -> float:
        return self.end


def _share_done(period: Period, update: int, num_warmup: int, num_updates: int) -> float:
    """How much of the period is over, in [0, 1)."""
    skipped = 0 if period == "run" else num_warmup
    return (update - skipped) / (num_updates - skipped)


class _OverPeriod(Schedule):
    """Schedules that span the run, or what the warm-up leaves of it, as their field `period`
    says.
    """

    if TYPE_CHECKING:  # each has the field in its own place

        @property
        def period(self) -> Period: ...

    def min_steps_after_warmup(self, steps_per_epoch: int) -> int:
        return int(self.starts_after_warmup)

    @property
    def starts_after_warmup(self) -> bool:
        return self.period == "after_warmup"


class Cosine(_ToEnd, _OverPeriod, _Unscaled):
    """Half a cosine from the peak down to `end`.

    period: what the half wave spans. "run" spans all epochs, so that the warm-up covers its
    beginning and the rate after it starts a little under the peak (timm without prefix);
    "after_warmup" spans the epochs that are left (torchvision, ConvNeXt).
    k_decay: the share of the period that is over is raised to this; above 1 the rate stays high for
    longer.

    Sources: Loshchilov and Hutter 2016, arXiv:1608.03983; Zhang and Li 2020, arXiv:2004.05909
    (k-decay).
    """

    name: Literal["cosine"] = "cosine"
    end: NonNegative
    period: Period
    k_decay: Positive | None = None
    example: ClassVar[dict[str, Any]] = {"end": 0.0, "period": "run"}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        skipped = 0 if self.period == "run" else num_warmup
        angle = math.pi * (update - skipped) / (num_updates - skipped)
        if self.k_decay is not None:
            angle = math.pi * (angle / math.pi) ** self.k_decay
        return self.end + 0.5 * (peak - self.end) * (1 + math.cos(angle))


class CosineCycles(_ToEnd, _OverPeriod):
    """Half a cosine from the peak down to `end` again and again: a rate that restarts.

    cycle_epochs: the length of the first cycle, also a fraction. growth: each cycle is so many
    times as long as the one before; decay: and starts at so much of its peak; absent, all alike.
    period: where the first cycle starts, as of a cosine. The last is cut off by the run's end.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983 (warm restarts); timm's CosineLRScheduler.
    """

    name: Literal["cosine_cycles"] = "cosine_cycles"
    cycle_epochs: EpochLength
    growth: Annotated[float, Field(gt=1, le=100)] | None = None
    decay: Factor | None = None
    end: NonNegative
    period: Period
    k_decay: Positive | None = None
    example: ClassVar[dict[str, Any]] = {
        "cycle_epochs": 10, "growth": 2.0, "decay": 0.5, "end": 0.0, "period": "run",
    }  # fmt: skip

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        length = self.cycle_epochs * updates_per_epoch
        left = float(update - (0 if self.period == "run" else num_warmup))
        while left >= length:
            left, length = left - length, length * (self.growth or 1.0)
            peak *= self.decay or 1.0
        done_share = (left / length) ** (self.k_decay or 1.0)
        return self.end + 0.5 * (peak - self.end) * (1 + math.cos(math.pi * done_share))

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        length = scaled_epochs(self.cycle_epochs, epochs, epochs_before)
        return self.model_copy(update={"cycle_epochs": _whole(length)})

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        yield "cycle_epochs", self.cycle_epochs, epochs


class Polynomial(_ToEnd, _OverPeriod, _Unscaled):
    """From the peak down to `end` with the share of the period that is left, raised to `power`; 1
    is a straight line.

    period: what the fall spans, as of a cosine: "run" or "after_warmup". k_decay: as of a cosine.

    Source: Liu et al. 2015, arXiv:1506.04579 ("poly"); the form is that of timm's PolyLRScheduler.
    """

    name: Literal["polynomial"] = "polynomial"
    power: Positive
    end: NonNegative
    period: Period
    k_decay: Positive | None = None
    example: ClassVar[dict[str, Any]] = {"power": 0.9, "end": 0.0, "period": "run"}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        done_share = _share_done(self.period, update, num_warmup, num_updates)
        left_share = 1 - (done_share if self.k_decay is None else done_share**self.k_decay)
        return self.end + (peak - self.end) * left_share**self.power


class Tanh(_ToEnd, _OverPeriod, _Unscaled):
    """From about the peak down to about `end` along a hyperbolic tangent between `lower` and
    `upper`: -6 and 3 start within 1e-5 of the peak and end within 0.3 % of it above `end`.

    period: what the fall spans, as of a cosine: "run" or "after_warmup".

    Raises ValueError for bounds that do not rise.
    Source: Hsueh et al. 2018, arXiv:1806.01593; the form is that of timm's TanhLRScheduler, whose
    bounds are -7 and 3.
    """

    name: Literal["tanh"] = "tanh"
    lower: float
    upper: float
    end: NonNegative
    period: Period
    example: ClassVar[dict[str, Any]] = {"lower": -7.0, "upper": 3.0, "end": 0.0, "period": "run"}

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(
                f"lower {self.lower:g} is not below upper {self.upper:g}: change one of them"
            )
        return self

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        done_share = _share_done(self.period, update, num_warmup, num_updates)
        place = self.lower + (self.upper - self.lower) * done_share
        return self.end + 0.5 * (peak - self.end) * (1 - math.tanh(place))


class Exponential(_ShareOfPeak, _OverPeriod):
    """The peak, multiplied by `factor` once an epoch; a rate that moves at every step falls along
    the curve between.

    period: where the epochs are counted from, the start of the run or the end of the warm-up.

    Source: torchvision's reference script (exponentiallr), after its warm-up.
    """

    name: Literal["exponential"] = "exponential"
    factor: Factor
    period: Period
    example: ClassVar[dict[str, Any]] = {"factor": 0.97, "period": "after_warmup"}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        skipped = 0 if self.period == "run" else num_warmup
        return peak * self.factor ** ((update - skipped) / updates_per_epoch)

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        return self.model_copy(update={"factor": self.factor ** (epochs_before / epochs)})


class Constant(_ShareOfPeak, _Unscaled):
    """The peak, to the end of the run."""

    name: Literal["constant"] = "constant"
    example: ClassVar[dict[str, Any]] = {}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        return peak


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


class StepDecay(_ShareOfPeak):
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


class MultiStep(_ShareOfPeak):
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


class PiecewiseLinear(_ShareOfPeak):
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


class WarmupStableDecay(_ToEnd):
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
