"""Dropout and stochastic depth of a micro-batch that several ranks share: drawn as in one process.

Every rank draws for all images, from the same seed, and uses what is its own images': draws are
numbers on the device, cheap beside what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn

from trainer.models.parts.depth import BlockDropout

# What they draw depends on a shape alone, and multiplies their input.
_NOISE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath, DropBlock2d, BlockDropout)


class SharedNoise:
    """The noise layers of a model whose micro-batches are shared. num_splits: of augment_splits."""

    def __init__(self, model: nn.Module, is_shared: bool, num_splits: int) -> None:
        self._num_splits, self._num_images = num_splits, 0
        self._rows: Tensor | None = None
        self._kept: dict[tuple, Tensor] = {}  # on the device: a copy to it would be waited for
        for module in model.modules() if is_shared else ():
            if isinstance(module, _NOISE):
                module.forward = partial(self._forward, module, module.forward)

    @contextmanager
    def over(self, rows: Sequence[int], num_images: int, device: str) -> Iterator[None]:
        """A block of passes over these rows of a micro-batch of num_images."""
        key = (*rows, num_images)
        if key not in self._kept:
            self._kept[key] = torch.tensor(rows, device=device)
        self._rows, self._num_images = self._kept[key], num_images
        try:
            yield
        finally:
            self._rows = None

    def _forward(self, module: nn.Module, plain, x: Tensor) -> Tensor:
        if self._rows is None or not module.training:
            return plain(x)
        # images stand split after split; what a layer sees of one image, such as its windows, is
        # in one place
        each = len(x) // (self._num_splits * len(self._rows))
        shape = [1] * (x.ndim - 1) if isinstance(module, DropPath) else x.shape[1:]
        ones = x.new_ones(self._num_splits * self._num_images * each, *shape)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            ones = ones.contiguous(memory_format=torch.channels_last)  # the order of draws
        noise = plain(ones).unflatten(0, (self._num_splits, self._num_images, each))
        return x * noise[:, self._rows].flatten(0, 2)
