"""Where a new module goes in a residual block, and how it is initialized."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import named_apply
from torch import Tensor, nn

from trainer.models.edit.replacement import (
    ReplacementError,
    has_activation,
    inside_attention,
    is_activation,
    is_norm,
    record_calls,
    replace_module,
)
from trainer.models.edit.stages import blocks as blocks_of

_SHORTCUTS = ("downsample", "shortcut")  # timm's names for a block's path beside the branch
_TAIL = ("attention", "layer_scale", "drop_path")  # the order in which they end a residual branch


@dataclass(frozen=True)
class InsertionPoint:
    """Where one module may be inserted.

    block: dotted name of its residual block. name: the dotted name it will have. insert: does it.
    """

    block: str
    name: str
    num_channels: int
    insert: Callable[[nn.Module], None]


def branch_ends(model: nn.Module, blocks: Iterable[str], key: str) -> list[InsertionPoint]:
    """The end of each residual branch, after its last norm: before layer scale, stochastic depth
    and the addition.

    key: `attention` or `layer_scale`; in a branch they follow each other in this order.

    Raises ReplacementError for a block of timm's without a place there.
    """
    blocks = list(blocks)
    channels = _output_channels(model, blocks)
    return [_end(model, name, channels[name], key) for name in blocks]


def _end(model: nn.Module, name: str, num_channels: int, key: str) -> InsertionPoint:
    block = model.get_submodule(name)
    # timm's own place for attention in a ResNet
    if key == "attention" and getattr(block, "se", block) is None:
        return InsertionPoint(
            name, f"{name}.se", num_channels, partial(replace_module, model, f"{name}.se")
        )
    if hasattr(block, "mlp"):  # ConvNeXt: before gamma
        return InsertionPoint(
            name, f"{name}.mlp.{key}", num_channels, _following(block.get_submodule("mlp"), key)
        )
    if hasattr(block, "drop_path"):
        return InsertionPoint(
            name, f"{name}.drop_path.{key}", num_channels, partial(add_to_branch_end, block, key)
        )
    raise ReplacementError(
        f"model.{key}: {name} is a {type(block).__name__}, which has no place for a module "
        "before the addition; use resnet50 or convnext_tiny"
    )


def branch_middles(model: nn.Module, blocks: Iterable[str], key: str) -> list[InsertionPoint]:
    """After the activation that feeds the last convolution of each residual branch; ConvNeXt:
    after its norm.

    That is after the 3x3 of a bottleneck, the first convolution of a basic block, ConvNeXt's
    depthwise convolution.

    Raises ReplacementError for a block in which no single module feeds the last convolution.
    """
    blocks = list(blocks)
    channels, calls = _output_channels(model, blocks), branch_calls(model, blocks)
    return [_middle(model, name, channels[name], calls[name], key) for name in blocks]


def _middle(
    model: nn.Module, name: str, num_channels: int, calls: list[tuple], key: str
) -> InsertionPoint:
    block = model.get_submodule(name)
    if hasattr(block, "mlp"):
        return InsertionPoint(
            name, f"{name}.mlp.{key}", num_channels, _preceding(block.get_submodule("mlp"), key)
        )
    before = before_last_convolution(calls)
    found = [
        call
        for call in before
        if is_activation(call[1]) or (is_norm(call[1]) and has_activation(call[1]))
    ]
    if not found or sum(call[0] == found[-1][0] for call in calls) > 1:
        raise ReplacementError(
            f"model.{key}: {name} is a {type(block).__name__} without a single activation after "
            "its middle convolution; use position: after_last_norm"
        )
    maker, _, num_channels = found[-1]
    if isinstance(getattr(block, "se", None), nn.Identity):  # RegNet keeps the place
        return InsertionPoint(
            name, f"{name}.se", num_channels, partial(replace_module, model, f"{name}.se")
        )
    # timm's *Act norms call their own act
    inside = [other for other, _, _ in before if maker.startswith(f"{other}.")]
    maker = inside[0] if inside else maker
    return InsertionPoint(name, f"{maker}.1", num_channels, partial(append_module, model, maker))


def last_stages(model: nn.Module, part: str, num_stages: int | None) -> list[list[str]]:
    """Dotted names of the blocks of the last stages, a list for each; None for all stages.

    Raises ReplacementError where the model has fewer.
    """
    found = blocks_of(model)
    if num_stages is not None and num_stages > len(found):
        raise ReplacementError(
            f"model.{part}.stages={num_stages}: the model has {len(found)} stages; "
            f"use {len(found)} or fewer"
        )
    return found if num_stages is None else found[-num_stages:]


def block_ends(model: nn.Module, blocks: Iterable[str], key: str) -> list[InsertionPoint]:
    """After each block, its addition and last activation included."""
    blocks = list(blocks)
    channels = _output_channels(model, blocks)
    return [
        InsertionPoint(
            name, f"{name}.{key}", channels[name], _following(model.get_submodule(name), key)
        )
        for name in blocks
    ]


def append_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Follow a module of the model by another: `name` becomes `name.0`, the other `name.1`."""
    replace_module(model, name, nn.Sequential(model.get_submodule(name), module))


