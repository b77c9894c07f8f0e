"""Statistics that norms take over images: moved once a step, recomputed before an evaluation, named
in a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.base.devices import sum_dtype
from trainer.base.settings import Settings
from trainer.data.loader import MicroBatch
from trainer.data.transforms import autocast
from trainer.distributed.communicator import Ranks, alone
from trainer.models.edit.layer_kinds import RunningNorm
from trainer.models.edit.replacement import counted
from trainer.models.norm_statistics import norms_of_micro_batch, running_norms
from trainer.models.parts.norm_layers import StepNorm
from trainer.recipe.plan import Plan
from trainer.tasks import task_of


class StepStatistics:
    """Makes M accumulated micro-batches move running statistics as M ranks that each see one.

    Norms with batch statistics: with micro-batch j of M (j = 1 .. M) at momentum m_j = (b/M) / (1 -
    b (M-j)/M), where b is the layer's own, the M updates amount to R <- (1-b) R + b * mean of the M
    statistics. Norms with estimated ones (StepNorm) add up what the micro-batches saw and move
    once, when the step is finished.

    Ranks that share the micro-batches of a step each do so with their own; at its end the
    statistics of all ranks become the mean over them, weighted by their micro-batches, which is
    that of one rank that sees all M.
    """

    def __init__(
        self, model: nn.Module, is_recomputed: bool = False, is_momentum_fixed: bool = False
    ) -> None:
        """is_recomputed: do backward passes recompute activations, running norms a second time?
        is_momentum_fixed: would every other momentum be compiled, or captured, again?
        """
        self._is_recomputed, self._is_momentum_fixed = is_recomputed, is_momentum_fixed
        self._scratch = torch.zeros((), dtype=torch.int64)
        # momentum None is torch's cumulative average: it has no b to spread
        self.running = running_norms(model)
        self.norms = [(norm, norm.momentum) for norm in self.running if norm.momentum is not None]
        self.estimated = [module for module in model.modules() if isinstance(module, StepNorm)]
        # of fixed norms, all statistics in one tensor: as the step found them, then after each
        # micro-batch
        self._seen: list[Tensor] = []
        if is_momentum_fixed and self.norms:
            self._momenta = self._flat_momenta()
            for norm, _ in self.norms:
                # what runs becomes the micro-batch's own statistics, which `finish` takes the mean
                # of
                norm.momentum = 1.0
        self.is_sampled = bool(norms_of_micro_batch(model))

    def set(self, micro_batch: int, num_micro_batches: int) -> None:
        """Prepare for micro-batch 0 .. num_micro_batches - 1 of those that this rank has in a
        step.
        """
        if self._is_momentum_fixed and (running := self._running()):
            self._seen = [*(self._seen if micro_batch else ()), torch.cat(running)]
        left = num_micro_batches - 1 - micro_batch
        for norm, momentum in () if self._is_momentum_fixed else self.norms:
            norm.momentum = (momentum / num_micro_batches) / (
                1 - momentum * left / num_micro_batches
            )
        if micro_batch == 0:
            for estimate in self.estimated:
                estimate.start_step()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """A backward pass: norms that it runs a second time normalize as they did, and move
        nothing.
        """
        if not self._is_recomputed:
            yield
            return
        before = [(norm, norm.momentum, _buffers(norm)[2]) for norm in self.running]
        for norm, _, counter in before:
            norm.momentum = 0.0  # 1 R + 0 x: the bits of R
            norm.num_batches_tracked = self._scratch = self._scratch.to(counter.device)
        for estimate in self.estimated:
            estimate.is_adding = False
        try:
            yield
        finally:
            for norm, momentum, counter in before:
                norm.momentum, norm.num_batches_tracked = momentum, counter
            for estimate in self.estimated:
                estimate.is_adding = True

    def finish(
        self,
        ranks: Ranks = alone(),
        num_own: int = 1,
        num_micro_batches: int = 1,
        num_parts: int = 1,
    ) -> None:
        """After the backward pass of the last micro-batch: no gradient sees estimated statistics
        move.

        num_own: this rank's of the step's num_micro_batches, each shared by num_parts ranks.
        """
        if self._seen:
            self._move_once()
        if not ranks.is_alone:
            self._average(ranks, num_own, num_micro_batches, num_parts)
            self._add_up(ranks, num_own)
        for norm in self.estimated:
            norm.finish_step()

    def _moving(self) -> list[tuple[RunningNorm, float]]:
        """Frozen norms are in evaluation mode, and keep their statistics to the bit."""
        return [(norm, momentum) for norm, momentum in self.norms if norm.training]

    def _running(self) -> list[Tensor]:
        return [tensor for norm, _ in self._moving() for tensor in _buffers(norm)[:2]]

    def _flat_momenta(self) -> Tensor:
        return torch.cat(
            [torch.full_like(one, b) for norm, b in self._moving() for one in _buffers(norm)[:2]]
        )

    @torch.no_grad()
    def _move_once(self) -> None:
        """R <- (1 - b) R + b * mean over the micro-batches of their statistics, from copies of R
        and of each of them.
        """
        before, *each = [*self._seen, torch.cat(self._running())]
        if len(before) != len(self._momenta):  # norms were frozen or released
            self._momenta = self._flat_momenta()
        self._put(before.lerp(torch.stack(each).mean(0), self._momenta))
        self._seen = []

    def _put(self, flat: Tensor) -> None:
        running = self._running()
        # see lamb.py for torch._foreach_*
        torch._foreach_copy_(running, list(flat.split([len(tensor) for tensor in running])))

    @torch.no_grad()
    def _average(self, ranks: Ranks, num_own: int, num_micro_batches: int, num_parts: int) -> None:
        running = self._running()
        if running:
            flat = torch.cat(running) * (num_own / (num_micro_batches * num_parts))
            ranks.sum(flat)
            self._put(flat)
            torch._foreach_add_(
                [_buffers(norm)[2] for norm, _ in self._moving()], num_micro_batches - num_own
            )

    def _add_up(self, ranks: Ranks, num_own: int) -> None:
        """One sum over ranks for all layers."""
        if not self.estimated:
            return
        if not num_own:  # what an unfinished step has left is no part of this one
            for norm in self.estimated:
                norm.start_step()
        each = [norm.added() for norm in self.estimated]
        flat = torch.cat(each)
        flat = flat.to(sum_dtype(flat.device))
        ranks.sum(flat)
        for norm, added in zip(
            self.estimated, flat.to(each[0].dtype).split([len(part) for part in each]), strict=True
        ):
            norm.set_added(added)


@torch.no_grad()
def make_norms_precise(
    plan: Plan,
    settings: Settings,
    models: Sequence[nn.Module],
    batches: Iterable[MicroBatch],
    each: Callable[[], None] = lambda: None,
) -> None:
    """Set the running statistics of every norm to the plain mean over the recipe's
    precise_norm.images.

    batches: training micro-batches as a step has them, augmented and mixed; each counts by its
    images, and its variance is the unbiased one, as in training. The models are in evaluation mode
    but for the norms, which all normalize by the micro-batch. The new statistics stay in the
    models, as in pycls: the scored weights are the exported ones. They depend on weights and images
    alone, not on the statistics before: a pass that a stop has interrupted is simply repeated.

    Estimated statistics (StepNorm) stay as they are: training normalizes by the same ones as
    evaluation. each: called after every micro-batch.
    """
    section = plan.recipe.precise_norm
    assert section is not None
    norms = [norm for model in models for norm in running_norms(model)]
    # The count of batches is a count of training's: else a pass done twice would show in the
    # weights' digest.
    before = [(norm, norm.momentum, _buffers(norm)[2].clone()) for norm in norms]
    were_training = [model.training for model in models]
    for module in (*models, *norms):
        module.train(module in norms)
    try:
        _pass(plan, settings, models, norms, batches, section.images, each)
    finally:
        for norm, momentum, num_batches in before:
            norm.momentum = momentum
            _buffers(norm)[2].copy_(num_batches)
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def _buffers(norm: RunningNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance and the count of batches: all of running_norms have them."""
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and count is not None
    return mean, variance, count


