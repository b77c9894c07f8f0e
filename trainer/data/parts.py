"""Loading with repeated augmentation: all repeats of an image in one part of a step, decoded once.

The repeats of an image are adjacent in a step's order and belong to different micro-batches. Loaded
micro-batch by micro-batch, each repeat would be decoded again. So the draws of a step are split
into as many contiguous parts as there are micro-batches, the workers load parts, and the
micro-batches are assembled from them: the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.data.decode import BadImage
from trainer.data.order import step_ids
from trainer.data.threads import closing, thread_pool

if TYPE_CHECKING:
    from trainer.data.loader import MicroBatch, TrainStream


def has_parts(stream: TrainStream) -> bool:
    """Does loading by parts of a step, not by micro-batches, decode less?

    A rank of several has only some micro-batches of a step: with as many ranks as repeats, none
    has an image twice.
    """
    num_groups = stream.assigned.num_groups
    is_shared = stream.shares_repeats and num_groups < stream.repeats
    has_several = stream.num_micro_batches > num_groups and stream.assigned.num_parts == 1
    return (
        is_shared and has_several and stream.num_splits == 1 and not stream.image_set.is_in_memory
    )


@dataclass(frozen=True)
class Parts:
    """The parts of a stream's steps by key, (step, part): each loaded as if it were a
    micro-batch.
    """

    stream: TrainStream

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch | BadImage:
        return self.stream.made(*key, self.ids_of(key))

    def ids_of(self, key: tuple[int, int]) -> np.ndarray:
        """The draws of one part: ids [b, 3] int64 = (epoch, image, repeat)."""
        stream, (step, part) = self.stream, key
        ids = step_ids(
            stream.seed,
            step,
            stream.image_set.num_images,
            stream.repeats,
            stream.batch_images,
            stream.steps_per_epoch,
            stream.sampled,
        )
        return ids[_parts(stream, step)[0][part]]


def part_keys(stream: TrainStream, first_step: int, num_steps: int) -> Iterator[tuple[int, int]]:
    """(step, part) from first_step up to the end of step num_steps - 1: as many as there are
    micro-batches.
    """
    for step in range(first_step, num_steps):
        yield from ((step, part) for part, _ in enumerate(stream.keys(step, step + 1)))


def in_micro_batches(
    stream: TrainStream,
    parts: Iterable[MicroBatch | BadImage],
    first_step: int,
    num_steps: int,
    device: str,
    is_ahead: bool,
) -> Iterator[MicroBatch]:
    """The micro-batches of a stream from the parts of its steps, in order; images pinned where the
    device is a GPU.

    is_ahead: for each micro-batch taken from a step, one part of the next step is received, so that
    no worker waits. A thread copies the parts into the micro-batches.

    Raises BadImage at the start of the image's step.
    """
    parts = iter(parts)
    with thread_pool(1) as pool, closing(parts):
        steps = deque([_Step(stream, first_step, device)])
        for step in range(first_step, num_steps):
            now = steps.popleft() if steps else _Step(stream, step, device)
            while now.num_missing:
                now.take(next(parts), pool)
            later = _Step(stream, step + 1, device)
            if is_ahead and step + 1 < num_steps:
                steps.append(later)
            now.check()
            for _, micro_batch in stream.keys(step, step + 1):
                if steps and later.num_missing:
                    later.take(next(parts), pool)
                yield now.given(micro_batch)


class _Step:
    """The micro-batches of one step, contiguous in one tensor, filled as its parts arrive."""

    def __init__(self, stream: TrainStream, step: int, device: str) -> None:
        places, owners = _parts(stream, step)
        own = [micro_batch for _, micro_batch in stream.keys(step, step + 1)]
        by_micro_batch = np.argsort(owners[np.concatenate(places)], kind="stable")
        self._rows = np.array_split(np.argsort(by_micro_batch), len(places))
        sizes = [int((owners == micro_batch).sum()) for micro_batch in own]
        ends = np.cumsum(sizes).tolist()
        self._slices = {
            micro_batch: slice(end - size, end)
            for micro_batch, size, end in zip(own, sizes, ends, strict=True)
        }
        self._device, self._taken, self._bad, self._whole = device, [], None, None

    @property
    def num_missing(self) -> int:
        """Parts that are still to come."""
        return len(self._slices) - len(self._taken)

    def take(self, part: MicroBatch | BadImage, pool: Executor) -> None:
        """Start copying the next part's rows into their micro-batches."""
        if isinstance(part, BadImage):
            self._bad = self._bad or part
            self._taken.append(None)
        else:
            self._taken.append(pool.submit(self._put, part, self._rows[len(self._taken)]))

    def check(self) -> None:
        """Wait for all copies. Raises BadImage."""
        for begun in filter(None, self._taken):
            begun.result()
        if self._bad is not None:
            raise self._bad

    def given(self, micro_batch: int) -> MicroBatch:
        """One of its micro-batches."""
        rows = self._slices[micro_batch]
        return _each(self._whole, lambda values: values[rows])._replace(micro_batch=micro_batch)

    def _put(self, part: MicroBatch, rows: np.ndarray) -> None:
        if self._whole is None:
            self._whole = _each(
                part,
                lambda values: torch.empty(self._num_images, *values.shape[1:], dtype=values.dtype),
            )
            if self._device.startswith("cuda"):
                self._whole = self._whole._replace(
                    images=torch.empty_like(self._whole.images, pin_memory=True)
                )
        for there, values in zip(_tensors(self._whole), _tensors(part), strict=True):
            # by numpy, which copies whole images, where torch's indexing goes value by value
            there.numpy()[rows] = values.numpy()

    @property
    def _num_images(self) -> int:
        return sum(map(len, self._rows))


def _tensors(batch: MicroBatch) -> list[Tensor]:
    return [
        batch.images,
        batch.labels,
        batch.ids,
        batch.shown,
        *(values for each in batch.drawn for values in each.values()),
    ]


def _each(batch: MicroBatch, made: Callable[[Tensor], Tensor]) -> MicroBatch:
    """A micro-batch with a function applied to each tensor."""
    drawn = tuple({name: made(values) for name, values in each.items()} for each in batch.drawn)
    images, labels, ids, shown = map(made, (batch.images, batch.labels, batch.ids, batch.shown))
    return batch._replace(images=images, labels=labels, ids=ids, drawn=drawn, shown=shown)


def _parts(stream: TrainStream, step: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Positions of this rank's parts in a step's draws, and the micro-batch of each draw [n]."""
    num_draws, num_micro_batches = stream.window(step)
    owners = np.arange(num_draws) % num_micro_batches
    own = stream.assigned.micro_batches(num_draws, num_micro_batches)
    return np.array_split(np.flatnonzero(np.isin(owners, own)), max(1, len(own))), owners
