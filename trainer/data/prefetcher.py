"""Micro-batches on their way to a GPU, on a stream of their own: the copy runs beside the step
before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.loader import MicroBatch


class Lane(Protocol):
    """A way to the device beside the one that computes."""

    def send(self, tensor: Tensor) -> Tensor:
        """Begin the copy; what comes back may not be read yet."""

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Have whatever computes next wait for all that was sent, and the memory of these stay
        until it is done.
        """


class CudaLane:
    """A stream of a GPU's own."""

    def __init__(self, device: str):
        self.device, self.stream = torch.device(device), torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Tensor:
        """Copy from pinned memory, where a small tensor is put first: the host does not wait."""
        with torch.cuda.stream(self.stream):
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def join(self, tensors: Iterable[Tensor]) -> None:
        """The waiting is the GPU's, not the host's."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(computing)


def arriving(
    batches: Iterable[MicroBatch], device: str, lane: Lane | None = None
) -> Iterator[MicroBatch]:
    """The same micro-batches, images and labels sent ahead where the device is a GPU.

    A micro-batch is sent when it is asked for. The host asks while the device still works on the
    step before it, so the copy is done by the time that its own step begins; nothing waits for the
    micro-batch after it.
    """
    if lane is None:
        if not device.startswith("cuda"):
            return iter(batches)
        lane = CudaLane(device)
    return map(lambda batch: _sent(batch, lane), batches)


def _sent(batch: MicroBatch, lane: Lane) -> MicroBatch:
    images, labels = lane.send(batch.images), lane.send(batch.labels)
    lane.join((images, labels))
    return batch._replace(images=images, labels=labels)
