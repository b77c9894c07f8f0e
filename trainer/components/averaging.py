"""A running average of the weights, to be evaluated in their place, or to replace them."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.base.component import Component, Positive

Change = tuple[int, int]
Decay = Annotated[float, Field(gt=0, lt=1)]
Steps = Annotated[int, Field(ge=1)]


class WeightAverage(Component):
    """An average of all weights and floating-point buffers over the course of a run.

    is_scored: the published score is the average's. replaces_model: after each update the model is
    the average.
    """

    kind: ClassVar[str] = "average"
    replaces_model: ClassVar[bool] = False

    if TYPE_CHECKING:  # a field, or fixed by the class

        @property
        def is_scored(self) -> bool: ...

    @abstractmethod
    def scaled(self, num_steps: Change, batch_images: Change, epochs: Change) -> Self:
        """The average over the same share of a run of other length. Each is (before, after),
        num_steps of the run.
        """

    @abstractmethod
    def weight_at(
        self, step: int, num_warmup_steps: int, batch_images: int, epochs: int, steps_per_epoch: int
    ) -> float | None:
        """How much of the model enters the average after step `step`, in [0, 1]; None where there
        is no update.

        step: of the run, counted from 0. num_warmup_steps: those of whole epochs.
        """

    def start(self, model: nn.Module) -> Average:
        """An average that begins as a copy of `model`, on the same device."""
        return Average(self, model)


class Ema(WeightAverage):
    """An exponential moving average of all weights and floating-point buffers.

    decay: what an update keeps of the average, in (0, 1).
    every_steps: an update at steps 0, every_steps, 2 * every_steps ... of each epoch, as
        torchvision counts.
    adjusted: 1 - decay is multiplied by batch_images * every_steps / epochs, at most 1.
        torchvision's 0.99998 at 1024 images, 32 steps, 600 epochs is 0.99891 per update: the raw
        number would average over the whole run.
    restarts_in_warmup: the average is the model itself until the first update after the warm-up has
        copied it (torchvision); without it, it starts from the initial weights (timm, ConvNeXt).
    is_scored: the published score is the average's.

    Sources: Polyak and Juditsky 1992; torchvision's classification reference at 017e9b99.
    """

    name: Literal["ema"] = "ema"
    decay: Decay
    every_steps: Steps
    adjusted: bool = False
    restarts_in_warmup: bool = False
    is_scored: bool = False
    example: ClassVar[dict[str, Any]] = {"decay": 0.9999, "every_steps": 1}

    def scaled(self, num_steps: Change, batch_images: Change, epochs: Change) -> Self:
        """An average over the last tenth stays one.

        The weight of an update grows as updates become fewer, up to a half; where the adjusted form
        cannot say it, as in small batches, it is written as it is.
        """
        every_steps = max(1, round(self.every_steps * num_steps[1] / num_steps[0]))
        taken = 1 - self.decay
        if self.adjusted:
            taken *= batch_images[0] * self.every_steps / epochs[0]
        taken = min(0.5, taken * (num_steps[0] / self.every_steps) / (num_steps[1] / every_steps))
        scale = batch_images[1] * every_steps / epochs[1]
        is_adjusted = self.adjusted and round(1 - taken / scale, 6) > 0
        decay = round(1 - (taken / scale if is_adjusted else taken), 6)
        changes = {"decay": decay, "every_steps": every_steps, "adjusted": is_adjusted}
        return self.model_copy(update=changes)

    def weight_at(
        self, step: int, num_warmup_steps: int, batch_images: int, epochs: int, steps_per_epoch: int
    ) -> float | None:
        if step % steps_per_epoch % self.every_steps:
            return None
        # torchvision sets its count back after each update of the warm-up, so the first one after
        # it copies too, and that is at the first step of an epoch.
        if self.restarts_in_warmup and step <= num_warmup_steps:
            return 1.0
        scale = batch_images * self.every_steps / epochs if self.adjusted else 1.0
        return min((1 - self.decay) * scale, 1.0)


class Lookahead(WeightAverage):
    """After every every_steps steps of the run, and after its last, the weights and buffers move
    back to their average.

    decay: what an update keeps of the average, in (0, 1). power: times the share of the run that
    is done to this power, by which the average follows the model at first; None: the same
    throughout. After the last step nothing more enters: the average is the result.

    Sources: Zhang et al. 2019, arXiv:1907.08610 (a decay of 0.5); Jordan 2024, arXiv:2404.00498
    (power).
    """

    name: Literal["lookahead"] = "lookahead"
    replaces_model: ClassVar[bool] = True
    is_scored: ClassVar[bool] = False  # the model is it, in the end
    decay: Decay
    every_steps: Steps
    power: Positive | None = None
    example: ClassVar[dict[str, Any]] = {"decay": 0.5, "every_steps": 5}

    def scaled(self, num_steps: Change, batch_images: Change, epochs: Change) -> Self:
        return self

    def weight_at(
        self, step: int, num_warmup_steps: int, batch_images: int, epochs: int, steps_per_epoch: int
    ) -> float | None:
        num_done, num_steps = step + 1, epochs * steps_per_epoch
        if num_done % self.every_steps:
            return 0.0 if num_done == num_steps else None
        return 1 - self.decay * (num_done / num_steps) ** (self.power or 0)


class Average:
    """The averaged copy of one model. `model` is in eval mode and takes no gradients."""

    def __init__(self, rule: WeightAverage, model: nn.Module):
        self.rule = rule
        self.model = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(
        self,
        model: nn.Module,
        step: int,
        num_warmup_steps: int,
        batch_images: int,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        """Update with the weights after optimizer step `step`, counted from 0, where the
        rule says so.
        """
        weight = self.rule.weight_at(step, num_warmup_steps, batch_images, epochs, steps_per_epoch)
        if weight is None:
            return
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        # such as BatchNorm's num_batches_tracked, which have no mean
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        # see lamb.py for torch._foreach_*
        own, new = [pair[0] for pair in floats], [pair[1] for pair in floats]
        torch._foreach_lerp_(own, new, weight)
        if self.rule.replaces_model:
            torch._foreach_copy_(new, own)
        if counters:
            torch._foreach_copy_([pair[0] for pair in counters], [pair[1] for pair in counters])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and buffers by name: all that a resumed run needs."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved weights."""
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
