"""How one kind of norm comes into the place of every norm over feature maps, whatever the model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from trainer.models.edit.layer_kinds import ChannelsLast
from trainer.models.edit.replacement import (
    NormLocation,
    Part,
    SurgeryError,
    Swap,
    counted,
    find_layers,
    has_activation,
    nothing_to_replace,
    record_calls,
    replace_module,
    starts_at_zero,
)  # fmt: skip


class NormPart(Part):
    """Puts one kind of norm in the place of every norm over feature maps.

    Norms over one vector an image (ConvNeXt's last one, those in attention modules) stay. An
    activation inside a norm follows the new one. gamma starts at 1, or at 0 where the one before
    started at 0; beta at 0.
    """

    kind: ClassVar[str] = "norm"
    brings_activation: ClassVar[bool] = False

    @abstractmethod
    def layer(self, num_channels: int, is_activated: bool) -> nn.Module:
        """The norm over [B, num_channels, H, W]. is_activated: does an activation follow that it
        takes the place of?
        """

    @property
    def has_gamma(self) -> bool:
        """Does it multiply by a gamma that is learned?"""
        return True

    def num_groups(self, num_channels: int) -> int | None:
        """Groups of channels that share a statistic of one image; None for statistics over images,
        or none at all.
        """
        return None

    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Replace every norm over feature maps.

        Raises SurgeryError where there is none, where channels cannot be shared out into groups,
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
            raise SurgeryError(
                f"model.norm: all {len(places)} of {type(model).__name__} are that already: {_kinds(layers)}; "
                "use other numbers, another norm or no model.norm"
            )
        lost = [
            place.name
            for place, layer in zip(places, layers, strict=True)
            if starts_at_zero(place.module) and getattr(_inner(layer), "weight", None) is None
        ]
        notes = [
            _stay_note(found.vector_norms, "sees one vector an image", "see one vector an image"),
            _stay_note(found.attention_norms, "belongs to attention", "belong to attention"),
        ]
        notes += [self._activation_note(places, activated), _lost_note(lost)]
        before = counted(place.module for place in places)
        note = "; ".join(filter(None, notes))
        return Swap("norm", before, _kinds(layers), tuple(place.name for place in places), note)

    def _replace(self, model: nn.Module, place: NormLocation, is_activated: bool) -> nn.Module:
        """Put the norm in one place; gives the norm alone, without what stays behind it."""
        old = place.module
        new = self.layer(place.num_channels, is_activated)
        gamma = getattr(new, "weight", None)
        if gamma is not None and starts_at_zero(old):
            nn.init.zeros_(gamma)
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
        """Refuse a statistic of one value: it makes a constant of every value."""
        if self.num_groups(places[0].num_channels) is None:
            return
        num_pixels = _num_pixels(model, places, image_px)
        for place in places:
            num_values = (
                num_pixels.get(place.name, 2)
                * place.num_channels
                // self.num_groups(place.num_channels)
            )
            if num_values == 1:
                raise SurgeryError(
                    f"model.norm: {place.name} is given maps of 1x1 from images of {image_px} px, and {self.name} there "
                    f"a single value for each statistic; use larger images (image.train_px), fewer groups or another norm"
                )

    def _activated(self, model: nn.Module, places: Sequence[NormLocation]) -> set[str]:
        """Names of the norms whose activation this norm takes the place of."""
        if self.brings_activation:
            _check_shared(self.name, model, places)
            return {
                place.name for place in places if place.activation or _is_activating(place.module)
            }
        for place in places:
            if _is_activating(place.module) and not has_activation(place.module):
                kind = type(place.module).__name__
                raise SurgeryError(
                    f"model.norm: {place.name} is a {kind}, whose activation cannot be told from the norm; "
                    f"use a model without {kind}, or a norm with an activation of its own (evo_norm_s0)"
                )
        return set()

    def _activation_note(self, places: Sequence[NormLocation], activated: set[str]) -> str:
        if not self.brings_activation:
            return ""
        num_without = len(places) - len(activated)
        return f"{len(activated)} in place of norm and activation" + (
            f", {num_without} without an activation" if num_without else ""
        )


class GroupedNormPart(NormPart):
    """A norm whose statistics are of groups of channels of one image."""

    def _check_values(
        self, model: nn.Module, places: Sequence[NormLocation], image_px: int
    ) -> None:
        key, number = self._division()
        for place in places:
            if place.num_channels % number:
                raise _no_division(key, number, place, places, model)
        super()._check_values(model, places, image_px)

    def _division(self) -> tuple[str, int]:
        """The field that says how channels are shared out, and its number."""
        return "groups", self.groups

    def num_groups(self, num_channels: int) -> int:
        return self.groups


def _is_activating(norm: nn.Module) -> bool:
    """Does a norm bring an activation, as a module of its own or (timm's EvoNorm, FRN) inside its
    formula?
    """
    return has_activation(norm) or bool(getattr(norm, "apply_act", False))


def _inner(layer: nn.Module) -> nn.Module:
    return layer.norm if isinstance(layer, ChannelsLast) else layer


def _kinds(layers: Sequence[nn.Module]) -> str:
    return " and ".join(kind for kind, _ in counted(map(_inner, layers)))


def _is_same(norm: nn.Module, other: nn.Module) -> bool:
    """Are two norms of the same classes and numbers, apart from their weights?"""
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
    """Refuse to take away an activation that a model also uses where no norm comes before it."""
    follows = Counter(place.activation for place in places if place.activation)
    calls = Counter(record_calls(model, follows, lambda activation, *_: activation))
    for activation, num_norms in follows.items():
        if calls[activation] > num_norms:
            kind = type(model.get_submodule(activation)).__name__
            raise SurgeryError(
                f"model.norm: {name} brings its own activation, but {activation} ({kind}) of {type(model).__name__} also "
                f"acts where no norm comes before it; use a norm without one, such as group_norm, or model=resnet50"
            )


def _num_pixels(model: nn.Module, places: Sequence[NormLocation], image_px: int) -> dict[str, int]:
    """Pixels of the map that each norm is given from images of image_px a side; nothing where they
    are too small.
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
    except SurgeryError:  # the size is refused with a better one once the model is whole
        return {}


def _no_division(
    key: str, number: int, place: NormLocation, places: Sequence[NormLocation], model: nn.Module
) -> SurgeryError:
    widths = list(dict.fromkeys(each.num_channels for each in places))
    common = math.gcd(*widths)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    below, above = [n for n in fitting if n < number][-1:], [n for n in fitting if n > number][:1]
    shown = ", ".join(map(str, widths[:8])) + (" …" if len(widths) > 8 else "")
    return SurgeryError(
        f"model.norm.{key} {number}: {place.name} has {place.num_channels} channels; "
        f"use {' or '.join(map(str, below + above))}, for all channel counts of {type(model).__name__} ({shown})"
    )


def _stay_note(names: Sequence[str], why_one: str, why_all: str) -> str:
    if not names:
        return ""
    if len(names) == 1:
        return f"{names[0]} stays: it {why_one}"
    return f"{names[0]} … {names[-1]} ({len(names)}) stay: they {why_all}"


def _lost_note(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} last gammas that started at zero are gone, {names[0]} the first: those branches start at full strength"
