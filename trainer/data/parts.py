"""Steps made part by part, for pages that repeat images: all repeats of an image in one part, decoded once for all.

The repeats of an image stand in a row in a step's order and fall into different micro-batches of it. Made micro-batch by
micro-batch, each of them would be decoded anew. So the draws of a step are cut into as many runs as there are
micro-batches, the processes make those, and the micro-batches are put together from them: the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.data.decode import BadImage
from trainer.data.order import num_micro_batches_in, step_ids

if TYPE_CHECKING:
    from trainer.data.loader import MicroBatch, TrainStream


def has_parts(stream: TrainStream) -> bool:
    """Would a process that makes a part of a step, not a micro-batch of it, decode less?

    A rank of several has only some micro-batches of a step: with as many ranks as repeats none has an image twice.
    """
    is_shared = stream.shares_repeats and stream.num_ranks < stream.repeats
    has_several = stream.num_micro_batches > stream.num_ranks
    return is_shared and has_several and stream.num_splits == 1 and not stream.image_set.is_in_memory


@dataclass(frozen=True)
class Parts:
    """The parts of a stream's steps by key, (step, part): the draws of a part as if they were a micro-batch."""

    stream: TrainStream

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch | BadImage:
        step, part = key
        ids, places, _ = _parts(self.stream, step)
        return self.stream.made(step, part, ids[places[part]])


def part_keys(stream: TrainStream, first_step: int, num_steps: int) -> Iterator[tuple[int, int]]:
    """(step, part) from first_step up to the end of step num_steps - 1: as many as there are micro-batches."""
    for step in range(first_step, num_steps):
        yield from ((step, part) for part in range(len(list(stream.keys(step, step + 1)))))


def in_micro_batches(
    stream: TrainStream, parts: Iterable[MicroBatch | BadImage], first_step: int, num_steps: int, device: str
) -> Iterator[MicroBatch]:
    """The micro-batches of a stream from the parts of its steps, in order; images pinned where the device is a GPU.

    While a step's micro-batches are taken the parts of the step after it are, one for each: no process has to wait.

    Raises BadImage, where the step of the image begins.
    """
    parts, ready = iter(parts), deque()
    for step in range(first_step, num_steps):
        keys = list(stream.keys(step, step + 1))
        ready.extend(next(parts) for _ in range(len(keys) - len(ready)))
        made = [ready.popleft() for _ in keys]
        for part in made:
            if isinstance(part, BadImage):
                raise part
        _, places, owners = _parts(stream, step)
        for _, micro_batch in keys:
            ready.extend(_next(parts))
            rows = [torch.from_numpy(np.flatnonzero(owners[place] == micro_batch)) for place in places]
            yield _joined(made, rows, micro_batch, device)


def _next(parts: Iterator) -> list:
    return [part for part in [next(parts, None)] if part is not None]


def _parts(stream: TrainStream, step: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """The draws of a step in order [n, 3], where among them this rank's parts lie, and the micro-batch of each draw [n]."""
    ids = step_ids(stream.seed, step, stream.image_set.num_images, stream.repeats, stream.batch_images, stream.steps_per_epoch)
    num_micro_batches = num_micro_batches_in(len(ids), stream.batch_images, stream.num_micro_batches)
    owners = np.arange(len(ids)) % num_micro_batches
    own = range(stream.rank, num_micro_batches, stream.num_ranks)
    return ids, np.array_split(np.flatnonzero(np.isin(owners, own)), max(1, len(own))), owners


def _joined(parts: list[MicroBatch], rows: list[Tensor], micro_batch: int, device: str) -> MicroBatch:
    """One micro-batch from those rows of each part."""

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.index_select(0, those) for tensor, those in zip(tensors, rows, strict=True)])

    drawn = tuple({name: joined(part.drawn[place][name] for part in parts) for name in each} for place, each in enumerate(parts[0].drawn))
    labels, ids, shown = (joined(getattr(part, name) for part in parts) for name in ("labels", "ids", "shown"))
    images = _images([part.images for part in parts], rows, device)
    return parts[0]._replace(micro_batch=micro_batch, images=images, labels=labels, ids=ids, drawn=drawn, shown=shown)


def _images(images: list[Tensor], rows: list[Tensor], device: str) -> Tensor:
    """Those rows of each, copied once, into pinned memory where the device is a GPU."""
    num_images = sum(map(len, rows))
    there = torch.empty(num_images, *images[0].shape[1:], dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    for part, those, place in zip(images, rows, there.split([len(those) for those in rows]), strict=True):
        torch.index_select(part, 0, those, out=place)
    return there
