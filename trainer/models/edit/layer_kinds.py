"""Which classes of modules are norms, attention, activations and convolutions: of torch, timm,
ours, or registered.

A model's own class counts where it is a subclass of one of them. One that is not can be registered:

    @NORMS.register
    class MyNorm(nn.Module): ...
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar, get_args

import timm
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d

Module = TypeVar("Module", bound=type[nn.Module])


def timm_class(name: str) -> type[nn.Module] | None:
    """A class of timm by its name in timm.layers, or by a path below timm
    (`layers.cbam.CbamModule`).
    """
    found: Any = timm if "." in name else timm.layers
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


class LayerKind:
    """A set of module classes. timm: names in timm.layers, or dotted names below timm for classes
    that are not public there; a name that this version of timm lacks is left out.
    """

    def __init__(self, *classes: type[nn.Module], timm: tuple[str, ...] = ()) -> None:
        self.timm = timm
        self._classes = (*classes, *filter(None, map(timm_class, timm)))

    def register(self, kind: Module) -> Module:
        """Add a class, and with it its subclasses. To be used as a decorator, too."""
        self._classes = (*self._classes, kind)
        return kind

    def has(self, module: nn.Module) -> bool:
        """Is this module of the kind?"""
        return isinstance(module, self._classes)


AnyBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
# Norms that can keep running statistics.
RunningNorm = AnyBatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

NORMS = LayerKind(
    *get_args(RunningNorm),
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    timm=(
        "RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32",
        "SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32",
        "FrozenBatchNormAct2d", "RmsNormAct", "RmsNormActFp32", "RmsNormAct2d", "RmsNormAct2dFp32",
        "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2",
        "EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dS1", "EvoNorm2dS1a", "EvoNorm2dS2", "EvoNorm2dS2a",
        "FilterResponseNormTlu2d", "FilterResponseNormAct2d",
    ),
)  # fmt: skip

_JOINED_PASSES = (nn.BatchNorm2d.forward, timm.layers.BatchNormAct2d.forward)


def can_join(norm: nn.Module) -> TypeGuard[AnyBatchNorm]:
    """Can several ranks share the sample of a norm that takes statistics over images? torch's
    BatchNorm and timm's with an activation; no norm with a forward pass of its own.
    """
    is_batch_norm = isinstance(norm, AnyBatchNorm) and norm.running_mean is not None
    return is_batch_norm and type(norm).forward in _JOINED_PASSES


# Their statistics are constants.
FROZEN_NORMS = LayerKind(FrozenBatchNorm2d, timm=("FrozenBatchNormAct2d",))

# LayerNorms that are given [B, C, H, W]; torch's own and all others are given [B, H, W, C].
CHANNELS_FIRST_LAYER_NORMS = LayerKind(
    timm=(
        "LayerNorm2d",
        "LayerNorm2dFp32",
        "LayerNormAct2d",
        "LayerNormAct2dFp32",
        "layers.norm.LayerNormExp2d",
    ),
)

# Attention brings activations, gates and convolutions of its own, which its paper fixes.
ATTENTION = LayerKind(
    timm=(
        "SqueezeExcite", "EffectiveSqueezeExcite", "EcaModule", "CecaModule", "GatherExcite",
        "GlobalContext",
        "layers.squeeze_excite.SqueezeExciteCl", "models.senet.SEModule",
        "layers.cbam.CbamModule", "layers.cbam.LightCbamModule", "layers.cbam.ChannelAttn",
        "layers.cbam.SpatialAttn", "layers.cbam.LightSpatialAttn",
        "layers.coord_attn.CoordAttn", "layers.coord_attn.SimpleCoordAttn",
        "layers.coord_attn.EfficientLocalAttn", "layers.coord_attn.StripAttn",
    ),
)  # fmt: skip

# Attention that holds the 3x3 convolutions of the body.
CONVOLVING_ATTENTION = LayerKind(timm=("SelectiveKernel", "SplitAttn"))

# Nonlinearities of a model's body: no gate, such as a sigmoid or a softmax.
ACTIVATIONS = LayerKind(
    nn.Threshold, nn.ReLU, nn.RReLU, nn.Hardtanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU,
    nn.SELU, nn.GLU, nn.GELU, nn.Hardshrink, nn.LeakyReLU, nn.LogSigmoid, nn.Softplus,
    nn.Softshrink, nn.PReLU, nn.Softsign, nn.Tanhshrink,
    timm=("Swish", "Mish", "HardSwish", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU"),
)  # fmt: skip

CONVOLUTIONS = LayerKind(nn.Conv2d, DeformConv2d)


@NORMS.register
class ChannelsLast(nn.Module):
    """A norm over [B, C, H, W] for inputs [B, H, W, C]. norm: that norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
