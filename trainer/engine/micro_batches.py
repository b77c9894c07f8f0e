"""A micro-batch that does not fit into memory is split and the same step retried, with the same
samples and draws.

Loaded, augmented and mixed as a whole, a micro-batch then goes through the model part by part, as
does one of several norm samples, loaded together because a mixing unit is larger than a sample.
Without norms over images that changes rounding alone, and the draws of dropout and stochastic
depth, which continue from part to part; norms over images normalize by a part, which the row keeps
as a deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from trainer.base.devices import empty_cache, unused_share
from trainer.base.memory import MemoryFull, is_memory_full, is_of_ranks
from trainer.base.settings import Settings
from trainer.base.signals import Stopped
from trainer.data.loader import MicroBatch
from trainer.engine.state import TrainingState
from trainer.recipe.plan import Plan

Found = TypeVar("Found")
_MUCH_UNUSED = 0.1
_EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment"


def pieces_at(plan: Plan, num_pieces: int, step: int, least_images: int = 1) -> int:
    """Parts of each micro-batch of a step, on every rank the same: its norm samples, or more but
    none of fewer than least_images.
    """
    num_samples = -(-plan.norm_samples(step) // plan.num_parts(step))
    return max(num_samples, min(num_pieces, plan.part_images(step) // least_images))


def num_pieces(state: TrainingState, step: int) -> int:
    """Parts that each micro-batch of a step is split into: its norm samples, until memory has run
    out.
    """
    return pieces_at(state.plan, state.progress.num_pieces, step, least_images(state))


def least_images(state: TrainingState) -> int:
    """Of a part: one image alone may have no statistics."""
    return 2 if state.step_statistics.is_sampled else 1


def split(images: Tensor, targets: Tensor, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A prepared micro-batch (images [S * B, ...], targets [B, ...]) in parts: each has every
    number-th of the B images, as micro-batches have those of a step.
    """
    if number == 1:
        yield images, targets
        return
    splits = images.unflatten(0, (-1, len(targets)))
    for place in range(number):
        yield splits[:, place::number].flatten(0, 1), targets[place::number]


@contextmanager
def whole_or_undone(state: TrainingState, num_micro_batches: int) -> Iterator[None]:
    """A block that adds up a step's gradients. Where Stopped ends it between two micro-batches, the
    state is as before the step: what the first ones have moved (running statistics) is put back.
    """
    before = [buffer.clone() for buffer in state.model.buffers()] if num_micro_batches > 1 else []
    try:
        yield
    except Stopped:
        for buffer, old in zip(state.model.buffers(), before, strict=False):
            buffer.copy_(old)
        state.optimizer.zero_grad(set_to_none=True)
        raise


def retry_on_out_of_memory(
    add_gradients: Callable[[TrainingState, Iterator[MicroBatch], int], Found],
    state: TrainingState,
    loader: Iterator[MicroBatch],
    step: int,
) -> Found:
    """add_gradients(state, loader, step); where memory runs out on any rank, all retry it in
    smaller parts.

    That is micro_batch=auto. Without it, or where there are no smaller parts, the error is raised.
    """
    if state.settings.micro_batch != "auto":
        return add_gradients(state, loader, step)
    again = _Again(loader)
    before = [buffer.clone() for buffer in state.model.buffers()]
    while True:
        found, error = _tried(add_gradients, state, again, step)
        state.gradients.drain()
        if not state.ranks.any(error is not None):
            assert found is not None
            return found
        _halve(state, step, error)
        del found
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(state.model.buffers(), before, strict=True):
            buffer.copy_(old)
        empty_cache(state.settings.device)
        again.start()


def _tried(
    add_gradients: Callable[[TrainingState, Iterator[MicroBatch], int], Found],
    state: TrainingState,
    window: Iterator[MicroBatch],
    step: int,
) -> tuple[Found, None] | tuple[None, RuntimeError]:
    """What add_gradients gives, and None; or None, and the error without the frames that keep
    the memory alive.
    """
    try:
        return add_gradients(state, window, step), None
    except RuntimeError as error:
        # after an error of theirs the ranks could not even agree to try again
        if is_of_ranks(error) or not is_memory_full(error):
            raise
        return None, error.with_traceback(None)


