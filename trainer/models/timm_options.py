"""A timm model of given options, and which of a recipe's options its class takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from trainer.base.errors import PlanError
from trainer.models.zoo import timm_name

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan

# The recipe's name of an option -> timm's.
_OPTIONS = {
    "zero_init_last": "zero_init_last",
    "layer_scale": "ls_init_value",
    "head_init_scale": "head_init_scale",
    "dropout": "drop_rate",
    "attention_dropout": "attn_drop_rate",
    "projection_dropout": "proj_drop_rate",
    "patch_px": "patch_size",
}


def takes_option(model: str, **option: Any) -> bool:
    """Does the class of a timm model accept an option, and this value of it?"""
    return without_weights(model, **option) is not None


def without_weights(model: str, **options: Any) -> nn.Module | None:
    """A timm model on the meta device; None where its class does not take the options."""
    try:
        with torch.device("meta"):
            return timm.create_model(timm_name(model), **options)
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return None


def create_model(model: str, num_classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """A timm model with random weights.

    Raises PlanError naming the option that the model's class does not take.
    """
    try:
        return timm.create_model(
            timm_name(model), num_classes=num_classes, in_chans=channels, **options
        )
    except TypeError:
        refused = [
            name for name, value in options.items() if not takes_option(model, **{name: value})
        ]
        if "zero_init_last" in refused:
            if options["zero_init_last"]:
                raise PlanError(
                    f"model.zero_init_last: {_no_last_gamma(model)}; "
                    'use set="model.zero_init_last=null"'
                ) from None
            # `false` holds anyway: in a class without the option no gamma starts at zero
            rest = {name: value for name, value in options.items() if name != "zero_init_last"}
            return create_model(model, num_classes, channels, rest)
        recipe_keys = {theirs: f"model.{ours}" for ours, theirs in _OPTIONS.items()} | {
            "drop_path_rate": "drop_path",
            "output_stride": "task.output_stride",
        }
        for theirs, ours in recipe_keys.items():
            if theirs in refused:
                raise PlanError(
                    f'{ours}: {model} has no such option; use set="{ours}=null"'
                ) from None
        raise


def _no_last_gamma(model: str) -> str:
    """Why the last gammas of a timm model cannot start at zero."""
    with torch.device("meta"):
        is_convnext = isinstance(timm.create_model(timm_name(model)), timm.models.ConvNeXt)
    return (
        f"the residual branches of {model} do not end in a norm"
        if is_convnext
        else f"{model} has no such option"
    )


def model_options(plan: Plan) -> dict[str, Any]:
    section = plan.recipe.model
    options: dict[str, Any] = (
        {"drop_path_rate": plan.recipe.drop_path} if plan.recipe.drop_path else {}
    )
    for ours, theirs in _OPTIONS.items():
        value = getattr(section, ours) if section else None
        if value is not None:
            options[theirs] = value
    return options
