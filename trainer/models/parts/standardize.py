"""Weight standardization: convolutions whose weights are standardized at each use.

The optimizer sees the raw weights. A filter's statistics are those of a row of layer normalization,
so its one fused kernel does the work: on a CPU it costs less than timm's way through batch
normalization, and a fraction of separate passes for mean and variance.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer.base.component import Positive
from trainer.models.edit.replacement import (
    ConvLocation,
    Part,
    Replacement,
    ReplacementError,
    classifier_of,
    counted,
    find_layers,
    inside_attention,
    replace_module,
)

Epsilon = Annotated[float, Field(gt=0, le=1)]
Of = Literal["followed_by_norm", "all"]
Convolution = TypeVar("Convolution", bound=nn.Conv2d)


class Standardization(Part):
    """of: the convolutions whose output goes directly into a norm, or all over feature maps.
    depthwise: whether depthwise ones are included.
    """

    kind: ClassVar[str] = "weight standardization"
    of: Of
    depthwise: bool

    @abstractmethod
    def standardized(self, conv: nn.Conv2d) -> nn.Conv2d:
        """The replacement of a convolution, with its parameters."""

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace the convolutions; the note counts those kept, by reason."""
        convolutions = {place.name: place for place in find_layers(model).convolutions}
        reasons = {
            name: self._reason_to_leave(place, model) for name, place in convolutions.items()
        }
        left = _left(model, reasons)
        names = tuple(name for name, reason in reasons.items() if not reason)
        if not names:
            kind = type(model).__name__
            raise ReplacementError(
                f"model.weight_standardization: {kind} has no convolution to standardize ({left}); "
                f"leave model.weight_standardization out"
            )
        before = [convolutions[name].module for name in names]
        after = [self.standardized(conv) for conv in before]
        for name, conv in zip(names, after, strict=True):
            replace_module(model, name, conv)
        return Replacement(
            "weight_standardization", counted(before), type(after[0]).__name__, names, left
        )

    def _reason_to_leave(self, place: ConvLocation, model: nn.Module) -> str:
        conv = place.module
        if type(conv) is not nn.Conv2d or _is_inside_convolution(model, place.name):
            return "of another kind: " + (
                type(conv).__name__ if type(conv) is not nn.Conv2d else "for offsets"
            )
        if place.is_depthwise and not self.depthwise:
            return "depthwise"
        if self.of == "followed_by_norm" and place.norm is None:
            return "without a norm directly after"
        if not conv.weight.any():
            # standardized, its first gradient would be 1 / eps times too large
            return "zero-initialized"
        return "of one weight per filter" if conv.weight[0].numel() == 1 else ""


class WeightStandardization(Standardization):
    """A convolution's weights with mean 0 and variance 1 over each output channel's filter.

    w becomes (w - mean) / (sqrt(v) + eps), eps outside the root, or (w - mean) / sqrt(v + eps),
    inside. The optimizer moves the raw weights, and they decay. Three forms are published: unbiased
    with 1e-5 outside (the paper's code, and `example`); 1e-5 inside (its batch-channel
    normalization's code); biased with 1e-10 inside (BiT; timm: 1e-6).

    of: which convolutions: those whose output goes straight into a norm, or all over feature maps.
    depthwise: also convolutions with one filter a channel, whose 9 or 49 weights are their whole
    sample. variance: v divided by the number of a filter's weights (biased), or by one less
    (unbiased). Linear layers and the classifier are left as they are.

    Raises ReplacementError where no convolution is left to standardize.
    Source: Qiao et al. 2019, arXiv:1903.10520; Kolesnikov et al. 2020, arXiv:1912.11370.
    """

    name: Literal["weight_standardization"] = "weight_standardization"
    example: ClassVar[dict[str, Any]] = {
        "of": "followed_by_norm", "depthwise": False, "variance": "unbiased", "eps": 1e-5,
        "eps_place": "outside",
    }  # fmt: skip
    variance: Literal["biased", "unbiased"]
    eps: Epsilon
    eps_place: Literal["inside", "outside"]

    def standardized(self, conv: nn.Conv2d) -> nn.Conv2d:
        is_unbiased, is_inside = self.variance == "unbiased", self.eps_place == "inside"
        return StandardizedConv2d.around(
            conv, is_unbiased=is_unbiased, eps=self.eps, is_inside=is_inside
        )


