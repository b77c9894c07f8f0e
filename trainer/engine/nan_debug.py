"""debug=nan: where numbers stop being finite, which gradients are dead, when the loss leaps.

It looks and never touches: the same bits as without it, and slower, as the device is waited for at
every layer.
"""

from __future__ import annotations

import statistics
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST_NOTES = 10  # of one kind: once weights are not finite nothing is
SPIKE_RATIO = 3.0  # of the median of so many steps before
SPIKE_STEPS, FEWEST_SPIKE_STEPS = 50, 10
_MOST_NAMES = 5


class NanDebug:
    """The notes on a model's training steps, by hooks on its layers and weights.

    notes: lines not yet logged. Layers are watched between `start` and `end_step` alone: not in
    evaluations. A gradient is looked at as soon as the backward pass has it, so the first that is
    found is the one nearest to the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.notes: list[str] = []
        self._num_notes: dict[str, int] = {}
        self._place = ""  # empty: do not look
        self._shown: Tensor | None = None
        self._is_layer_found = self._is_gradient_found = False
        self._losses: deque[float] = deque(maxlen=SPIKE_STEPS)
        self._dead: set[str] = set()
        self._alive: set[str] = set()
        self._weights = dict(model.named_parameters())
        model.register_forward_pre_hook(self._look_at_input)
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._look_at_layer, name))
        for name, weight in self._weights.items():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(partial(self._look_at_gradient, name))

    def start(self, step: int, micro_batch: int, shown: Tensor) -> None:
        """Before the passes over a micro-batch. shown: [b] numbers of its training images."""
        self._place, self._shown = f"step {step + 1}, micro-batch {micro_batch}", shown
        if micro_batch == 0:
            self._is_layer_found = self._is_gradient_found = False

    def see_loss(self, loss: Tensor) -> None:
        """After the forward pass: its loss, a scalar."""
        if not self._is_layer_found and not torch.isfinite(loss):
            self._is_layer_found = True
            self._note("layer", f"the loss is {loss.item()}, though every layer's output is finite")

    def end_step(self, step: int, loss_nats: float) -> None:
        """After the backward passes of step number `step`, before the optimizer: whose gradient is
        not all zero, and is the loss like those before?
        """
        self._place, self._shown = f"step {step + 1}", None
        for name, weight in self._weights.items():
            if name not in self._alive and weight.grad is not None and weight.grad.any():
                self._alive.add(name)
        if len(self._losses) >= FEWEST_SPIKE_STEPS:
            usual = statistics.median(self._losses)
            if loss_nats > SPIKE_RATIO * usual > 0:
                ratio, of = loss_nats / usual, len(self._losses)
                line = f"the loss {loss_nats:.4g} is {ratio:.1f} times the median of {of} steps"
                self._note("spike", f"{line}, {usual:.4g}")
        self._losses.append(loss_nats)
        self._place = ""

    def end_window(self, step: int) -> None:
        """After the steps of a line of metrics: name the gradients that were zero in all of them,
        each once.
        """
        dead = {
            name
            for name, weight in self._weights.items()
            if weight.requires_grad and name not in self._alive
        }
        if new := sorted(dead - self._dead):
            self._place = f"up to step {step}"
            self._note("dead", f"dead: a gradient of zero in the whole window: {_few(new)}")
            self._place = ""
        self._dead, self._alive = dead, set()

    def _note(self, kind: str, line: str) -> None:
        number = self._num_notes[kind] = self._num_notes.get(kind, 0) + 1
        if number <= MOST_NOTES:
            last = "; no more of these are told" if number == MOST_NOTES else ""
            self.notes.append(f"debug: {self._place}: {line}{last}")

    @torch.no_grad()
    def _look_at_input(self, model: nn.Module, inputs: Any) -> None:
        bad = [tensor for tensor in _tensors(inputs) if not _is_finite(tensor)]
        if self._place and bad and not self._is_layer_found:
            self._is_layer_found = True
            images = self._images_of(bad[0])
            self._note("layer", f"the model's input is not finite{images}")

    @torch.no_grad()
    def _look_at_layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._place or self._is_layer_found:
            return
        for tensor in _tensors(output):
            if _is_finite(tensor):
                continue
            self._is_layer_found = True
            own = module.named_parameters(recurse=False)
            bad = [weight for weight, value in own if not _is_finite(value)]
            number = int((~torch.isfinite(tensor)).sum())
            cause = f"; not finite is its {_few(bad)}" if bad else ""
            self._note(
                "layer",
                f"the first output that is not finite is of {name or 'the model'}"
                f" ({type(module).__name__}), {number:,} of {tensor.numel():,} values{cause}"
                f"{self._images_of(tensor)}",
            )
            return

    def _images_of(self, tensor: Tensor) -> str:
        """Which images the bad values are of, where they are of some alone."""
        if self._shown is None or tensor.dim() == 0 or len(tensor) != len(self._shown):
            return ""
        is_bad = ~torch.isfinite(tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None])
        rows = is_bad.any(dim=1).cpu()
        if rows.all():
            return ", of every image"
        return f", of train images {_few([str(number) for number in self._shown[rows].tolist()])}"

    @torch.no_grad()
    def _look_at_gradient(self, name: str, weight: Tensor) -> None:
        if not self._place or self._is_gradient_found or weight.grad is None:
            return
        if not _is_finite(weight.grad):
            self._is_gradient_found = True
            self._note("gradient", f"the first gradient that is not finite is of {name}")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among what a module takes or gives."""
    if isinstance(value, dict):
        value = tuple(value.values())
    values = value if isinstance(value, list | tuple) else (value,)
    return [one for one in values if isinstance(one, Tensor)]


def _few(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
