"""The weights of a convolution, standardized before they are used."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.base.component import Positive
from trainer.models.edit.replacement import (
    ConvPlace,
    Part,
    SurgeryError,
    Swap,
    anatomy,
    counted,
    inside_attention,
    put,
)
from trainer.models.parts.standardize_layers import ScaledStandardizedConv2d, StandardizedConv2d

Epsilon = Annotated[float, Field(gt=0, le=1)]
Of = Literal["followed_by_norm", "all"]


class Standardization(Part):
    """of: the convolutions whose output goes straight into a norm, or all over feature maps.
    depthwise: those too.
    """

    kind: ClassVar[str] = "weight standardization"
    of: Of
    depthwise: bool

    @abstractmethod
    def standardized(self, conv: nn.Conv2d) -> nn.Conv2d:
        """What takes the place of a convolution, with its parameters."""

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Replace the convolutions; the note counts those left, each for one reason."""
        reasons = {
            place.name: self._reason_to_leave(place, model) for place in anatomy(model).convolutions
        }
        left = _left(model, reasons)
        names = tuple(name for name, reason in reasons.items() if not reason)
        if not names:
            kind = type(model).__name__
            raise SurgeryError(
                f"model.weight_standardization: {kind} has no convolution to standardize ({left}); "
                f"leave model.weight_standardization out"
            )
        before = [model.get_submodule(name) for name in names]
        after = [self.standardized(conv) for conv in before]
        for name, conv in zip(names, after, strict=True):
            put(model, name, conv)
        return Swap("weight_standardization", counted(before), type(after[0]).__name__, names, left)

    def _reason_to_leave(self, place: ConvPlace, model: nn.Module) -> str:
        conv = place.module
        if type(conv) is not nn.Conv2d or _is_inside_convolution(model, place.name):
            return "of another kind: " + (
                type(conv).__name__ if type(conv) is not nn.Conv2d else "for offsets"
            )
        if place.is_depthwise and not self.depthwise:
            return "depthwise"
        if self.of == "followed_by_norm" and place.norm is None:
            return "without a norm straight behind"
        if not conv.weight.any():
            # standardized, its first gradient would be 1 / eps times too large
            return "starting at zero"
        return "of one weight a filter" if conv.weight[0].numel() == 1 else ""


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

    Raises SurgeryError where no convolution is left to standardize.
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
    """Standardized weights that keep the variance of what flows through, for networks without
    norms.

    w becomes gain * gamma * (w - mean) / sqrt((v + eps) * n), with the biased variance v of a
    filter's n weights and a learned gain for each output channel, from 1.

    of, depthwise: as in weight_standardization.
    gamma: what makes up for the variance that the nonlinearity takes: 1.7139588594436646 for relu.

    Raises SurgeryError where no convolution is left to standardize.
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


def _classifier(model: nn.Module) -> nn.Module | None:
    return model.get_classifier() if hasattr(model, "get_classifier") else None


def _is_inside_convolution(model: nn.Module, name: str) -> bool:
    above = name.rpartition(".")[0]
    return bool(above) and isinstance(model.get_submodule(above), nn.Conv2d)


def _left(model: nn.Module, reasons: dict[str, str]) -> str:
    """`left: 18 depthwise, 36 Linear`: what stays as it is, and why; empty where nothing does."""
    counts: dict[str, int] = {}
    for reason in filter(None, reasons.values()):
        counts[reason] = counts.get(reason, 0) + 1
    in_attention, classifier = inside_attention(model), _classifier(model)
    linears = [name for name, inner in model.named_modules() if isinstance(inner, nn.Linear)]
    num_linears = sum(
        name not in in_attention and model.get_submodule(name) is not classifier for name in linears
    )
    parts = [f"{count} {reason}" for reason, count in counts.items()]
    parts += [f"{num_linears} Linear, no convolutions"] if num_linears else []
    return "left: " + ", ".join(parts) if parts else ""
