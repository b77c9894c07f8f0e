"""What the learning rate does after its warm-up, as a function of the update. Those that fall in
one curve are here, those of several pieces in `piecewise_schedules.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainer.base.component import Component, NonNegative, Positive
from trainer.components.epochs import (
    EpochLength,
    one_spelling,
    scaled_epochs,
)

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


class _Unscaled(Schedule):
    """Schedules that count nothing in epochs."""

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        return self


class ShareOfPeak(Schedule):
    """Schedules all of whose rates are shares of the peak."""

    def scaled_by(self, ratio: float) -> Self:
        return self


class ToEnd(Schedule):
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


class Cosine(ToEnd, _OverPeriod, _Unscaled):
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


class CosineCycles(ToEnd, _OverPeriod):
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
        return self.model_copy(update={"cycle_epochs": one_spelling(length)})

    def lengths(self, epochs: int, warmup_epochs: int) -> Iterator[tuple[str, float, float]]:
        yield "cycle_epochs", self.cycle_epochs, epochs


class Polynomial(ToEnd, _OverPeriod, _Unscaled):
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


class Tanh(ToEnd, _OverPeriod, _Unscaled):
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


class Exponential(ShareOfPeak, _OverPeriod):
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


class Constant(ShareOfPeak, _Unscaled):
    """The peak, to the end of the run."""

    name: Literal["constant"] = "constant"
    example: ClassVar[dict[str, Any]] = {}

    def at(
        self, peak: float, update: int, num_warmup: int, num_updates: int, updates_per_epoch: int
    ) -> float:
        return peak
