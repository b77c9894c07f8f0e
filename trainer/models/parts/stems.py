"""The first layers of a model, before its first stage."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from trainer.models.edit.insertion import init_like_timm
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    has_activation,
    is_activation,
    is_norm,
    record_calls,
    replace_module,
)  # fmt: skip
from trainer.models.edit.stages import stages

_SMALL_PX = 96  # below it the last of stages that divide by 32 has maps under 3x3


@dataclass
class _CurrentStem:
    """The stem of a model: everything before its first stage.

    children: direct children of the model, in the order of the forward pass. convolution: the
    first. has_bias: whether the last convolution has a bias. norm, activation: those after it,
    which are kept; None where the first block has them (ResNetV2). inner_norm, inner_activation:
    templates for those inside a deep stem; None for a model without any.
    """

    children: tuple[str, ...]
    convolution: nn.Conv2d
    has_bias: bool
    num_features: int
    norm: tuple[str, nn.Module] | None
    activation: tuple[str, nn.Module] | None
    inner_norm: nn.Module | None
    inner_activation: nn.Module | None


class Stem(Part):
    """Replaces the stem. Its last norm and activation are kept; convolutions are initialized by
    timm's rule.

    Raises ReplacementError where no convolution comes before the first stage, and where the model
    has this stem already.
    """

    kind: ClassVar[str] = "stem"
    has_pool: ClassVar[bool] = True

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace the stem."""
        children = _children(model)
        there = [str(model.get_submodule(name)) for name in children]
        replacement = self.replace_stem(model)
        if there == [str(model.get_submodule(name)) for name in children]:
            raise ReplacementError(
                f"model.stem: {type(model).__name__} already has this stem ({self._after()}); "
                "use another one, or leave model.stem out"
            )
        return replacement

    def replace_stem(self, model: nn.Module) -> Replacement:
        """Replace the stem even where it is the same already."""
        current = _current_stem(model)
        before = counted(_leaves(model, current.children))
        body = self._body(current)
        init_like_timm(model, body)
        pool = nn.MaxPool2d(3, stride=2, padding=1) if self.has_pool else nn.Identity()
        _install_stem(model, current, body, pool)
        if hasattr(model, "stem_feat_idx"):  # ResNetV2's index of its first feature map
            resnet: Any = model
            resnet.stem_feat_idx = 0 if current.norm is None else 1
        return Replacement("stem", before, self._after(), current.children)

    @abstractmethod
    def _body(self, current: _CurrentStem) -> nn.Module: ...

    @abstractmethod
    def _after(self) -> str: ...


class ImagenetStem(Stem):
    """A 7x7 convolution of stride 2, norm, the stem's activation where it has one, 3x3 max pooling
    of stride 2.

    Source: He et al. 2015, arXiv:1512.03385.
    """

    name: Literal["imagenet"] = "imagenet"

    def _body(self, current: _CurrentStem) -> nn.Module:
        return _convolution(current, current.num_features, 7, stride=2)

    def _after(self) -> str:
        return "7x7 of stride 2, 3x3 max pooling of stride 2"


class CifarStem(Stem):
    """A 3x3 convolution of stride 1, norm, the stem's activation where it has one, no pooling:
    small images stay large.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2.
    """

    name: Literal["cifar"] = "cifar"
    has_pool: ClassVar[bool] = False

    def _body(self, current: _CurrentStem) -> nn.Module:
        return _convolution(current, current.num_features, 3, stride=1)

    def _after(self) -> str:
        return "3x3 of stride 1"


class DeepStem(Stem):
    """Three 3x3 convolutions, the first of stride 2, with norm and activation between them, then
    max pooling: the -D stem.

    width: channels of the first two; the third has those of the first stage. At 32 it is that of
    timm's resnet50d.

    Raises ReplacementError for a width that the model's norm cannot take.
    Source: He et al. 2018, arXiv:1812.01187 (ResNet-C).
    """

    name: Literal["deep"] = "deep"
    example: ClassVar[dict[str, Any]] = {"width": 32}
    width: Annotated[int, Field(ge=1, le=1024)]

    def _body(self, current: _CurrentStem) -> nn.Module:
        first = _convolution(current, self.width, 3, stride=2)
        second = _convolution(current, self.width, 3, stride=1, in_channels=self.width)
        third = _convolution(current, current.num_features, 3, stride=1, in_channels=self.width)
        between = [layer for _ in range(2) for layer in self._norm_and_activation(current)]
        half = len(between) // 2
        return nn.Sequential(first, *between[:half], second, *between[half:], third)

    def _norm_and_activation(self, current: _CurrentStem) -> list[nn.Module]:
        norm = current.inner_norm and _norm_like(current.inner_norm, self.width)
        is_activated = norm is not None and has_activation(norm)
        return [
            each
            for each in (norm, None if is_activated else deepcopy(current.inner_activation))
            if each is not None
        ]

    def _after(self) -> str:
        return f"three 3x3 of width {self.width}, 3x3 max pooling of stride 2"


class PatchifyStem(Stem):
    """One convolution over patches that do not overlap, norm, the stem's activation where it has
    one, no pooling.

    patch_px: the side of a patch, and the stride.

    Source: Liu et al. 2022, arXiv:2201.03545.
    """

    name: Literal["patchify"] = "patchify"
    example: ClassVar[dict[str, Any]] = {"patch_px": 4}
    has_pool: ClassVar[bool] = False
    patch_px: Annotated[int, Field(ge=1, le=64)]

    def _body(self, current: _CurrentStem) -> nn.Module:
        return _convolution(
            current, current.num_features, self.patch_px, stride=self.patch_px, padding=0
        )

    def _after(self) -> str:
        return f"{self.patch_px}x{self.patch_px} of stride {self.patch_px}"


