"""The micro-batches of an LR finder run: its trials of one seed train on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.loader import MicroBatch, TrainStream
from trainer.data.transforms import fill_of
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.recipe.plan import Plan

MOST_BYTES = 512 * 1024**2


class SeedBatches:
    """The micro-batches of one seed's steps, read and decoded once for the trials of that seed that
    follow each other, on the CPU augmented too: they differ in their values, not in their images.

    The first most_bytes of them are kept, in the host's memory; what comes later is made anew by
    each trial.
    """

    def __init__(
        self,
        settings: Settings,
        data: OpenedData,
        ranks: Ranks = alone(),
        watch: Watch = Watch(),
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.settings, self.data, self.ranks, self.watch = settings, data, ranks, watch
        self.most_bytes = most_bytes
        self._seed: int | None = None
        self._kept: list[MicroBatch] = []
        self._room = 0

    def of(self, plan: Plan) -> Iterator[MicroBatch]:
        """This rank's micro-batches from the plan's first step on, in order.

        plan: any of this run's trials, which differ in seed and length only.
        """
        if plan.seed != self._seed:
            self._seed, self._kept, self._room = plan.seed, [], self.most_bytes
        yield from self._kept
        yield from self._others(plan)

    def _others(self, plan: Plan) -> Iterator[MicroBatch]:
        """Those after the ones kept, of which some are kept now."""
        last = self._kept[-1] if self._kept else None
        first_step = last.step if last else 0

        def with_pixels(stream: TrainStream) -> TrainStream:
            return replace(stream, fill=fill_of(plan.profile))  # as loader processes do

        is_own = self.settings.device == "cpu" and self.settings.loader == "torch"
        wrap = with_pixels if is_own else None
        made = self.data.train_stream(
            plan, self.settings, first_step, self.ranks, wrap=wrap, watch=self.watch
        )
        for batch in made:
            if last and (batch.step, batch.micro_batch) <= (last.step, last.micro_batch):
                continue
            self._room -= _num_bytes(batch)
            if self._room >= 0:
                self._kept.append(_copied(batch))
            yield batch


def _copied(batch: MicroBatch) -> MicroBatch:
    """The same in the host's memory, and its own: what a loader process has sent holds an open
    file, and a part its whole step.
    """
    tensors: dict[str, Any] = {
        name: part.to("cpu", copy=True)
        for name, part in batch._asdict().items()
        if isinstance(part, torch.Tensor)
    }
    drawn = tuple({name: each.clone() for name, each in one.items()} for one in batch.drawn)
    return batch._replace(**tensors, drawn=drawn)


def _num_bytes(batch: MicroBatch) -> int:
    drawn = [values for each in batch.drawn for values in each.values()]
    tensors = [part for part in batch if isinstance(part, torch.Tensor)]
    return sum(tensor.nbytes for tensor in (*tensors, *drawn))
