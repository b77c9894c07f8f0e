"""Exact scores of models over one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from trainer.base.memory import MemoryFull, is_memory_full
from trainer.base.signals import Stopped
from trainer.components.mixing import one_hot_targets
from trainer.data.transforms import autocast, in_format, normalize
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.settings import Settings
from trainer.recipe.plan import Plan


@dataclass(frozen=True)
class Scores:
    """Counts over one pass; the percentages follow from them.

    num_top1, num_top5: images whose class is the first, or among the first five scores (all, with fewer classes).
    loss_nats: the recipe's loss against unsmoothed targets, mean over images; with image.test_flip, of summed logits.
    """

    num_top1: int
    num_top5: int
    num_images: int
    loss_nats: float

    @property
    def top1_pct(self) -> float:
        return 100 * self.num_top1 / self.num_images

    @property
    def top5_pct(self) -> float:
        return 100 * self.num_top5 / self.num_images


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
    """Score models on batches of (images [B, C, H, W] uint8, labels [B] int64): every image once, none padded.

    The images are decoded once for all models. each: called after every batch, so that a stop need not wait for the end of
    the pass. ranks: those that share the images; each is given its own batches, as many as there are, and all get the scores
    over all of them. Where `each` raises Stopped on one, all raise it at the end of their batches. A batch that memory does
    not hold is scored in halves.

    Raises MemoryFull where it does not hold one image.
    """
    was_training = {name: model.training for name, model in models.items()}
    totals = torch.zeros(len(models), 3, dtype=torch.float64, device=settings.device)
    num_images = 0
    stopped = None
    in_pieces = [
        _InPieces(partial(_batch_totals, plan, settings, model.eval()), settings.device)
        for model in models.values()
    ]
    try:
        for images, labels in batches:
            for total, score in zip(totals, in_pieces, strict=True):
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
    counted = zip(models, totals.tolist(), strict=True)
    return {
        name: Scores(int(num_top1), int(num_top5), num_images, loss_sum / num_images)
        for name, (num_top1, num_top5, loss_sum) in counted
    }


def _agree(ranks: Ranks, stopped: Stopped | None) -> None:
    """Ranks have unlike numbers of batches: none can leave the pass before all are at its end."""
    if ranks.any(stopped is not None):
        raise stopped or Stopped("a signal to another rank")


class _InPieces:
    """score(images, labels) of a batch; where memory runs out, the sum over its halves, from then on."""

    def __init__(
        self, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: str
    ) -> None:
        self._score, self._device, self._most = score, device, 2**30

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                return sum(
                    self._score(*piece)
                    for piece in zip(
                        images.split(self._most), labels.split(self._most), strict=True
                    )
                )
            except RuntimeError as error:
                if not is_memory_full(error):
                    raise
                self._halve(images)

    def _halve(self, images: torch.Tensor) -> None:
        num_images = min(self._most, len(images))
        if num_images == 1:
            px = "x".join(map(str, images.shape[2:]))
            raise MemoryFull(
                f"out of memory in evaluation: one image of {px} px does not fit on {self._device}; use a device with more memory"
            )
        self._most = -(-num_images // 2)


def _batch_totals(plan: Plan, settings: Settings, model: nn.Module, images, labels) -> torch.Tensor:
    images, labels = (part.to(settings.device, non_blocking=True) for part in (images, labels))
    images = in_format(normalize(images, plan.profile), settings)
    with autocast(settings):
        logits = model(images)
        mirrored = model(images.flip(3)) if plan.recipe.image.test_flip else None
    logits = logits.float() if mirrored is None else logits.float() + mirrored.float()
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = plan.recipe.loss(logits, one_hot_targets(labels, logits.shape[1], 0.0))
    return torch.stack([first[:, 0].sum(), first.sum(), loss * len(labels)]).double()
