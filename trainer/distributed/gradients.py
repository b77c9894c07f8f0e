"""The gradients of all ranks, added up once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trainer.distributed.communicator import Ranks

BUCKET_BYTES = 25 * 2**20  # of one sum: torch's DistributedDataParallel has the same
_ALIGNED = 16  # numbers: a tensor begins at a multiple of 64 bytes, where fused operations want it


class Gradients:
    """Sums gradients over ranks, bucket by bucket, while the last backward pass of the step still
    makes others.

    A gradient is a view of its bucket, a flat tensor, so nothing is copied. Buckets go out in one
    fixed order, from the last weights to the first, as a backward pass makes them. A rank without a
    micro-batch in the step sends zeros. A process by itself keeps its gradients as autograd makes
    them, unless are_static: then they stay in one place, as a captured graph wants them.

    torch's DistributedDataParallel cannot leave a rank without a micro-batch, and divides by the
    number of ranks.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        ranks: Ranks,
        bucket_bytes: int = BUCKET_BYTES,
        are_static: bool = False,
    ) -> None:
        self.ranks = ranks
        is_laid_out = are_static or not ranks.is_alone
        self.weights = [one for one in weights if one.requires_grad and is_laid_out][::-1]
        self._buckets: list[Tensor] = []
        self._views: list[Tensor] = []
        self._bucket_of: list[int] = []
        for bundle in _bundles(self.weights, bucket_bytes):
            self._lay_out(bundle)
        self._numbers = [self._bucket_of.count(bucket) for bucket in range(len(self._buckets))]
        self._has_come: set[int] = set()
        self._never: list[int] | None = None  # weights that no rank has a gradient for
        self._is_last = False
        self._left = list(self._numbers)
        self._waits: list[Callable[[], None]] = []
        for place, weight in enumerate(self.weights):
            weight.register_post_accumulate_grad_hook(lambda weight, place=place: self._came(place))

    def start(self) -> None:
        """Before the first micro-batch of a step: all gradients at zero."""
        self._is_last, self._left, self._waits = False, list(self._numbers), []
        for bucket in self._buckets:
            bucket.zero_()
        for weight, view in zip(self.weights, self._views, strict=True):
            weight.grad = view

    def expect_last(self) -> None:
        """Before the backward pass of this rank's last micro-batch: a bucket goes out once it is
        full.
        """
        self._is_last = True

    def finish(self) -> None:
        """After it, or on a rank that had none: every gradient is the sum over the ranks."""
        self.drain()
        if self.weights and self._never is None:
            has_come = torch.tensor(
                [float(place in self._has_come) for place in range(len(self.weights))]
            )
            self.ranks.sum(has_come)
            self._never = (has_come == 0).nonzero().flatten().tolist()
        for place in self._never or ():
            self.weights[
                place
            ].grad = None  # as in one process: an optimizer then leaves the weight alone

    def expect_others(self) -> None:
        """Other weights than before get gradients from now on."""
        self._has_come, self._never = set(), None

    def drain(self) -> None:
        """Send what has not gone out yet, and wait: also where a pass was broken off, as the others
        wait for its buckets.
        """
        while len(self._waits) < len(self._buckets):
            self._send()
        for wait in self._waits:
            wait()

    def _lay_out(self, bundle: list[nn.Parameter]) -> None:
        sizes = [-(-weight.numel() // _ALIGNED) * _ALIGNED for weight in bundle]
        bucket = torch.zeros(sum(sizes), dtype=bundle[0].dtype, device=bundle[0].device)
        offset = 0
        for weight, size in zip(bundle, sizes, strict=True):
            self._views.append(bucket.as_strided(weight.size(), weight.stride(), offset))
            self._bucket_of.append(len(self._buckets))
            offset += size
        self._buckets.append(bucket)

    def _came(self, place: int) -> None:
        self._has_come.add(place)
        if not self._is_last:
            return
        self._left[self._bucket_of[place]] -= 1
        while len(self._waits) < len(self._buckets) and self._left[len(self._waits)] == 0:
            self._send()

    def _send(self) -> None:
        self._waits.append(self.ranks.start_sum(self._buckets[len(self._waits)]))


def _bundles(weights: list[nn.Parameter], bucket_bytes: int) -> Iterable[list[nn.Parameter]]:
    """The weights in order, split into runs of one dtype and about bucket_bytes."""
    bundle: list[nn.Parameter] = []
    num_bytes = 0
    for weight in weights:
        size = weight.numel() * weight.element_size()
        if bundle and (num_bytes + size > bucket_bytes or weight.dtype != bundle[0].dtype):
            yield bundle
            bundle, num_bytes = [], 0
        bundle.append(weight)
        num_bytes += size
    if bundle:
        yield bundle
