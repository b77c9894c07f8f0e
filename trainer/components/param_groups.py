"""Which weights decay, and at which learning rate each moves: an optimizer's groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from timm.models import group_parameters
from torch import Tensor, nn

from trainer.base.errors import PlanError
from trainer.models.edit.replacement import classifier_of, is_norm

if TYPE_CHECKING:
    from trainer.components.optimizers import Optimizer

Kind = Literal["norms", "biases", "vectors", "bn_in_name", "no_weight_decay"]


def param_groups(model: nn.Module, optimizer: Optimizer) -> list[dict]:
    """The trainable weights in groups: of one learning rate, those that decay, and those that are
    spared.

    Each is {"params": list of tensors, "weight_decay": number, "lr_scale": share of the recipe's
    learning rate}, with "use_fallback" where an optimizer of two rules takes its second; from the
    first layer to the last; a weight used twice in the model appears once.

    Raises PlanError for a pattern of names that fits no weight, and for a model whose layers or
    classifier timm does not name where they are asked for.
    """
    scales = _lr_scales(model, optimizer)
    own = _own_rates(model, optimizer)
    spared, fallback = _spared(model, optimizer), optimizer.by_fallback(model)
    groups: dict[tuple[float, bool, bool, float], list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            lr_scale, decay = own.get(id(weight), (None, None))
            scale = scales.get(name, 1.0) * (1.0 if lr_scale is None else lr_scale)
            is_spared = id(weight) in spared
            decay = 0.0 if is_spared else optimizer.weight_decay if decay is None else decay
            kind = scale, is_spared, id(weight) in fallback, decay
            groups.setdefault(kind, []).append(weight)
    return [
        {
            "params": groups[kind],
            "weight_decay": kind[3],
            "lr_scale": kind[0],
            **({"use_fallback": True} if kind[2] else {}),
        }
        for kind in sorted(groups)
    ]


def _own_rates(
    model: nn.Module, optimizer: Optimizer
) -> dict[int, tuple[float | None, float | None]]:
    """lr_scale and weight_decay of the weights that have own_rates, by id. Raises PlanError for a
    name that fits no weight, and a weight that two of them name.
    """
    found: dict[int, tuple[float | None, float | None]] = {}
    for own in optimizer.own_rates:
        ids = named_weights(model, own.names, "own_rates")
        if ids & found.keys():
            names = [
                name for name, one in model.named_parameters() if id(one) in ids & found.keys()
            ]
            raise PlanError(
                f"optimizer.own_rates: {names[0]} is named twice",
                "name each weight in one of them",
                path=("optimizer", "own_rates"),
            )
        found |= dict.fromkeys(ids, (own.lr_scale, own.weight_decay))
    return found


def named_weights(model: nn.Module, patterns: Iterable[str], key: str) -> set[int]:
    """The ids of the weights of these dotted names, or patterns of them. Raises PlanError for one
    that fits no weight. key: where the recipe has them.
    """
    weights, found = dict(model.named_parameters()), set()
    for pattern in patterns:
        names = fnmatch.filter(weights, pattern)
        if not names:
            raise PlanError(
                f"optimizer.{key}: no weight of this model is named {pattern!r}",
                f"use names as {', '.join(list(weights)[:3])}",
                path=("optimizer", key),
            )
        found |= {id(weights[name]) for name in names}
    return found


def _spared(model: nn.Module, optimizer: Optimizer) -> set[int]:
    """The ids of the weights that do not decay."""
    kinds = optimizer.no_decay
    named = named_weights(model, optimizer.no_decay_names, "no_decay_names")
    listed: Callable[[], Iterable[str]] | None = getattr(model, "no_weight_decay", None)
    if "no_weight_decay" in kinds and listed is not None:
        weights = dict(model.named_parameters())
        named |= {id(weights[name]) for each in listed() for name in fnmatch.filter(weights, each)}
    return named | {
        id(weight)
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(path, recurse=False)
        if any(_is_of_kind(kind, module, name, weight) for kind in kinds)
    }


def _lr_scales(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """The share of the recipe's learning rate of each weight that has another, by name."""
    scales: dict[str, float] = {}
    if optimizer.layer_decay is not None:
        matcher: Callable[..., dict] | None = getattr(model, "group_matcher", None)
        if matcher is None:
            raise PlanError(
                "optimizer.layer_decay: timm says nothing of the layers of this model",
                "leave optimizer.layer_decay out",
                path=("optimizer", "layer_decay"),
            )
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
        if optimizer.layer_decay_blocks is not None:
            stages = group_parameters(model, matcher(coarse=True), reverse=True)
            layers = _joined(layers, stages, optimizer.layer_decay_blocks)
        last = max(layers.values())
        scales = {name: optimizer.layer_decay ** (last - layer) for name, layer in layers.items()}
    if optimizer.head_lr_scale is not None:
        head = {id(weight) for weight in head_of(model, "head_lr_scale").parameters()}
        for name, weight in model.named_parameters():
            if id(weight) in head:
                scales[name] = scales.get(name, 1.0) * optimizer.head_lr_scale
    return scales


def _joined(layers: dict[str, int], stages: dict[str, int], num_blocks: int) -> dict[str, int]:
    """The layers, numbered anew, where num_blocks consecutive ones of a stage are one. layers,
    stages: of each weight by name.
    """
    first: dict[int, int] = {}
    for name, layer in layers.items():
        first[stages[name]] = min(layer, first.get(stages[name], layer))
    groups = {
        name: (stages[name], (layer - first[stages[name]]) // num_blocks)
        for name, layer in layers.items()
    }
    numbers = {group: number for number, group in enumerate(sorted(set(groups.values())))}
    return {name: numbers[group] for name, group in groups.items()}


def head_of(model: nn.Module, key: str) -> nn.Module:
    """The classifier, which the recipe asks for at `key`."""
    head = classifier_of(model)
    if head is None:
        raise PlanError(
            f"optimizer.{key}: timm names no classifier of this model",
            f"leave optimizer.{key} out",
            path=("optimizer", key),
        )
    return head


def _is_of_kind(kind: Kind, module: nn.Module, name: str, weight: Tensor) -> bool:
    if kind == "norms":
        return is_norm(module)
    if kind == "bn_in_name":
        return "bn" in name
    if kind == "no_weight_decay":
        return False  # by the model's own names: see _spared
    return name.rpartition(".")[2] == "bias" if kind == "biases" else weight.ndim <= 1
