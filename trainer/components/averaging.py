"""A running average of the weights, to be evaluated in their place."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.base.component import Component

Change = tuple[int, int]


class WeightAverage(Component):
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
    decay: Annotated[float, Field(gt=0, lt=1)]
    every_steps: Annotated[int, Field(ge=1)]
    adjusted: bool = False
    restarts_in_warmup: bool = False
    is_scored: bool = False
    example: ClassVar[dict[str, Any]] = {"decay": 0.9999, "every_steps": 1}

    def scaled(self, num_steps: Change, batch_images: Change, epochs: Change) -> WeightAverage:
        """The average over the same share of a run of other length: an average over the
        last tenth stays one.

        The weight of an update grows as updates become fewer, up to a half. Each is (before,
        after), num_steps of the run.
        """
        every_steps = max(1, round(self.every_steps * num_steps[1] / num_steps[0]))
        taken = 1 - self.decay
        if self.adjusted:
            taken *= batch_images[0] * self.every_steps / epochs[0]
        taken = min(0.5, taken * (num_steps[0] / self.every_steps) / (num_steps[1] / every_steps))
        if self.adjusted:
            taken /= batch_images[1] * every_steps / epochs[1]
        return self.model_copy(update={"decay": round(1 - taken, 6), "every_steps": every_steps})

    def start(self, model: nn.Module) -> Average:
        """An average that begins as a copy of `model`, on the same device."""
        return Average(self, model)

    def weight_at(
        self, step: int, num_warmup_steps: int, batch_images: int, epochs: int, steps_per_epoch: int
    ) -> float | None:
        """How much of the model enters the average after step `step`, in (0, 1]; None where there
        is no update.

        step: of the run, counted from 0. num_warmup_steps: those of whole epochs.
        """
        if step % steps_per_epoch % self.every_steps:
            return None
        # torchvision sets its count back after each update of the warm-up, so the first one after
        # it copies too, and that is at the first step of an epoch.
        if self.restarts_in_warmup and step <= num_warmup_steps:
            return 1.0
        scale = batch_images * self.every_steps / epochs if self.adjusted else 1.0
        return min((1 - self.decay) * scale, 1.0)


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
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], weight)
        if counters:
            torch._foreach_copy_([own for own, _ in counters], [new for _, new in counters])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and buffers by name: all that a resumed run needs."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved weights."""
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
