"""Layers that leave something out at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchDropPath(nn.Module):
    """A residual branch left out for a whole micro-batch at once, with probability drop_prob, in
    training only.

    A branch that is kept is multiplied by 1 / (1 - drop_prob), which leaves its mean as it is;
    Huang et al. instead multiply it by 1 - drop_prob in evaluation, the same up to that scale.

    Called with features [B, ...]; gives the same shape. One number is drawn from torch's generator
    of their device.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return features
        keep = 1 - self.drop_prob
        return features * features.new_empty((1,) * features.ndim).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class BlockDropout(nn.Module):
    """Squares of a feature map set to zero, each channel's its own, the rest scaled up to match; in
    training only.

    The corners of squares of b x b are drawn with probability gamma = rate * H W / (b**2 (H - b +
    1) (W - b + 1)) where a square fits into the map; what is left is multiplied by the share of
    places that are left, inverted. A map smaller than b has squares of its own size. timm's layer
    draws squares that stick out too, and with the same gamma: it drops more, nearly everything in a
    map of 7 x 7 with b = 7.

    Called with features [B, C, H, W]; gives the same shape.

    Source: Ghiasi et al. 2018, arXiv:1810.12890, algorithm 1.
    """

    def __init__(self, rate: float, block_px: int):
        super().__init__()
        self.rate = rate
        self.block_px = block_px

    def forward(self, features: Tensor) -> Tensor:
        """Maps [B, C, H, W] with squares left out in training; as they are in evaluation."""
        if not self.training:
            return features
        num_images, num_channels, height, width = features.shape
        side = min(self.block_px, height, width)
        rows, columns = height - side + 1, width - side + 1
        gamma = min(1.0, self.rate * height * width / (side**2 * rows * columns))
        with torch.no_grad():
            corners = features.new_empty(num_images, num_channels, rows, columns).bernoulli_(gamma)
            dropped = functional.max_pool2d(functional.pad(corners, [side - 1] * 4), side, stride=1)
            kept = 1 - dropped
            # summed in float32: bfloat16 counts no further than 256
            kept *= (kept.numel() / kept.sum(dtype=torch.float32).clamp(min=1)).to(kept.dtype)
        return features * kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, block_px={self.block_px}"
