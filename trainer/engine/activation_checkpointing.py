"""Activation checkpointing: what the backward pass needs is recomputed instead of kept. Less
memory, the same bits.
"""

from __future__ import annotations

import contextlib
import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.base.errors import UserError
from trainer.models.edit.layer_kinds import FROZEN_NORMS, RunningNorm
from trainer.models.parts.norm_layers import StepNorm


def recompute_activations(model: nn.Module) -> None:
    """Let a model keep only what goes into its blocks, as timm does it; a model without timm's
    set_grad_checkpointing, into its stages.

    Norms move their statistics in the first pass alone: see StepStatistics.at_rest.

    Raises UserError for a model without stages, and for norms whose statistics cannot be kept from
    moving twice.
    """
    _check_norms(model)
    timms = getattr(model, "set_grad_checkpointing", None)
    if timms is not None:
        with contextlib.suppress(AttributeError, AssertionError):  # timm's "not supported"
            timms(True)
            return
    _recompute_stages(model)


def _recompute_stages(model: nn.Module) -> None:
    stages = [
        child
        for child in model.children()
        if isinstance(child, nn.Sequential) and any(True for _ in child.parameters())
    ]
    if not stages:
        raise UserError(
            f"activation_checkpointing=1: {type(model).__name__} has no stages to recompute; use"
            " activation_checkpointing=0"
        )
    for stage in stages:
        again = functools.partial(checkpoint, stage.forward, use_reentrant=False)
        stage.forward = again  # type: ignore[method-assign]  # of this one instance


def _check_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_moving = getattr(module, "running_var", None) is not None and not FROZEN_NORMS.has(
            module
        )
        if is_moving and not isinstance(module, RunningNorm | StepNorm):
            raise UserError(
                f"activation_checkpointing=1: {name} ({type(module).__name__}) would move its"
                " statistics twice in a step; use activation_checkpointing=0"
            )
