"""What a part of the `model` section works on: the modules of any timm model, found by what they do
in a forward pass.

Names and classes differ from model to model; what flows where does not. So a model is asked once,
with one grey image, which convolution feeds which norm, which activation follows it, and what lies
behind the pooling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.base.component import Ingredient
from trainer.base.errors import UserError
from trainer.models.edit.layer_kinds import (
    ACTIVATIONS,
    ATTENTION,
    CHANNELS_FIRST_LAYER_NORMS,
    NORMS,
    ChannelsLast,
)

# Large enough that a feature map of the last stage is no single pixel; the second for a stem of
# very large patches.
_TRIED_PX = (128, 1024)


class SurgeryError(UserError):
    """A part of the `model` section that finds nothing to work on in a model."""


@dataclass(frozen=True)
class Swap:
    """What one part did to a model.

    part: `norm`, as the page calls it. before: class names that stood there, each with how often,
    in order of first appearance. after: what stands there now. places: dotted names of the modules,
    in the order of the forward pass. note: what was left alone on purpose, or why `auto` chose as
    it did; empty for nothing to say.
    """

    part: str
    before: tuple[tuple[str, int], ...]
    after: str
    places: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        shown = ", ".join(self.places[:2]) + (
            f" … {self.places[-1]}" if len(self.places) > 2 else ""
        )
        before = " and ".join(f"{count} {kind}" for kind, count in self.before)
        return f"{self.part}: {shown}: {before} -> {self.after}" + (
            f" ({self.note})" if self.note else ""
        )


class Part(Ingredient):
    """One part of the `model` section. Its one method changes a model in place and says what it
    replaced.

    chooses: it decides by the model what to do; its note says what, and why.
    """

    chooses: ClassVar[bool] = False

    @abstractmethod
    def apply(self, model: nn.Module, image_px: int) -> Swap:
        """Change a model of timm's, on the CPU and in training mode, that will train on images of
        image_px a side.

        Random weights come from torch's global generator, which the caller has seeded.

        Raises SurgeryError where there is nothing to replace, naming what the model does have.
        """


@dataclass(frozen=True)
class NormLocation:
    """A norm over feature maps.

    name: dotted. module: a norm, or norm and activation in one (timm's *Act classes).
    is_channels_last: it is given [B, H, W, C]. activation: dotted name of the module that takes its
    output directly; None where none does.
    """

    name: str
    module: nn.Module
    num_channels: int
    is_channels_last: bool
    activation: str | None


@dataclass(frozen=True)
class ConvLocation:
    """A convolution over feature maps. norm: dotted name of the norm that takes its output
    directly, or None.
    """

    name: str
    module: nn.Conv2d
    norm: str | None

    @property
    def is_depthwise(self) -> bool:
        return self.module.groups > 1 and self.module.groups == self.module.in_channels


@dataclass(frozen=True)
class ModelLayers:
    """The parts of a model in the order of its forward pass.

    vector_norms: over one vector an image, behind a pooling. attention_norms: inside attention
    modules. What lies in those belongs to their paper, and the classifier to the classes: neither's
    parts are among the others.
    """

    norms: tuple[NormLocation, ...]
    vector_norms: tuple[str, ...]
    attention_norms: tuple[str, ...]
    convolutions: tuple[ConvLocation, ...]
    activations: tuple[str, ...]


def is_norm(module: nn.Module) -> bool:
    """Is this a normalization layer?"""
    return NORMS.has(module)


def is_attention(module: nn.Module) -> bool:
    """Is this an attention module?"""
    return ATTENTION.has(module)


def is_activation(module: nn.Module) -> bool:
    """Is this a nonlinearity of a model's body (no gate such as a sigmoid)?"""
    return ACTIVATIONS.has(module)


def has_activation(norm: nn.Module) -> bool:
    """Does a norm bring its activation with it, as timm's *Act classes do?"""
    return isinstance(getattr(norm, "act", None), nn.Module) and not isinstance(
        norm.act, nn.Identity
    )


def inside_attention(model: nn.Module) -> set[str]:
    """Dotted names of all modules that are, or lie in, an attention module."""
    roots = [name for name, module in model.named_modules() if is_attention(module)]
    return {
        name
        for name, _ in model.named_modules()
        if any(f"{name}.".startswith(f"{root}.") for root in roots)
    }


def input_channels(model: nn.Module) -> int:
    """The channels of the images that a model takes."""
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def starts_at_zero(norm: nn.Module) -> bool:
    """Is every gamma of a norm zero?"""
    gamma = getattr(norm, "weight", None)
    return isinstance(gamma, nn.Parameter) and not gamma.detach().any().item()


def record_calls(
    model: nn.Module,
    names: Container[str],
    after: Callable,
    image_px: int | None = None,
    before: Callable | None = None,
) -> list[Any]:
    """Send one grey image through a model; nothing of it changes. Returns what `after` says of each
    call, in order.

    names: of the modules asked about. after: takes a module's name, the module, the tensor it was
    given and the one it made. before: takes the first three before the module runs; what it says is
    in the list too. image_px: the side of the image; absent: the first of two that the model takes.

    Raises SurgeryError where it takes none.
    """
    first = None
    for side_px in (image_px,) if image_px else _TRIED_PX:
        try:
            return _record(model, names, after, side_px, before)
        except (
            RuntimeError,
            AssertionError,
            ValueError,
        ) as error:  # each of them from some of timm's models
            first = first or (side_px, next(iter(str(error).splitlines()), type(error).__name__))
    raise SurgeryError(
        f"model: {type(model).__name__} cannot be asked for its parts: it refuses an image of {first[0]} px ({first[1]}); "
        "use a ResNet or a ConvNeXt"
    )


def _record(
    model: nn.Module, names: Container[str], after: Callable, side_px: int, before: Callable | None
) -> list[Any]:
    records, hooks, was_training = [], [], model.training

    def watch(name: str, module: nn.Module) -> None:
        if before is not None:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, given: records.append(before(name, module, given[0]))
                )
            )
        hooks.append(
            module.register_forward_hook(
                lambda _, given, made: records.append(after(name, module, given[0], made))
            )
        )

    for name, module in [each for each in model.named_modules() if each[0] in names]:
        watch(name, module)
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, input_channels(model), side_px, side_px))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return records


