"""timm models with a recipe's options, initialized from the run's seed.

The options that a model's class takes: timm_options.py; the sizes of images: sizes.py; what its
norms' statistics ask of a plan: norm_statistics.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.base import streams
from trainer.base.errors import PlanError, did_you_mean
from trainer.models.edit.replacement import Replacement
from trainer.models.freezing import freeze_for_good
from trainer.models.initialization import initialize_weights, scale_head
from trainer.models.norm_statistics import (
    check_frozen,
    check_joined,
    check_precise_norm,
    check_sample,
)
from trainer.models.parts.depth import LayerScale
from trainer.models.sizes import check_sizes, size_options
from trainer.models.timm_options import create_model, model_options, takes_option
from trainer.models.whitening import whiten
from trainer.models.zoo import torchvision_models

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan


def check_model_name(model: str, place: str = "model") -> None:
    """Refuse a model that neither timm nor, as `torchvision:<name>`, torchvision has. place: what
    names it.

    Raises PlanError with the nearest name.
    """
    if model.startswith("torchvision"):
        torchvision_models.check_name(model)
        return
    # is_model looks only at what stands before the first point
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", model) or not timm.is_model(model):
        near, other = "", torchvision_models.name_where_timm_lacks_it(model)
        if other == model:
            near, other = did_you_mean(model, torchvision_models.known_models()), "resnet50"
        raise PlanError(f"{place}={model}: timm has no such model{near}; use {place}={other}")
    try:
        timm.models.get_pretrained_cfg(model)
    except RuntimeError:
        name, _, tag = model.partition(".")
        raise PlanError(
            f"{place}={model}: timm has no pretrained weights {tag!r} for {name}; "
            f"use {place}={name}, which starts from random weights"
        ) from None


def build_model(plan: Plan) -> nn.Module:
    """The model of a plan, its initial weights a function of the seed alone. See `assemble`."""
    return assemble(plan)[0]


def assemble(plan: Plan) -> tuple[nn.Module, tuple[Replacement, ...]]:
    """The model of a plan, and what each part of its recipe's `model` section replaced in it.

    timm and the parts sample from torch's global generator, which is forked here and left as it
    was.

    Raises PlanError for an unknown model, for image sizes or options that it does not support, and
    for running statistics that its norms do not keep or would compute from a single value;
    ReplacementError for a part that finds nothing to replace.
    """
    check_model_name(plan.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.torch_seed(plan.seed, "weights"))
        model, replacements = assembled(plan)
        replacements += initialize_weights(model, plan.recipe.model, plan.profile.num_classes)
        if plan.recipe.model and plan.recipe.model.whitening:
            replacements += (whiten(model, plan.recipe.model.whitening, plan),)
        model = plan.recipe.of_task.model_of(plan, model)
        check_sizes(plan, model)
        check_sample(plan, model)
        check_joined(plan, model)
        check_precise_norm(plan, model)
        if plan.recipe.model and plan.recipe.model.freeze:
            check_frozen(plan, model)
            freeze_for_good(model, plan.recipe.model.freeze)
    return model, replacements


def assembled(plan: Plan) -> tuple[nn.Module, tuple[Replacement, ...]]:
    """The timm model with the recipe's parts, before its task makes a model of it: initialized from
    torch's global generator as it stands.
    """
    section, image_px = plan.recipe.model, plan.recipe.image.train_px
    options = model_options(plan) | size_options(plan) | plan.recipe.of_task.model_options()
    parts = [] if section is None else [part for _, part in section.parts()]
    layer_scale, head_scale = options.get("ls_init_value"), options.get("head_init_scale")
    if layer_scale is not None and not takes_option(plan.model, ls_init_value=layer_scale):
        del options["ls_init_value"]
        if takes_option(plan.model, init_values=layer_scale):  # ViTs and their kin
            options["init_values"] = layer_scale
        else:
            parts.append(LayerScale(start=layer_scale))
    is_timms = head_scale is None or takes_option(plan.model, head_init_scale=head_scale)
    if not is_timms:
        del options["head_init_scale"]
    model = create_model(plan.model, plan.profile.num_classes, plan.profile.channels, options)
    if plan.recipe.distill:
        train_both_heads(model)
    replacements = tuple(part.apply(model, image_px) for part in parts)
    if head_scale is not None and not is_timms:
        replacements += (scale_head(model, head_scale),)
    return model, replacements


def train_both_heads(model: nn.Module) -> bool:
    """Let a timm model that has a head for a teacher answer, in training, with both of its heads;
    gives whether it has one. In evaluation it answers with their mean all the same.
    """
    train_apart = getattr(model, "set_distilled_training", None)
    if train_apart is not None:
        train_apart(True)
    return train_apart is not None


def num_parameters(model: nn.Module) -> int:
    """All that a model has, frozen ones too."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(model: nn.Module, channels: int, image_px: int) -> float:
    """Billions of multiply-adds of one image's forward pass: convolutions and matrix products."""
    first = next(model.parameters())
    image = torch.zeros(1, channels, image_px, image_px, device=first.device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops() / 2e9