def _halve(state: TrainingState, step: int, error: RuntimeError | None) -> None:
    """Twice as many parts from this step on, noted. Raises OutOfMemoryError where they would be
    too small.
    """
    plan, progress = state.plan, state.progress
    before = num_pieces(state, step)
    after = pieces_at(plan, 2 * before, step, least_images(state))
    if after == before:
        raise error or torch.OutOfMemoryError("out of memory on another rank")
    progress.num_pieces = after
    sizes = [_images_at_once(plan, step, number) for number in (before, after)]
    note = f"micro_batch {sizes[0]} -> {sizes[1]} images after step {step}: out of memory"
    progress.changes.append(note)
    state.notes.append(
        (
            (
                f"{note}; this step is retried and the rest of the run split; the row"
                " records it, and is not bitwise"
            ),
            None,
        )
    )
    if state.step_statistics.is_sampled:
        deviation = (
            f"DEVIATION: norms now normalize by {sizes[1]} images where the recipe has"
            f" batch.norm_images {plan.recipe.batch.norm_images}: another result than the"
            " recipe's; the row keeps it as a deviation"
        )
        state.notes.append((deviation, "bold red"))


def _images_at_once(plan: Plan, step: int, num_pieces: int) -> int:
    """That go through the model of one rank, which may share a micro-batch with others."""
    return -(-plan.recipe.images_together // (plan.num_parts(step) * num_pieces))


class _Again:
    """A stream that can be read again from the start of a step."""

    def __init__(self, stream: Iterator[MicroBatch]) -> None:
        self._stream, self._place = stream, 0
        self._seen: list[MicroBatch] = []

    def __iter__(self) -> _Again:
        return self

    def __next__(self) -> MicroBatch:
        if self._place == len(self._seen):
            self._seen.append(next(self._stream))
        self._place += 1
        return self._seen[self._place - 1]

    def start(self) -> None:
        self._place = 0


@contextmanager
def explained(state: TrainingState) -> Iterator[None]:
    """A block of training in which memory that runs out becomes one line: what is too much, and
    what would fit.

    Raises MemoryFull.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_memory_full(error):
            raise
        raise MemoryFull(_explanation(state, unused_share(state.settings.device))) from None


def _explanation(state: TrainingState, unused: float) -> str:
    """unused: the share of the GPU's memory that torch holds in pieces too small for a tensor."""
    plan, step = state.plan, state.progress.step
    images = _images_at_once(plan, step, num_pieces(state, step))
    found = remedies(plan, state.settings, state.step_statistics.is_sampled)
    if unused > _MUCH_UNUSED:
        found.insert(0, f"{_EXPANDABLE} ({unused:.0%} of its memory lies between tensors)")
    *most, last = found
    return (
        f"out of memory in step {step + 1}: a micro-batch of {images} images of"
        f" {plan.train_px_at(step)} px does not fit on {state.settings.device} in"
        f" {state.settings.precision}; use {', '.join(most)}{', or ' if most else ''}{last}"
    )


def remedies(plan: Plan, settings: Settings, is_sampled: bool) -> list[str]:
    """What lowers the memory of a step, the least harm first. is_sampled: do norms take statistics
    over a micro-batch?
    """
    norm_images, found = plan.recipe.batch.norm_images, []
    if not is_sampled and settings.micro_batch != "auto":
        found.append("micro_batch=auto")
    if not settings.activation_checkpointing:
        found.append("activation_checkpointing=1")
    if settings.precision in ("float32", "tf32"):
        found.append("precision=bf16")
    if is_sampled and norm_images % 2 == 0 and norm_images > 2:
        half = f'set="batch.norm_images={norm_images // 2}"'
        num_parts = plan.assignment(0, plan.world_size).num_parts
        found.append(
            f"{2 * num_parts * plan.num_micro_batches} ranks, {2 * num_parts} of which share each"
            " sample"
        )
        found.append(f"{half} or micro_batch=auto (deviations: norms sample fewer images)")
    return found or ["a device with more memory"]


def norm_images_used(state: TrainingState) -> int:
    """Images that norms took their statistics over in the end: batch.norm_images, or less where
    memory had run out.
    """
    recipe = state.plan.recipe
    if not state.step_statistics.is_sampled:
        return recipe.batch.norm_images
    return -(-recipe.images_together // num_pieces(state, 0))