def add_to_branch_end(block: nn.Module, key: str, module: nn.Module) -> None:
    """Add a module to what timm calls a block's drop_path: the end of its residual branch."""
    there: nn.Module | None = getattr(block, "drop_path", None)
    parts = dict(there.named_children()) if type(there) is nn.Sequential else {"drop_path": there}
    parts[key] = module
    kept = [
        (name, part)
        for name in _TAIL
        if (part := parts.get(name)) is not None and not isinstance(part, nn.Identity)
    ]
    block.drop_path = (
        kept[0][1]
        if [name for name, _ in kept] == ["drop_path"]
        else nn.Sequential(OrderedDict(kept))
    )


def _following(module: nn.Module, key: str) -> Callable[[nn.Module], None]:
    """Adds a child that processes the module's output.

    By a hook, so no parameter changes its name and the module's other children can be replaced
    later.
    """

    def add(child: nn.Module) -> None:
        module.add_module(key, child)
        module.register_forward_hook(partial(_after, key, _is_channels_last(module)))

    return add


def _preceding(module: nn.Module, key: str) -> Callable[[nn.Module], None]:
    def add(child: nn.Module) -> None:
        module.add_module(key, child)
        module.register_forward_pre_hook(partial(_before, key, _is_channels_last(module)))

    return add


def _after(
    key: str, is_last: bool, module: nn.Module, given: tuple[Tensor, ...], made: Tensor
) -> Tensor:
    return _through(getattr(module, key), made, is_last)


def _before(key: str, is_last: bool, module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return _through(getattr(module, key), given[0], is_last)


def _through(child: nn.Module, features: Tensor, is_last: bool) -> Tensor:
    return child(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_last else child(features)


def _is_channels_last(module: nn.Module) -> bool:
    return isinstance(getattr(module, "fc1", None), nn.Linear)  # a Linear works on the last axis


def before_last_convolution(
    calls: list[tuple[str, nn.Module, int]],
) -> list[tuple[str, nn.Module, int]]:
    """The calls of a residual branch before that of its last convolution."""
    convolutions = [
        number for number, (_, module, _) in enumerate(calls) if isinstance(module, nn.Conv2d)
    ]
    return calls[: convolutions[-1]] if convolutions else []


def branch_calls(
    model: nn.Module, blocks: Iterable[str]
) -> dict[str, list[tuple[str, nn.Module, int]]]:
    """For each block the modules of its residual branch in the order of their calls: name, module,
    output channels.

    Convolutions, norms and activations; none inside attention or the shortcut.
    """
    blocks = list(blocks)
    left_out = inside_attention(model)
    block_of = {}
    for block in blocks:
        for inner, module in model.get_submodule(block).named_modules():
            name, is_wanted = (
                f"{block}.{inner}",
                isinstance(module, nn.Conv2d) or is_norm(module) or is_activation(module),
            )
            if is_wanted and inner.partition(".")[0] not in _SHORTCUTS and name not in left_out:
                block_of[name] = block
    calls: dict[str, list] = {name: [] for name in blocks}
    for name, module, num_channels in record_calls(
        model, block_of, lambda name, module, _, made: (name, module, made.shape[1])
    ):
        calls[block_of[name]].append((name, module, num_channels))
    return calls


def _output_channels(model: nn.Module, blocks: list[str]) -> dict[str, int]:
    shapes = output_shapes(model, blocks)
    return {name: shape[1] for name, shape in shapes.items()}


def output_shapes(
    model: nn.Module, names: Iterable[str], image_px: int | None = None
) -> dict[str, torch.Size]:
    """The output shapes of modules for one image, by dotted name; image_px as in record_calls().

    Raises ReplacementError where the model does not support this image size.
    """
    return dict(
        record_calls(model, set(names), lambda name, _, given, out: (name, out.shape), image_px)
    )


def check_inserted(
    model: nn.Module, part: str, places: Iterable[tuple[str, str]], image_px: int | None = None
) -> None:
    """Check that each new module runs once per forward pass, and not on its block's input.

    places: for each, its block's dotted name and its own. image_px: see `record_calls`.

    Raises ReplacementError otherwise: some of timm's blocks have such an attribute that they never
    call, or call on the shortcut.
    """
    places = list(places)
    given: dict[str, list[int]] = {name: [] for place in places for name in place}
    for name, storage in record_calls(
        model,
        given,
        lambda name, _, given, made: (name, given.untyped_storage().data_ptr()),
        image_px,
    ):
        given[name].append(storage)
    for block, name in places:
        if len(given[name]) != 1 or given[name] == given[block]:
            kind = type(model.get_submodule(block)).__name__
            raise ReplacementError(
                f"model.{part}: timm's {kind} ({block}) would not run it on the residual branch; "
                f"leave model.{part} out"
            )


def init_like_timm(model: nn.Module, module: nn.Module) -> None:
    """Initialize a new module as timm initializes the rest of this model.

    A ResNet's convolutions follow Kaiming's normal distribution (fan_out), ConvNeXt's layers a
    normal one of deviation 0.02, truncated. Biases and norms that timm's rule leaves out keep
    torch's initialization.
    """
    # timm keeps the rule beside each family's class, under this name and no public one
    rule = getattr(sys.modules[type(model).__module__], "_init_weights", None)
    if rule is not None:
        named_apply(rule, module, include_root=True)
        return
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            nn.init.kaiming_normal_(inner.weight, mode="fan_out", nonlinearity="relu")
