"""The micro-batches of an LR finder run: its trials of one seed train on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.loader import MicroBatch, TrainStream
from trainer.data.transforms import fill_of
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.recipe.plan import Plan

MOST_BYTES = 512 * 1024**2


class SeedBatches:
    """The micro-batches of one seed's steps, read and decoded once for all trials of that seed, on
    the CPU augmented too: trials differ in their values, not in their images.

    The first most_bytes of them are kept; what comes later is made anew by each trial.
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
                self._kept.append(batch)
            yield batch


def _num_bytes(batch: MicroBatch) -> int:
    drawn = [values for each in batch.drawn for values in each.values()]
    return sum(tensor.nbytes for tensor in (batch.images, batch.labels, batch.ids, *drawn))
