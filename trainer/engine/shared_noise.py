"""Dropout and stochastic depth of a micro-batch that several ranks share: drawn as in one process.

Every rank draws for all images, from the same seed, and uses what is its own images': draws are
numbers on the device, cheap beside what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
                own = partial(self._forward, module, module.forward)
                module.forward = own  # type: ignore[method-assign]  # of this one instance
        # timm's heads have this rate, and some call torch's function
        has_function = is_shared and bool(getattr(model, "drop_rate", 0))
        self._functions = _Dropouts(self) if has_function else nullcontext()

    @contextmanager
    def over(self, rows: Sequence[int], num_images: int, device: str) -> Iterator[None]:
        """A block of passes over these rows of a micro-batch of num_images."""
        key = (*rows, num_images)
        if key not in self._kept:
            self._kept[key] = torch.tensor(rows, device=device)
        self._rows, self._num_images = self._kept[key], num_images
        try:
            with self._functions:
                yield
        finally:
            self._rows = None

    def _forward(self, module: nn.Module, plain, x: Tensor) -> Tensor:
        if not module.training:
            return plain(x)
        return self.own(
            plain, x, [1] * (x.ndim - 1) if isinstance(module, DropPath) else x.shape[1:]
        )

    def own(self, plain: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int]) -> Tensor:
        """x times its own images' rows of what `plain` makes of ones [all images, *shape]."""
        rows, self._rows = self._rows, None  # what `plain` calls is not of the own images
        if rows is None:
            return plain(x)
        # images stand split after split; what a layer sees of one image, such as its windows, is
        # in one place
        each = len(x) // (self._num_splits * len(rows))
        ones = x.new_ones(self._num_splits * self._num_images * each, *shape)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            ones = ones.contiguous(memory_format=torch.channels_last)  # the order of draws
        noise = plain(ones).unflatten(0, (self._num_splits, self._num_images, each))
        self._rows = rows
        return x * noise[:, rows].flatten(0, 2)


class _Dropouts(TorchFunctionMode):
    """A block in which torch's function `dropout` is as the modules are."""

    def __init__(self, noise: SharedNoise) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.dropout or not _is_training(*args, **kwargs):
            return func(*args, **kwargs)
        x, *others = args
        return self._noise.own(lambda ones: func(ones, *others, **kwargs), x, x.shape[1:])


def _is_training(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training