def find_layers(model: nn.Module) -> ModelLayers:
    """Ask a model, on the CPU, what its parts are; nothing of it changes. Raises SurgeryError as
    record_calls() does.
    """
    modules = dict(model.named_modules())
    watched = {
        name
        for name, each in modules.items()
        if isinstance(each, nn.Conv2d) or is_norm(each) or is_activation(each)
    }
    records = record_calls(
        model, watched, lambda name, _, given,
        made: ("end", name, made, made.shape, _storage_version(made)), before=lambda name, module,
        given: ("start", name, module, given.shape, _storage_version(given)),
    )  # fmt: skip
    return _layers_of(model, _calls(records))


def _calls(records: list[tuple]) -> list[tuple[str, nn.Module, torch.Size, str | None]]:
    """In order: name, module, its input's shape and maker, whose output goes straight into it.

    Two tensors are one where they share storage and version: a permuted view, or what an identity
    hands on, but not what an addition in place has changed. All outputs are held until the end, so
    that no storage is used twice.
    """
    calls, makers = [], {}
    for moment, name, module, shape, identity in records:
        if moment == "end":
            makers[identity] = name
        else:
            calls.append((name, module, shape, makers.get(identity)))
    return calls


def _layers_of(model: nn.Module, calls: list[tuple]) -> ModelLayers:
    in_attention = inside_attention(model)
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    takers = {maker: (name, module) for name, module, _, maker in reversed(calls) if maker}
    norms, vector_norms, attention_norms, convolutions, activations = [], [], [], [], []
    for name, module, shape, _ in _first_calls(calls):
        taker, taking = takers.get(name, ("", None))
        if module is classifier or (name in in_attention and not is_norm(module)):
            continue
        if name in in_attention:
            attention_norms.append(name)
        elif is_norm(module) and (len(shape) != 4 or shape[1:3] == (1, 1) or shape[2:] == (1, 1)):
            vector_norms.append(name)
        elif is_norm(module):
            is_last = _is_channels_last_norm(module)
            follows = taker if taking is not None and is_activation(taking) else None
            norms.append(NormLocation(name, module, shape[3 if is_last else 1], is_last, follows))
        elif isinstance(module, nn.Conv2d):
            convolutions.append(
                ConvLocation(
                    name, module, taker if taking is not None and is_norm(taking) else None
                )
            )
        else:
            activations.append(name)
    return ModelLayers(
        *map(tuple, (norms, vector_norms, attention_norms, convolutions, activations))
    )


def _is_channels_last_norm(norm: nn.Module) -> bool:
    """Is a norm given [B, H, W, C]?"""
    return isinstance(norm, (nn.LayerNorm, ChannelsLast)) and not CHANNELS_FIRST_LAYER_NORMS.has(
        norm
    )


def _first_calls(calls: Iterable[tuple]) -> list[tuple]:
    """The calls without later ones of the same module, and without those inside another norm of the
    list.
    """
    first: dict[str, tuple] = {}
    for call in calls:
        first.setdefault(call[0], call)
    norms = [name for name, module, *_ in first.values() if is_norm(module)]
    return [
        call
        for name, call in first.items()
        if not any(name.startswith(f"{norm}.") for norm in norms)
    ]


def _storage_version(tensor: Tensor) -> tuple[int, int]:
    # _version counts changes in place; autograd's own check reads it, and torch has no public name
    # for it
    return tensor.untyped_storage().data_ptr(), tensor._version


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name, in the place of what stands there."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def counted(modules: Iterable[nn.Module]) -> tuple[tuple[str, int], ...]:
    """Class names, each with how often it comes, in order of first appearance: Swap's `before`."""
    counts: dict[str, int] = {}
    for module in modules:
        name = type(module).__name__
        counts[name] = counts.get(name, 0) + 1
    return tuple(counts.items())


def nothing_to_replace(
    part: str, wanted: str, model: nn.Module, kinds: Sequence[type[nn.Module]] = ()
) -> SurgeryError:
    """The error of a part that found nothing: what it wanted, and what there is of `kinds`
    (default: convolutions).
    """
    there = counted(
        module for module in model.modules() if isinstance(module, tuple(kinds) or (nn.Conv2d,))
    )
    has = ", ".join(f"{count} {kind}" for kind, count in there) or "none of that kind"
    return SurgeryError(
        f"model.{part}: {type(model).__name__} has no {wanted}; it has {has}; leave model.{part} out"
    )
