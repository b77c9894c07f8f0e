"""Any optimizer of timm by its name, its fields checked against its own signature."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from timm.optim import get_optimizer_info, list_optimizers

from trainer.base.errors import ConfigError, did_you_mean

# Which the recipe gives elsewhere, or the machine decides.
_NOT_FIELDS = {
    "params",
    "lr",
    "weight_decay",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
}


def class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class that timm builds for a name.

    Raises ValueError for a name that timm does not have, or one that cannot be built here.
    """
    known = [str(one) for one in list_optimizers()]
    if name not in known:
        near = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise ValueError(f"timm has no optimizer {name!r}{near}")
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        raise ValueError(
            f"{name} is of the package {info.opt_class.partition('.')[0]}: take one of timm's own"
        )
    if "kron" in name:
        raise ValueError(
            f"{name} draws random numbers of its own, which no seed of a run reaches: take another"
            " optimizer"
        )
    if info.second_order:
        raise ValueError(
            f"{name} needs second derivatives, which no step here has: take another optimizer"
        )
    return info.opt_class


def fixed_by_name(name: str) -> dict[str, Any]:
    """The fields that make the class what the name says, such as Nesterov's momentum of `sgd`;
    numbers are not.
    """
    defaults = get_optimizer_info(name).defaults or {}
    return {
        key: value
        for key, value in defaults.items()
        if not _is_number(value) and key not in _NOT_FIELDS
    }


def numbers_of(name: str) -> dict[str, Any]:
    """The fields that have a number by default, each with timm's own: what a recipe must state."""
    defaults = {key: one.default for key, one in _parameters(class_of(name)).items()}
    defaults |= {
        key: value
        for key, value in (get_optimizer_info(name).defaults or {}).items()
        if key in defaults
    }
    return {key: value for key, value in defaults.items() if _is_number(value)}


def has_fallback(name: str) -> bool:
    """Does it move some weights by another rule than the others, as Muon does?"""
    return "fallback_lr_scale" in _parameters(class_of(name))


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse fields that the optimizer does not have, that are of another type, or whose number
    nobody wrote.

    Raises ValueError in one line with what there is.
    """
    known = _parameters(class_of(name))
    for key, value in fields.items():
        if key not in known:
            near = did_you_mean(key, known) or f"; there are {', '.join(known)}"
            found = f"timm's {name} has no field {key!r}{near}"
            raise ConfigError(found, path=("fields", key), kind="unknown_key")
        _check_type(name, known[key], value)
    missing = {key: value for key, value in numbers_of(name).items() if key not in fields}
    if missing:
        its_own = ", ".join(f"{key} (timm: {_shown(value)})" for key, value in missing.items())
        raise ValueError(
            f"fields has no {its_own}; write {'them' if len(missing) > 1 else 'it'}: no number is"
            " implied"
        )
    try:
        build(name, [{"params": [torch.zeros(1, 1, requires_grad=True)]}], 1.0, fields)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"timm's {name} refuses its fields: {' '.join(str(error).split())}"
        ) from None


def build(
    name: str, groups: list[dict], lr: float, fields: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of groups of weights, with what its name fixes."""
    return class_of(name)(groups, lr=lr, **{**fixed_by_name(name), **fields})


def _parameters(cls: Callable) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls, eval_str=True).parameters
    return {key: one for key, one in parameters.items() if key not in _NOT_FIELDS}


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_number(one) for one in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_type(name: str, parameter: inspect.Parameter, value: Any) -> None:
    # Without an annotation the type is that of timm's default; a whole number may then stand for
    # any number.
    default = parameter.default
    annotation = parameter.annotation
    if annotation is parameter.empty:
        annotation = (
            types.GenericAlias(tuple, (float,) * len(default))
            if isinstance(default, tuple)
            else float
            if _is_number(default)
            else type(default)
        )
    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
            value, strict=True
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        sentence = (
            f"timm's {name} takes no {parameter.name} {_shown(value)}: {reason}; timm's own is"
            f" {_shown(default)}"
        )
        raise ValueError(sentence) from None


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
