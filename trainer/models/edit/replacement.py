"""Finding and replacing the modules of any timm model, by what they do in a forward pass.

Names and classes differ from model to model; what flows where does not. So one blank image is sent
through the model, and hooks record which convolution feeds which norm, which activation follows it,
and what lies after the pooling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.base.component import Component
from trainer.base.errors import UserError
from trainer.models.edit.layer_kinds import (
    ACTIVATIONS,
    ATTENTION,
    CHANNELS_FIRST_LAYER_NORMS,
    NORMS,
    ChannelsLast,
)

# Large enough that the last stage's feature map is more than one pixel; the second for stems of
# very large patches.
_TRIED_PX = (128, 1024)


class ReplacementError(UserError):
    """A part of the `model` section that cannot be applied to a model."""


@dataclass(frozen=True)
class Replacement:
    """What one part of the `model` section replaced in a model.

    part: its key, such as `norm`. before: class names of the replaced modules with their counts, in
    order of first appearance. after: what replaced them. places: dotted names of the modules, in
    the order of the forward pass. note: what was kept on purpose, or why `auto` chose as it did;
    may be empty.
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


class Part(Component):
    """One part of the `model` section. Its one method changes a model in place and returns what it
    replaced.

    chooses: what it does depends on the model or the images; its note gives the choice and the
    reason.
    """

    chooses: ClassVar[bool] = False

    @abstractmethod
    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Change a timm model, on the CPU and in training mode, for training images of image_px.

        New weights come from torch's global generator, which the caller has seeded.

        Raises ReplacementError where there is nothing to replace, naming what the model has.
        """


@dataclass(frozen=True)
class NormLocation:
    """A norm over feature maps.

    name: dotted. module: a norm, or norm and activation in one (timm's *Act classes).
    is_channels_last: its input is [B, H, W, C]. activation: dotted name of the activation that
    directly takes its output, or None.
    """

    name: str
    module: nn.Module
    num_channels: int
    is_channels_last: bool
    activation: str | None


@dataclass(frozen=True)
class ConvLocation:
    """A convolution over feature maps. norm: dotted name of the norm that directly takes its
    output, or None.
    """

    name: str
    module: nn.Conv2d
    norm: str | None

    @property
    def is_depthwise(self) -> bool:
        """Has each channel a kernel of its own?"""
        return self.module.groups > 1 and self.module.groups == self.module.in_channels


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model in the order of its forward pass.

    vector_norms: over one vector per image, after pooling. attention_norms: inside attention
    modules. The other fields leave out what lies inside attention, which its paper defines, and the
    classifier.
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
    """Is this an activation (not a gate such as a sigmoid)?"""
    return ACTIVATIONS.has(module)


def has_activation(norm: nn.Module) -> bool:
    """Does a norm include an activation, as timm's *Act classes do?"""
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
    """The input channels of a model."""
    found = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return next(found, getattr(model, "in_chans", 3))  # T2T-ViT has no convolution


def classifier_of(model: nn.Module) -> nn.Module | None:
    """What timm calls a model's classifier; None for a model that is not timm's."""
    get = getattr(model, "get_classifier", None)
    found = get() if get else None
    return nn.ModuleList(found) if isinstance(found, tuple) else found  # distilled: two heads


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
    """Run a model on one blank image and return what `after` returns for each call of the named
    modules, in order. The model is not changed.

    names: of the modules to record. after: called with a module's name, the module, its input and
    its output. before: called with the first three before the module runs; its result is recorded
    too. image_px: absent, the first of two sizes that the model supports.

    Raises ReplacementError where it supports neither.
    """
    first: tuple[int, str] | None = None
    for side_px in (image_px,) if image_px else _TRIED_PX:
        try:
            return _record(model, names, after, side_px, before)
        # each of them is raised by some of timm's models
        except (RuntimeError, AssertionError, ValueError) as error:
            first = first or (side_px, next(iter(str(error).splitlines()), type(error).__name__))
    assert first is not None
    raise ReplacementError(
        f"model: the layers of {type(model).__name__} cannot be found: it does not support images "
        f"of {first[0]} px ({first[1]}); use a ResNet or a ConvNeXt"
    )


def _record(
    model: nn.Module, names: Container[str], after: Callable, side_px: int, before: Callable | None
) -> list[Any]:
    records, hooks, was_training = [], [], model.training

    def add_hooks(name: str, module: nn.Module) -> None:
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
        add_hooks(name, module)
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
    """The layers of a model on the CPU, which is not changed. Raises ReplacementError as
    record_calls() does.
    """
    modules = dict(model.named_modules())
    names = {
        name
        for name, each in modules.items()
        if isinstance(each, nn.Conv2d) or is_norm(each) or is_activation(each)
    }

    def before(name: str, module: nn.Module, given: Tensor) -> tuple:
        return "start", name, module, given.shape, _storage_version(given)

    def after(name: str, _: nn.Module, given: Tensor, out: Tensor) -> tuple:
        return "end", name, out, out.shape, _storage_version(out)

    records = record_calls(model, names, after, before=before)
    return _layers_of(model, _calls(records))


def _calls(records: list[tuple]) -> list[tuple[str, nn.Module, torch.Size, str | None]]:
    """In order: name, module, input shape, and the module whose output is that input, or None.

    Two tensors are the same where they share storage and version: a permuted view, or an identity's
    output, but not one that an in-place addition has changed. The records hold all outputs, so that
    no storage is reused meanwhile.
    """
    calls, producers = [], {}
    for moment, name, module, shape, version in records:
        if moment == "end":
            producers[version] = name
        else:
            calls.append((name, module, shape, producers.get(version)))
    return calls


def _layers_of(model: nn.Module, calls: list[tuple]) -> ModelLayers:
    in_attention = inside_attention(model)
    classifier = classifier_of(model)
    consumers = {
        producer: (name, module) for name, module, _, producer in reversed(calls) if producer
    }
    norms, vector_norms, attention_norms, convolutions, activations = [], [], [], [], []
    for name, module, shape, _ in _first_calls(calls):
        next_name, next_module = consumers.get(name, ("", None))
        if module is classifier or (name in in_attention and not is_norm(module)):
            continue
        if name in in_attention:
            attention_norms.append(name)
        elif is_norm(module) and (len(shape) != 4 or shape[1:3] == (1, 1) or shape[2:] == (1, 1)):
            vector_norms.append(name)
        elif is_norm(module):
            is_last = _is_channels_last_norm(module)
            activation = next_name if next_module and is_activation(next_module) else None
            num_channels = shape[3 if is_last else 1]
            norms.append(NormLocation(name, module, num_channels, is_last, activation))
        elif isinstance(module, nn.Conv2d):
            norm = next_name if next_module and is_norm(next_module) else None
            convolutions.append(ConvLocation(name, module, norm))
        else:
            activations.append(name)
    return ModelLayers(
        *map(tuple, (norms, vector_norms, attention_norms, convolutions, activations))
    )


def _is_channels_last_norm(norm: nn.Module) -> bool:
    """Is the input of a norm [B, H, W, C]?"""
    return isinstance(norm, (nn.LayerNorm, ChannelsLast)) and not CHANNELS_FIRST_LAYER_NORMS.has(
        norm
    )


def _first_calls(calls: Iterable[tuple]) -> list[tuple]:
    """The first call of each module, without those inside another norm of the list."""
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
    # _version counts in-place changes; autograd's own check reads it, and torch has no public name
    # for it
    return tensor.untyped_storage().data_ptr(), tensor._version


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module at a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def counted(modules: Iterable[nn.Module]) -> tuple[tuple[str, int], ...]:
    """Class names with their counts, in order of first appearance: Replacement's `before`."""
    counts: dict[str, int] = {}
    for module in modules:
        name = type(module).__name__
        counts[name] = counts.get(name, 0) + 1
    return tuple(counts.items())


def nothing_to_replace(
    part: str, wanted: str, model: nn.Module, kinds: Sequence[type[nn.Module]] = ()
) -> ReplacementError:
    """The error of a part that found nothing to replace: names what it looked for, and what the
    model has of `kinds` (default: convolutions).
    """
    there = counted(
        module for module in model.modules() if isinstance(module, tuple(kinds) or (nn.Conv2d,))
    )
    has = ", ".join(f"{count} {kind}" for kind, count in there) or "none"
    return ReplacementError(
        f"model.{part}: {type(model).__name__} has no {wanted}; it has {has}; "
        f"leave model.{part} out"
    )
