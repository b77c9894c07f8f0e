"""half_group_norm=1: group norms that read and write half precision, with statistics in float32.

On a GPU autocast runs group_norm in float32: feature maps are converted to it, and what follows
moves twice the bytes, until a convolution converts them back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.parts.norm_layers import BatchChannelNorm2d

_HALVES = (torch.bfloat16, torch.float16)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's group_norm of [B, C, H, W]; of half precision in half precision, autocast or not.

    weight, bias: [C] float32, or None. Mean, variance and sums of gradients are float32.
    """
    if x.dtype not in _HALVES or x.ndim != 4:
        return F.group_norm(x, groups, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # the compiler converts where it reads and writes
            return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)
        if not x.is_cuda:  # torch's own takes both types there
            return F.group_norm(x, groups, weight, bias, eps)
        # Triton comes with torch's CUDA wheels alone
        from trainer.models.parts.group_norm_kernels import HalfGroupNorm

        return HalfGroupNorm.apply(x, groups, weight, bias, eps)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _BatchChannelNorm2d(BatchChannelNorm2d):
    group_norm = staticmethod(group_norm)


_IN_HALF: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: _GroupNorm,
    BatchChannelNorm2d: _BatchChannelNorm2d,
}


def use_half_group_norm(model: nn.Module) -> int:
    """Let the group norms of a model, in place, compute as `group_norm` does: how many there are.

    torch's GroupNorm and BatchChannelNorm2d; a class derived from one has a pass of its own.
    """
    found = [module for module in model.modules() if type(module) in _IN_HALF]
    for module in found:
        module.__class__ = _IN_HALF[type(module)]  # as copies of the model then are
    return len(found)