class AutoStem(Stem):
    """The cifar stem for images under 96 px, else the model's own; the note gives the choice and
    the reason.
    """

    name: Literal["auto"] = "auto"
    chooses: ClassVar[bool] = True

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace the stem, or keep it, by the size of the images."""
        if image_px < _SMALL_PX:
            replacement = CifarStem().replace_stem(model)
            note = f"auto: cifar stem, since images of {image_px} px are under {_SMALL_PX} px"
            return Replacement(
                replacement.part, replacement.before, replacement.after, replacement.places, note
            )
        children = _children(model)
        note = (
            f"auto: the model's own stem, since images of {image_px} px are {_SMALL_PX} px or more"
        )
        return Replacement("stem", counted(_leaves(model, children)), "the same", children, note)

    def _body(self, current: _CurrentStem) -> nn.Module:
        raise AssertionError("auto has no layers of its own")

    def _after(self) -> str:
        raise AssertionError("auto has no layers of its own")


def _children(model: nn.Module) -> tuple[str, ...]:
    """Direct children of the model that run before its first stage, in order."""
    first = stages(model)[0]
    names = {name for name, _ in model.named_children() if not f"{first}.".startswith(f"{name}.")}
    calls = record_calls(model, names | {first}, lambda name, *_: name)
    return tuple(calls[: calls.index(first)])


def _current_stem(model: nn.Module) -> _CurrentStem:
    children = _children(model)
    inner = [
        (f"{child}.{name}".rstrip("."), module)
        for child in children
        for name, module in model.get_submodule(child).named_modules()
    ]
    convolutions = [
        place for place, (_, module) in enumerate(inner) if isinstance(module, nn.Conv2d)
    ]
    if not convolutions:
        raise ReplacementError(
            f"model.stem: {type(model).__name__} has no convolution before its first stage; "
            "leave model.stem out"
        )
    first, last = inner[convolutions[0]][1], inner[convolutions[-1]][1]
    norms = [found for found in inner if is_norm(found[1])]
    activations = [
        found for found in inner if is_activation(found[1]) and not _is_inside(found[0], norms)
    ]
    behind = inner[convolutions[-1] :]
    return _CurrentStem(
        children,
        first,
        last.bias is not None,
        last.out_channels,
        next((found for found in reversed(norms) if found in behind), None),
        next((found for found in reversed(activations) if found in behind), None),
        norms[-1][1] if norms else next(filter(is_norm, model.modules()), None),
        activations[-1][1] if activations else next(filter(is_activation, model.modules()), None),
    )


def _install_stem(
    model: nn.Module, current: _CurrentStem, body: nn.Module, pool: nn.Module
) -> None:
    """Replace the stem's layers; what is kept keeps its name, since forward passes use them."""
    first, *others = current.children
    kept = [found for found in (current.norm, current.activation) if found is not None]
    apart = [name for name, _ in kept if name in others]
    unkept = [name for name in others if name not in apart]
    for name in unkept:
        replace_module(model, name, nn.Identity())
    if len(apart) == len(kept) and unkept:  # ResNet: conv1, bn1, act1, maxpool
        replace_module(model, first, body)
        replace_module(model, unkept[-1], pool)
        return
    inside = [(name.rpartition(".")[2], module) for name, module in kept if name not in apart]
    start = _first_name(model.get_submodule(first))
    layers = [(start, body), *inside]
    if unkept:  # legacy SENet: layer0, pool0
        replace_module(model, unkept[-1], pool)
    elif not isinstance(pool, nn.Identity):
        layers.append(("pool", pool))
    is_series = len(layers) > 1 or isinstance(model.get_submodule(first), nn.Sequential)
    replace_module(model, first, nn.Sequential(OrderedDict(layers)) if is_series else body)


def _first_name(stem: nn.Module) -> str:
    return next((name for name, _ in stem.named_children()), "conv")


def _is_inside(name: str, others: list[tuple[str, nn.Module]]) -> bool:
    return any(name.startswith(f"{other}.") for other, _ in others)


def _leaves(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    found = [module for name in names for module in model.get_submodule(name).modules()]
    return [module for module in found if not any(True for _ in module.children())]


def _convolution(
    current: _CurrentStem,
    num_channels: int,
    kernel: int,
    stride: int,
    in_channels: int | None = None,
    padding: int | None = None,
) -> nn.Conv2d:
    """A convolution like the current stem's: of the first one's class, with a bias if the last one
    has it.
    """
    like = current.convolution
    return type(like)(
        like.in_channels if in_channels is None else in_channels,
        num_channels,
        kernel,
        stride=stride,
        padding=kernel // 2 if padding is None else padding,
        bias=current.has_bias,
    )


def _norm_like(norm: nn.Module, num_channels: int) -> nn.Module:
    """A freshly initialized norm like another, for another number of channels."""
    new: Any = deepcopy(norm)
    num_groups = getattr(new, "num_groups", 1)
    if num_channels % num_groups:
        raise ReplacementError(
            f"model.stem.width={num_channels}: not a multiple of the norm's {num_groups} groups; "
            f"use a multiple of {num_groups}"
        )
    for name, values in [*new.named_parameters(recurse=False), *new.named_buffers(recurse=False)]:
        if values.ndim == 1:
            start = values.detach()[:1].repeat(num_channels)
            setattr(new, name, nn.Parameter(start) if isinstance(values, nn.Parameter) else start)
    for attribute in ("num_features", "num_channels"):
        if hasattr(new, attribute):
            setattr(new, attribute, num_channels)
    if hasattr(new, "normalized_shape"):
        new.normalized_shape = (num_channels,)
    return new
