"""Replacing every norm over feature maps of any timm model by one kind of norm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from trainer.models.edit.layer_kinds import ChannelsLast
from trainer.models.edit.replacement import (
    NormLocation,
    Part,
    Replacement,
    ReplacementError,
    counted,
    find_layers,
    has_activation,
    nothing_to_replace,
    record_calls,
    replace_module,
    starts_at_zero,
)  # fmt: skip


class NormPart(Part):
    """Replaces every norm over feature maps by one kind of norm.

    Norms over one vector per image (ConvNeXt's last one, those in attention modules) are kept. An
    activation inside a norm follows the new one. gamma starts at 1, or at 0 where that of the
    replaced norm did; beta at 0.

    brings_activation: it replaces the activation after the norm, too.
    """

    kind: ClassVar[str] = "norm"
    brings_activation: ClassVar[bool] = False

    @abstractmethod
    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        """The norm over [B, num_channels, H, W]. is_activated: it replaces an activation, too."""

    @property
    def has_gamma(self) -> bool:
        """Has it a learned gamma?"""
        return True

    def start_at_zero(self, norm: nn.Module) -> None:
        """Zero a norm's gamma, as a residual branch's last one may start."""
        nn.init.zeros_(norm.get_parameter("weight"))

    def num_groups(self, num_channels: int) -> int | None:
        """Groups of channels that share a statistic of one image; None for batch statistics, or
        none at all.
        """
        return None

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace every norm over feature maps.

        Raises ReplacementError where there is none, where channels cannot be divided into groups,
        where a statistic would be of one value, and where an activation can be neither kept nor
        replaced.
        """
        found = find_layers(model)
        places = found.norms
        if not places:
            raise nothing_to_replace("norm", "norm over feature maps", model)
        activated = self._activated(model, places)
        self._check_values(model, places, image_px)
        layers = [self._replace(model, place, place.name in activated) for place in places]
        if all(_is_same(place.module, layer) for place, layer in zip(places, layers, strict=True)):
            raise ReplacementError(
                f"model.norm: all {len(places)} norms of {type(model).__name__} are already this "
                f"{_kinds(layers)}; use other values or another norm, or leave model.norm out"
            )
        lost = [
            place.name
            for place, layer in zip(places, layers, strict=True)
            if starts_at_zero(place.module) and getattr(_inner(layer), "weight", None) is None
        ]
        notes = [
            _kept_note(found.vector_norms, "over one vector per image"),
            _kept_note(found.attention_norms, "inside attention"),
        ]
        notes += [self._activation_note(places, activated), _lost_note(lost)]
        before = counted(place.module for place in places)
        note = "; ".join(filter(None, notes))
        return Replacement(
            "norm", before, _kinds(layers), tuple(place.name for place in places), note
        )

    def _replace(self, model: nn.Module, place: NormLocation, is_activated: bool) -> nn.Module:
        """Replace one norm; returns the new norm alone, without the layers kept after it."""
        old = place.module
        new = self.layer(place.num_channels, is_activated)
        if getattr(new, "weight", None) is not None and starts_at_zero(old):
            self.start_at_zero(new)
        if is_activated and place.activation is not None:
            replace_module(model, place.activation, nn.Identity())
        if place.is_channels_last:
            new = self.over_channels_last(new)
        kept = [
            getattr(old, "drop", None),
            None if self.brings_activation else getattr(old, "act", None),
        ]
        rest = [
            module
            for module in kept
            if isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
        ]
        replace_module(model, place.name, nn.Sequential(new, *rest) if rest else new)
        return new

    def over_channels_last(self, norm: nn.Module) -> nn.Module:
        """The same norm over [B, H, W, C]."""
        return ChannelsLast(norm)

    def _check_values(
        self, model: nn.Module, places: Sequence[NormLocation], image_px: int
    ) -> None:
        """Reject statistics of one value: they would normalize every value to a constant."""
        groups = [self.num_groups(place.num_channels) for place in places]
        if groups[0] is None:
            return
        num_pixels = _num_pixels(model, places, image_px)
        for place, num_groups in zip(places, groups, strict=True):
            num_values = num_pixels.get(place.name, 2) * place.num_channels // (num_groups or 1)
            if num_values == 1:
                raise ReplacementError(
                    f"model.norm: {place.name} gets 1x1 maps from images of {image_px} px, so "
                    f"each statistic of {self.name} would be of a single value; use larger images "
                    "(image.train_px), fewer groups or another norm"
                )

    def _activated(self, model: nn.Module, places: Sequence[NormLocation]) -> set[str]:
        """Names of the norms whose activation this norm replaces."""
        if self.brings_activation:
            _check_shared(self.name, model, places)
            return {
                place.name for place in places if place.activation or _is_activating(place.module)
            }
        for place in places:
            if _is_activating(place.module) and not has_activation(place.module):
                kind = type(place.module).__name__
                raise ReplacementError(
                    f"model.norm: {place.name} is a {kind}, whose activation is part of the norm; "
                    f"use a model without {kind}, or a norm that brings an activation (evo_norm_s0)"
                )
        return set()

    def _activation_note(self, places: Sequence[NormLocation], activated: set[str]) -> str:
        if not self.brings_activation:
            return ""
        num_without = len(places) - len(activated)
        return f"{len(activated)} replace norm and activation" + (
            f", {num_without} without an activation" if num_without else ""
        )


class GroupedNormPart(NormPart):
    """A norm whose statistics are of groups of channels of one image."""

    if TYPE_CHECKING:  # each has the field in its own place

        @property
        def groups(self) -> int | None: ...

    def _check_values(
        self, model: nn.Module, places: Sequence[NormLocation], image_px: int
    ) -> None:
        key, number = self._division()
        for place in places:
            if place.num_channels % number:
                raise _no_division(key, number, place, places, model)
        super()._check_values(model, places, image_px)

    def _division(self) -> tuple[str, int]:
        """The field that divides the channels, and its value."""
        assert self.groups is not None
        return "groups", self.groups

    def num_groups(self, num_channels: int) -> int:
        key, number = self._division()
        return number if key == "groups" else num_channels // number


def _is_activating(norm: nn.Module) -> bool:
    """Has a norm an activation, as a child module or (timm's EvoNorm, FRN) in its formula?"""
    return has_activation(norm) or bool(getattr(norm, "apply_act", False))


def _inner(layer: nn.Module) -> nn.Module:
    return layer.norm if isinstance(layer, ChannelsLast) else layer


def _kinds(layers: Sequence[nn.Module]) -> str:
    return " and ".join(kind for kind, _ in counted(map(_inner, layers)))


def _is_same(norm: nn.Module, other: nn.Module) -> bool:
    """Have two norms the same classes and hyperparameters? Their weights may differ."""
    return [_form(module) for module in norm.modules()] == [
        _form(module) for module in other.modules()
    ]


def _form(module: nn.Module) -> tuple:
    fields = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, tuple))
    }
    return (
        type(module),
        {**fields, "training": True},
        [name for name, _ in module.named_parameters(recurse=False)],
    )


