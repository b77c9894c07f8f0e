"""Copying micro-batches to a GPU on a CUDA stream of their own, beside the previous step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.loader import MicroBatch


class CopyStream(Protocol):
    """A stream of copies to the device, beside the stream that computes."""

    def send(self, tensor: Tensor) -> Tensor:
        """Begin the copy; its result may not be read before join()."""

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Make the computing stream wait for all copies, and keep the tensors' memory until it has
        used them.
        """


class CudaCopyStream:
    """A CUDA stream for copies."""

    def __init__(self, device: str):
        self.device, self.stream = torch.device(device), torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Tensor:
        """Copy from pinned memory, so that the host does not wait; pins the tensor first."""
        with torch.cuda.stream(self.stream):
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def join(self, tensors: Iterable[Tensor]) -> None:
        """The GPU waits, not the host."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(computing)


def prefetched(
    batches: Iterable[MicroBatch], device: str, copy_stream: CopyStream | None = None
) -> Iterator[MicroBatch]:
    """The same micro-batches, with images and labels copied to the device if that is a GPU.

    A copy starts when its micro-batch is requested. The host requests it while the device is still
    busy with the step before, so the copy overlaps with that step.
    """
    if copy_stream is None:
        if not device.startswith("cuda"):
            return iter(batches)
        copy_stream = CudaCopyStream(device)
    return map(lambda batch: _sent(batch, copy_stream), batches)


def _sent(batch: MicroBatch, copy_stream: CopyStream) -> MicroBatch:
    images, labels = copy_stream.send(batch.images), copy_stream.send(batch.labels)
    copy_stream.join((images, labels))
    return batch._replace(images=images, labels=labels)