class ScaledWeightStandardization(Standardization):
    """Standardized weights that preserve the variance of the activations, for networks without
    norms.

    w becomes gain * gamma * (w - mean) / sqrt((v + eps) * n), with the biased variance v of a
    filter's n weights and a learned gain for each output channel, from 1.

    of, depthwise: as in weight_standardization.
    gamma: compensates for the variance lost in the activation: 1.7139588594436646 for relu.

    Raises ReplacementError where no convolution is left to standardize.
    Source: Brock et al. 2021, arXiv:2101.08692; eps as in timm's ScaledStdConv2d.
    """

    name: Literal["scaled_weight_standardization"] = "scaled_weight_standardization"
    example: ClassVar[dict[str, Any]] = {
        "of": "all",
        "depthwise": True,
        "gamma": 1.7139588594436646,
        "eps": 1e-6,
    }
    gamma: Positive
    eps: Epsilon

    def standardized(self, conv: nn.Conv2d) -> nn.Conv2d:
        return ScaledStandardizedConv2d.around(conv, gamma=self.gamma, eps=self.eps)


def _is_inside_convolution(model: nn.Module, name: str) -> bool:
    above = name.rpartition(".")[0]
    return bool(above) and isinstance(model.get_submodule(above), nn.Conv2d)


def _left(model: nn.Module, reasons: dict[str, str]) -> str:
    """`kept: 18 depthwise, 36 Linear`: what is not replaced, and why; empty for nothing."""
    counts: dict[str, int] = {}
    for reason in filter(None, reasons.values()):
        counts[reason] = counts.get(reason, 0) + 1
    in_attention, classifier = inside_attention(model), classifier_of(model)
    linears = [name for name, inner in model.named_modules() if isinstance(inner, nn.Linear)]
    num_linears = sum(
        name not in in_attention and model.get_submodule(name) is not classifier for name in linears
    )
    parts = [f"{count} {reason}" for reason, count in counts.items()]
    parts += [f"{num_linears} Linear, no convolutions"] if num_linears else []
    return "kept: " + ", ".join(parts) if parts else ""


# Keeps a filter of equal weights from 0 / 0 where eps stands outside the root. float32 still holds
# it and, which the gradient needs, the third power of its inverse root; beside eps squared it is
# nothing.
_TINY = 1e-24


