"""cuda_graphs=1: the passes over a micro-batch as one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.base.errors import UserError
from trainer.base.memory import is_memory_full
from trainer.models.parts.norm_layers import StepNorm

Passes = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    loss: Tensor


class CapturedPasses:
    """Forward pass, loss and backward pass over a micro-batch, captured as a CUDA graph.

    A shape is run kernel by kernel when it first comes, which is its warm-up, captured when it
    comes again, and one launch from then on. Each replay reads inputs and targets from where the
    capture did and adds to the gradients that were there then: they stay in one place. Draws
    (dropout, stochastic depth) are those of the device's generator, as it stands at the replay.

    Source: torch's notes, "CUDA semantics: CUDA Graphs".
    """

    def __init__(self, model: nn.Module, device: str, num_parts: int = 1) -> None:
        """num_parts: ranks that share a micro-batch.

        Raises UserError for what no graph can hold.
        """
        if any(isinstance(module, StepNorm) for module in model.modules()):
            raise UserError(
                "cuda_graphs=1: norms with estimated statistics count what every micro-batch adds;"
                " use cuda_graphs=0"
            )
        if num_parts > 1:
            raise UserError(
                f"cuda_graphs=1: not possible where {num_parts} ranks share a micro-batch and meet"
                " within its passes; use cuda_graphs=0, or fewer ranks"
            )
        self._model, self._device = model, torch.device(device)
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._captured: dict[tuple, _Captured | None] = {}

    def __call__(self, passes: Passes, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """passes(inputs, targets, share): its scalar, to be read before the next call. share: of
        the step's images.
        """
        key = (*inputs.shape, *targets.shape, share)
        # a hook on the model, as inject= adds, is Python's, which a replay does not run
        if key not in self._captured or self._model._forward_hooks:
            self._captured.setdefault(key, None)
            return self._uncaptured(passes, inputs, targets, share)
        found = self._captured[key]
        if found is None:
            found = self._captured[key] = self._capture(passes, inputs, targets, share)
        found.inputs.copy_(inputs)
        found.targets.copy_(targets)
        found.graph.replay()
        return found.loss

    def _uncaptured(self, passes: Passes, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """On the stream of captures, which what autograd keeps for each weight then belongs to."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            loss = passes(inputs, targets, share)
        computing.wait_stream(self._stream)
        return loss

    def _capture(self, passes: Passes, inputs: Tensor, targets: Tensor, share: float) -> _Captured:
        """Nothing is computed. Raises UserError where the passes do what no graph can hold."""
        own_inputs, own_targets = torch.empty_like(inputs), torch.empty_like(targets)
        graph = torch.cuda.CUDAGraph()
        # threads of ours that copy or write meanwhile are none of its business
        within = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with within:
                loss = passes(own_inputs, own_targets, share)
        except RuntimeError as error:
            if is_memory_full(error):
                raise
            raise UserError(
                f"cuda_graphs=1: the passes cannot be captured ({str(error).splitlines()[0]}); use"
                " cuda_graphs=0"
            ) from error
        return _Captured(graph, own_inputs, own_targets, loss)
