"""Exact scores of models over one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce

import torch
from torch import nn

from trainer.base.devices import sum_dtype
from trainer.base.memory import MemoryFull, is_memory_full
from trainer.base.settings import Settings
from trainer.base.signals import Stopped
from trainer.distributed.communicator import Ranks, alone
from trainer.recipe.plan import Plan
from trainer.tasks import Scores, task_of


def evaluate(
    plan: Plan,
    settings: Settings,
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    each: Callable[[], None] = lambda: None,
    ranks: Ranks = alone(),
) -> Scores:
    """evaluate_all of one model."""
    return evaluate_all(plan, settings, {"model": model}, batches, each, ranks)["model"]


@torch.no_grad()
def evaluate_all(
    plan: Plan,
    settings: Settings,
    models: dict[str, nn.Module],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    each: Callable[[], None] = lambda: None,
    ranks: Ranks = alone(),
) -> dict[str, Scores]:
    """Score models on batches of (images [B, C, H, W] uint8, targets [B, ...]): every image once,
    without padding.

    The images are decoded once for all models. each: called after every batch, so that a stop need
    not wait for the end of the pass. ranks: those that share the images; each is given its own
    batches, as many as there are, and all get the scores over all of them. Where `each` raises
    Stopped on one, all raise it at the end of their batches. A batch that memory does not hold is
    scored in halves.

    Raises MemoryFull where it does not hold one image.
    """
    was_training = {name: model.training for name, model in models.items()}
    task = task_of(plan, settings)
    totals = torch.zeros(
        len(models), task.num_sums, dtype=sum_dtype(settings.device), device=settings.device
    )
    num_images = 0
    stopped = None
    scorers = [
        _Splitting(partial(task.evaluate, model.eval()), settings.device)
        for model in models.values()
    ]
    try:
        for images, labels in batches:
            for total, score in zip(totals, scorers, strict=True):
                total += score(images, labels)
            num_images += len(labels)
            each()
    except Stopped as signal_name:
        stopped = signal_name
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    _agree(ranks, stopped)
    ranks.sum(totals)
    num_images = ranks.total(num_images)
    return {
        name: task.scores(sums, num_images)
        for name, sums in zip(models, totals.tolist(), strict=True)
    }


def _agree(ranks: Ranks, stopped: Stopped | None) -> None:
    """Ranks have unlike numbers of batches: none can leave the pass before all are at its end."""
    if ranks.any(stopped is not None):
        raise stopped or Stopped("a signal to another rank")


class _Splitting:
    """score(images, labels) of a batch; where memory runs out, the sum over its halves, from then
    on.
    """

    def __init__(
        self, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: str
    ) -> None:
        self._score, self._device, self._most = score, device, 2**30

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                parts = zip(images.split(self._most), labels.split(self._most), strict=True)
                return reduce(torch.add, (self._score(*part) for part in parts))
            except RuntimeError as error:
                if not is_memory_full(error):
                    raise
                self._halve(images)

    def _halve(self, images: torch.Tensor) -> None:
        num_images = min(self._most, len(images))
        if num_images == 1:
            px = "x".join(map(str, images.shape[2:]))
            raise MemoryFull(
                f"out of memory in evaluation: one image of {px} px does not fit on {self._device};"
                " use a device with more memory"
            )
        self._most = -(-num_images // 2)
