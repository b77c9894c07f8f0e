"""A training stream with the faults that a loader can have."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from trainer.data.datasets.builtin import ImageSet
from trainer.data.decode import BadImage
from trainer.data.loader import MicroBatch, TrainStream
from trainer.data.order import epoch_order


@dataclass(frozen=True)
class Fault:
    """One fault. number: of the step that it strikes in, for a bad_image of the image; the first of
    a run is 1.

    seconds: how much longer the loader takes (slow), how long the disk is full (enospc; 0: for one
    write).
    """

    kind: str
    number: int
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}@{self.number}" + (f":{self.seconds:g}s" if self.seconds else "")


@dataclass(frozen=True)
class FaultyStream(TrainStream):
    """A TrainStream whose loader is slow at some steps, and finds some images damaged.

    faults: see Fault; images count from 1 in the order of the run, draws_per_epoch in each epoch.
    """

    faults: tuple[Fault, ...] = ()
    draws_per_epoch: int = 0

    @property
    def shares_repeats(self) -> bool:
        """No: a fault is one draw's, and one micro-batch's."""
        return False

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch | BadImage:
        step, micro_batch = key
        if micro_batch == self.assigned.group:  # this rank's first of the step
            time.sleep(
                sum(
                    fault.seconds
                    for fault in self.faults
                    if fault.kind == "slow" and fault.number == step + 1
                )
            )
        return super().__getitem__(key)

    @cached_property
    def _damaged(self) -> dict[tuple[int, ...], Fault]:
        """The draws (epoch, image, repeat) that decode as damaged."""
        found = {}
        for fault in self.faults:
            if fault.kind == "bad_image":
                epoch, place = divmod(fault.number - 1, self.draws_per_epoch)
                num_images = self.image_set.num_images
                order = epoch_order(self.seed, epoch, num_images, self.repeats, self.sampled)
                found[tuple(order[place].tolist())] = fault
        return found

    def _read(self, draw: np.ndarray) -> tuple[Image.Image, int]:
        fault = self._damaged.get(tuple(draw.tolist()))
        if fault is None:
            return super()._read(draw)
        return TrainStream._read(
            replace(self, image_set=_Damaged(self.image_set, int(draw[1]), fault)), draw
        )


@dataclass(frozen=True)
class _Damaged:
    """A set in which one image is damaged."""

    images: ImageSet
    place: int
    fault: Fault

    @property
    def num_images(self) -> int:
        return self.images.num_images

    def read(self, i: int) -> Image.Image:
        if i == self.place:
            raise BadImage(f"image {i} of the training set: damaged, as inject={self.fault} has it")
        return self.images.read(i)