def _check_shared(name: str, model: nn.Module, places: Sequence[NormLocation]) -> None:
    """Reject replacing an activation that a model also uses without a norm before it."""
    follows = Counter(place.activation for place in places if place.activation)
    calls = Counter(record_calls(model, follows, lambda activation, *_: activation))
    for activation, num_norms in follows.items():
        if calls[activation] > num_norms:
            kind = type(model.get_submodule(activation)).__name__
            raise ReplacementError(
                f"model.norm: {name} brings its own activation, but {activation} ({kind}) of "
                f"{type(model).__name__} is also used without a norm before it; use a norm without "
                "an activation, such as group_norm, or model=resnet50"
            )


def _num_pixels(model: nn.Module, places: Sequence[NormLocation], image_px: int) -> dict[str, int]:
    """Pixels of the feature map that each norm gets from images of image_px; {} where the model
    does not support them.
    """
    channels = {place.name: place.num_channels for place in places}
    try:
        return dict(
            record_calls(
                model,
                channels,
                lambda name, _, given, made: (name, made[0].numel() // channels[name]),
                image_px,
            )
        )
    except ReplacementError:  # build_model rejects the size later, and suggests another
        return {}


def _no_division(
    key: str, number: int, place: NormLocation, places: Sequence[NormLocation], model: nn.Module
) -> ReplacementError:
    widths = list(dict.fromkeys(each.num_channels for each in places))
    common = math.gcd(*widths)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    below, above = [n for n in fitting if n < number][-1:], [n for n in fitting if n > number][:1]
    shown = ", ".join(map(str, widths[:8])) + (" …" if len(widths) > 8 else "")
    return ReplacementError(
        f"model.norm.{key} {number}: {place.name} has {place.num_channels} channels; "
        f"use {' or '.join(map(str, below + above))}, which divides all channel counts of "
        f"{type(model).__name__} ({shown})"
    )


def _kept_note(names: Sequence[str], why: str) -> str:
    if not names:
        return ""
    shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
    return f"kept: {shown}, {why}"


def _lost_note(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"{len(names)} zero-initialized last gammas removed (first: {names[0]}): "
        "those branches start at full strength"
    )
