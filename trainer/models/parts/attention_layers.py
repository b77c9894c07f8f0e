"""Attention modules that timm does not have."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.models.edit.layer_kinds import ATTENTION


@ATTENTION.register
class BottleneckAttention(nn.Module):
    """What a feature map F becomes under BAM: F + F * sigmoid(c + s), a map of channels plus a map
    of places.

    c = norm(W1 relu(W0 mean(F) + b0) + b1), one number a channel, with num_channels / reduction
    hidden ones; s = norm(1x1(relu(3x3( … relu(1x1(F)))))), one number a place, its 3x3 convolutions
    dilated. Both norms are BatchNorm, over all images of a micro-batch: it must have two at least.

    Called with features [B, C, H, W]; gives the same shape.
    The formulas are the paper's, with a ReLU behind each inner layer, of which it gives no sign.
    Its authors' released code differs: BatchNorm behind each inner layer and none at the end, and
    the product of the two in place of the sum.

    Source: Park et al. 2018, arXiv:1807.06514, equations 1 to 4.
    """

    def __init__(self, num_channels: int, hidden: int, dilation: int, num_convolutions: int):
        super().__init__()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, num_channels, 1),
            nn.BatchNorm2d(num_channels),
        )
        wide = [
            layer
            for _ in range(num_convolutions)
            for layer in (
                nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation),
                nn.ReLU(inplace=True),
            )
        ]
        self.spatial = nn.Sequential(
            nn.Conv2d(num_channels, hidden, 1),
            nn.ReLU(inplace=True),
            *wide,
            nn.Conv2d(hidden, 1, 1),
            nn.BatchNorm2d(1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + features * (self.channel(features) + self.spatial(features)).sigmoid()
