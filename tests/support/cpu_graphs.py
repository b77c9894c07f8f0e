"""CUDA graphs on a CPU: what torch computes within a capture is noted call by call, and a replay
makes the same calls on the same memory, whatever Python would do by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.num_replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def cpu_graphs(kept: Callable[[], Iterable[Tensor]]) -> Iterator[list[Graph]]:
    """A block in which torch captures and replays on the CPU; gives the graphs captured.

    kept(): what a capture must leave as it was, for it computes nothing on a GPU.
    """
    graphs: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph, **_):
        graphs.append(graph)
        tensors = list(kept())
        before, generator = [one.detach().clone() for one in tensors], torch.get_rng_state()
        with graph:
            yield
        with torch.no_grad():
            for one, old in zip(tensors, before, strict=True):
                one.copy_(old)
        torch.set_rng_state(generator)

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    with mock.patch.multiple(
        torch.cuda,
        CUDAGraph=Graph,
        graph=capture,
        Stream=Stream,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=Stream,
        graph_pool_handle=lambda: None,
    ):
        yield graphs