class StandardizedConv2d(nn.Conv2d):
    """A convolution that uses (w - mean) / std in place of its weights w, over each output
    channel's filter.

    With the mean and the variance v over a filter's n = in_channels / groups * height * width
    weights, v divided by n (biased) or by n - 1 (unbiased), the std is sqrt(v + eps) with eps
    inside the root and sqrt(v) + eps outside. Both are computed in float32 where the weights are
    half precision. Parameters are Conv2d's: weight, bias.

    Sources: Qiao et al. 2019, arXiv:1903.10520; Kolesnikov et al. 2020, arXiv:1912.11370 (biased,
    inside).
    """

    def __init__(self, *shape, is_unbiased: bool, eps: float, is_inside: bool, **options):
        super().__init__(*shape, **options)
        self.is_unbiased = is_unbiased
        self.eps = eps
        self.is_inside = is_inside

    @classmethod
    def around(cls, conv: nn.Conv2d, **form) -> Self:
        """The standardized convolution with the parameters of a plain one."""
        return _taking(cls, conv, form)

    def standardized_weight(self) -> Tensor:
        """What the convolution uses: as the weight in shape, dtype and memory format."""
        num_weights = self.weight[0].numel()
        # biased variance / requested variance
        ratio = (num_weights - 1) / num_weights if self.is_unbiased else 1.0
        rows = _rows(self.weight)
        if self.is_inside:
            return _like(_normalized(rows, self.eps * ratio, ratio**0.5), self.weight)
        if torch.jit.is_tracing():  # TorchScript records operations, and no function of Python's
            return _like(_EpsOutside.computed(rows, ratio**-0.5, self.eps)[0], self.weight)
        return _like(_EpsOutside.apply(rows, ratio**-0.5, self.eps), self.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        # torch has no public call that takes another weight and keeps padding_mode
        return self._conv_forward(images, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        variance, place = (
            "unbiased" if self.is_unbiased else "biased",
            "inside" if self.is_inside else "outside",
        )
        return f"{super().extra_repr()}, {variance}, eps={self.eps} {place}"


class ScaledStandardizedConv2d(nn.Conv2d):
    """A convolution that uses gain * gamma * (w - mean) / sqrt((v + eps) * n) in place of its
    weights w.

    With n = in_channels / groups * height * width weights in a filter and their biased variance v,
    a filter's squares sum to gamma**2 * gain**2. gain [C'] is learned, from 1; being
    one-dimensional, it decays as norms and biases do. eps stands as in timm: the paper's own code
    takes the larger of v * n and eps instead.

    Sources: Brock et al. 2021, arXiv:2101.08692; timm's ScaledStdConv2d.
    """

    def __init__(self, *shape, gamma: float, eps: float, **options):
        super().__init__(*shape, **options)
        self.gamma = gamma
        self.eps = eps
        self.gain = nn.Parameter(
            torch.ones(self.out_channels, dtype=self.weight.dtype, device=self.weight.device)
        )

    @classmethod
    def around(cls, conv: nn.Conv2d, **form) -> Self:
        """The standardized convolution with the parameters of a plain one, and a gain of 1."""
        standardized = _taking(cls, conv, form)
        standardized.gain = nn.Parameter(torch.ones_like(conv.weight[:, 0, 0, 0]))
        return standardized

    def standardized_weight(self) -> Tensor:
        """What the convolution uses: as the weight in shape, dtype and memory format."""
        rows = _rows(self.weight)
        scaled = _normalized(rows, self.eps, self.gamma * rows.shape[1] ** -0.5)
        return _like(scaled * self.gain[:, None], self.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W']."""
        # torch has no public call that takes another weight and keeps padding_mode
        return self._conv_forward(images, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, eps={self.eps}"


class _EpsOutside(torch.autograd.Function):
    """(row - mean) / (widening * s + eps), where s is the biased std of a row; once differentiable.

    It is f(s) = s / (widening * s + eps) times layer normalization, whose s comes for free; through
    autograd the factor would cost four times the passes over the weights. f'(s) / f(s)**2 = eps /
    s**2.
    """

    @staticmethod
    def computed(rows: Tensor, widening: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and layer normalization's mean and inverse deviation."""
        made, mean, inverse = torch.ops.aten.native_layer_norm(
            rows, rows.shape[1:], None, None, _TINY
        )
        return made.mul_(1 / (widening + eps * inverse)), mean, inverse

    @staticmethod
    def forward(ctx, rows: Tensor, widening: float, eps: float) -> Tensor:
        made, mean, inverse = _EpsOutside.computed(rows, widening, eps)
        ctx.save_for_backward(rows, mean, inverse, made)
        ctx.widening, ctx.eps = widening, eps
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, inverse, made = ctx.saved_tensors
        shape, wanted = rows.shape[1:], [True, False, False]
        through = torch.ops.aten.native_layer_norm_backward(
            grad, rows, shape, mean, inverse, None, None, wanted
        )[0]
        along = (grad * made).mean(dim=1, keepdim=True) * inverse * (ctx.eps * inverse)
        return (
            through.mul_(1 / (ctx.widening + ctx.eps * inverse)).addcmul_(made, along),
            None,
            None,
        )


def _taking(kind: type[Convolution], conv: nn.Conv2d, form: dict[str, Any]) -> Convolution:
    shape = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    options = {key: getattr(conv, key) for key in (*shape, "groups", "padding_mode")}
    made = kind(**options, bias=conv.bias is not None, device="meta", **form)
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


def _rows(weight: Tensor) -> Tensor:
    """[C', n], at least float32, without a copy in either memory format: a filter's statistics do
    not depend on the order of its weights.
    """
    wide = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    return wide.flatten(1) if wide.is_contiguous() else wide.permute(0, 2, 3, 1).flatten(1)


def _like(rows: Tensor, weight: Tensor) -> Tensor:
    """The rows in the shape, dtype and memory format of the weight they came from."""
    if weight.is_contiguous():
        return rows.view(weight.shape).to(weight.dtype)
    channels, inner, height, width = weight.shape
    return rows.view(channels, height, width, inner).permute(0, 3, 1, 2).to(weight.dtype)


def _normalized(rows: Tensor, eps: float, scale: float) -> Tensor:
    """scale * (row - mean) / sqrt(biased variance + eps); the scale is passed as layer
    normalization's gamma.
    """
    gamma = None if scale == 1 else rows.new_full(rows.shape[1:], scale)
    return functional.layer_norm(rows, rows.shape[1:], gamma, None, eps)