def _pass(
    plan: Plan,
    settings: Settings,
    models: Sequence[nn.Module],
    norms: list[RunningNorm],
    batches: Iterable[MicroBatch],
    num_images: int,
    each: Callable[[], None],
) -> None:
    task, seen = task_of(plan, settings), 0
    for batch in batches:
        images, _ = task.prepare(batch)
        number = plan.norm_samples(batch.step)
        for sample in (images[place::number] for place in range(number)):
            seen += len(sample)
            for norm in norms:
                # a mean that grows: 1 for the first, which forgets what was before
                norm.momentum = len(sample) / seen
            with autocast(settings):
                for model in models:
                    model(sample)
            each()
            if seen >= num_images:
                return
    raise AssertionError(f"{seen} of {num_images} images")


def statistics_note(model: nn.Module, plan: Plan) -> str:
    """What batch.norm_images means for this model: part of the science, or memory only; one or two
    sentences.

    It is memory only where neither a norm, nor a mix, nor a mask drawn on the device depends on it.
    """
    batch = norms_of_micro_batch(model)
    estimated = [module for module in model.modules() if isinstance(module, StepNorm)]
    images = plan.recipe.batch.norm_images
    sample_notes = [getattr(module, "sample_note", None) for module in batch.values()]
    notes = [note(images) for note in sample_notes if note]
    if batch:
        kinds = " and ".join(f"{count} {kind}" for kind, count in counted(batch.values()))
        sample = notes[0] if notes else f"the {images}"
        num_parts = plan.assignment(0, plan.world_size).num_parts
        joined = (
            f" {num_parts} ranks share each sample and join their sums of it in every norm."
            if num_parts > 1
            else ""
        )
        return (
            f"{kinds} ({next(iter(batch))} the first) normalize by the statistics of {sample}"
            " images of a micro-batch: batch.norm_images is part of the science, as another sample"
            f" has other statistics and gives another result.{joined}"
        )
    norms = (
        f"{len(estimated)} norms normalize by running estimates over images, which move once in an"
        " optimizer step by all its images"
        if estimated
        else "No norm takes statistics over images"
    )
    mix = plan.recipe.mix
    if mix is not None and mix.images is None:
        return (
            f"{norms}, but {mix.name} draws once for the {images} images of a micro-batch:"
            " batch.norm_images is part of the science, unless mix.images says how many share a"
            " draw."
        )
    if _drops(model):
        return (
            f"{norms}: batch.norm_images is memory, but for what dropout and stochastic depth leave"
            " out, which is drawn per micro-batch: another number is another draw of it, as"
            " another seed is."
        )
    return f"{norms}: batch.norm_images is memory only, and moves the last digits alone."


def _drops(model: nn.Module) -> bool:
    """Does a layer leave something out at random? torch's and timm's have their rate under one of
    these names.
    """
    rates = (
        getattr(module, name, None)
        for module in model.modules()
        for name in ("p", "drop_prob", "drop_rate")
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
