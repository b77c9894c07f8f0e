"""The small networks of CIFAR-10's speed records, airbench: two or three 3x3 convolutions in each
of three groups behind one of 2x2, all of which start as identities where their widths allow.

The filters of the first convolution are meant to be those of a recipe's `model.whitening`. The
norms have no weights that train.

Source: Jordan 2024, arXiv:2404.00498; KellerJordan/cifar10-airbench at f1c599c4, MIT:
airbench94_muon.py and legacy/airbench96.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.zoo.common import ZooModel, image_facts, register_variants

_WHITENED_PX = 2


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3, without a bias; the first filters hand their channel on, the others are torch's."""
    made = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    nn.init.dirac_(made.weight.data[:channels_in])
    return made


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    made.weight.requires_grad_(False)
    return made


class Group(nn.Module):
    """Convolutions of one width, the first one pooled to half the side; of three the last two are a
    residual branch.
    """

    def __init__(self, channels_in: int, channels: int, depth: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, channels)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = _norm(channels, momentum)
        self.conv2 = _convolution(channels, channels)
        self.norm2 = _norm(channels, momentum)
        self.has_branch = depth == 3
        if self.has_branch:
            self.conv3 = _convolution(channels, channels)
            self.norm3 = _norm(channels, momentum)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.norm1(self.pool(self.conv1(x))))
        x = self.act(self.norm2(self.conv2(first)))
        return self.act(self.norm3(self.conv3(x)) + first) if self.has_branch else x


class Airbench(ZooModel):
    """Images [B, in_chans, H, W] of 32 px and their like to logits [B, num_classes].

    widths: of the three groups. depth: convolutions in each, 2 or 3. norm_momentum: how much of a
    batch enters the running statistics. logit_scale: what the classifier's answers are multiplied
    by. is_head_unit: the classifier's weights start with a standard deviation of 1, and the first
    bias as torch has it; else as torch's, and the bias at zero.
    """

    head_has_bias = False

    def __init__(
        self,
        widths: tuple[int, int, int],
        depth: int,
        norm_momentum: float,
        logit_scale: float,
        is_head_unit: bool,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, widths[-1], drop_rate)
        self.logit_scale = logit_scale
        num_whitened = 2 * in_chans * _WHITENED_PX**2
        self.whiten = nn.Conv2d(in_chans, num_whitened, _WHITENED_PX)
        self.act = nn.GELU()
        before = (num_whitened, *widths)
        self.groups = nn.Sequential(
            *(Group(a, b, depth, norm_momentum) for a, b in zip(before, widths, strict=False))
        )
        self.reset_classifier(num_classes)
        if not is_head_unit:
            nn.init.zeros_(self.whiten.get_parameter("bias"))
        elif num_classes > 0:
            with torch.no_grad():
                weight = self.head.get_parameter("weight")
                weight.div_(weight.std())

    def forward_features(self, x: Tensor) -> Tensor:
        return self.groups(self.act(self.whiten(x)))

    def pool(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        made = super().forward_head(x, pre_logits)
        return made if pre_logits else made * self.logit_scale

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^whiten", "blocks": r"^groups\.(\d+)"}


_CIFAR: dict[str, Any] = {
    "crop_pct": 1.0, "first_conv": "whiten", "num_classes": 10,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip
_AIRBENCH94 = {
    "widths": (64, 256, 256), "depth": 2, "norm_momentum": 0.4, "logit_scale": 1 / 256,
    "is_head_unit": True,
}  # fmt: skip
_AIRBENCH96 = {
    "widths": (128, 384, 512), "depth": 3, "norm_momentum": 0.1, "logit_scale": 1 / 9,
    "is_head_unit": False,
}  # fmt: skip
register_variants(
    Airbench,
    {
        "airbench94": (_AIRBENCH94, image_facts(32, **_CIFAR)),
        "airbench96": (_AIRBENCH96, image_facts(32, **_CIFAR)),
    },
)
