"""Micro-batches on their way to a GPU: what is sent, in which order, and what waits for what."""

import pytest
import torch

from trainer.data.loader import MicroBatch
from trainer.data.prefetcher import CudaCopyStream, prefetched


def batch_of(step):
    images = torch.full((2, 3, 4, 4), step, dtype=torch.uint8)
    return MicroBatch(
        step,
        0,
        images,
        torch.tensor([step, step]),
        torch.zeros(2, 3),
        ({"operation": torch.ones(2)},),
        torch.zeros(2),
    )


class Recorded:
    """A copy_stream that notes what happens."""

    def __init__(self, events):
        self.events = events

    def send(self, tensor):
        self.events.append(("send", int(tensor.flatten()[0])))
        return tensor + 100

    def join(self, tensors):
        self.events.append(("join", [int(tensor.flatten()[0]) for tensor in tensors]))


def test_each_micro_batch_is_sent_when_asked_for_and_joined_before_it_is_given():
    events = []

    def source():
        for step in range(3):
            events.append(("made", step))
            yield batch_of(step)

    stream = prefetched(source(), "cuda", Recorded(events))
    assert events == []  # nothing before it is asked for
    for step, batch in enumerate(stream):
        assert events == [
            ("made", step),
            ("send", step),
            ("send", step),
            ("join", [100 + step, 100 + step]),
        ]
        assert (
            batch.images.unique().tolist() == [100 + step]
            and batch.labels.tolist() == [100 + step] * 2
        )
        assert batch.step == step and batch.drawn[0]["operation"].tolist() == [
            1,
            1,
        ]  # small, read by the host: they stay
        events.clear()


def test_on_the_cpu_nothing_moves():
    batches = [batch_of(step) for step in range(2)]
    for ours, theirs in zip(prefetched(batches, "cpu"), batches, strict=True):
        assert ours is theirs


@pytest.mark.gpu
def test_a_gpu_gets_the_same_values():
    copy_stream = CudaCopyStream("cuda")
    for step, batch in enumerate(
        prefetched(
            [
                batch_of(step)._replace(images=batch_of(step).images.pin_memory())
                for step in range(5)
            ],
            "cuda",
            copy_stream,
        )
    ):
        assert batch.images.is_cuda and torch.equal(batch.images.cpu(), batch_of(step).images)
