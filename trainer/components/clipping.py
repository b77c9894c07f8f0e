"""Gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.components.lamb import norms
from trainer.models.edit.replacement import classifier_of

_LEAST_NORM = 1e-3  # of a weight: what starts at zero must be able to move (Brock et al. 2021)
_LEAST_GRADIENT = 1e-6  # keeps the quotient finite; timm's


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Divides all gradients by max(1, norm / max_norm), in place; gives their global norm before
    that, a scalar.

    timm's rule, without the small number that torch's clip_grad_norm_ adds. No host sync on a GPU.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(norms(gradients))
    # Reading the norm is free on a CPU and saves a pass over all gradients; on a GPU it would stop
    # the queue.
    if norm.device.type != "cpu" or norm > max_norm:
        # see lamb.py for torch._foreach_*
        torch._foreach_div_(gradients, (norm / max_norm).clamp(min=1.0))
    return norm


@torch.no_grad()
def clip_values(parameters: Iterable[Tensor], most: float) -> None:
    """Each number of a gradient is clipped to -most .. most, in place. No host sync.

    Source: torch's clip_grad_value_, which timm's --clip-mode value calls.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_clamp_max_(gradients, most)
    torch._foreach_clamp_min_(gradients, -most)


@torch.no_grad()
def clip_adaptively(model: nn.Module, most_share: float) -> None:
    """Clips the gradient of each unit to `most_share` of the unit's own weight norm, in place.

    A unit is what makes one output: a row of a linear layer, a filter of a convolution; a vector of
    weights is one unit. The weight norm counts as at least 1e-3. The last linear layer, weight and
    bias, is left alone, as in the paper. No host sync.

    Sources: Brock et al. 2021, arXiv:2102.06171; timm's adaptive_clip_grad.
    """
    spared = {id(weight) for weight in _last_layer(model).parameters(recurse=False)}
    for weight in model.parameters():
        if weight.grad is not None and id(weight) not in spared:
            most = _unit_norms(weight).clamp_(min=_LEAST_NORM).mul_(most_share)
            excess = _unit_norms(weight.grad).clamp_(min=_LEAST_GRADIENT).div_(most)
            weight.grad.div_(excess.clamp_(min=1.0))


def _last_layer(model: nn.Module) -> nn.Module:
    """What makes the logits: its classifier as timm names it, else its last linear layer."""
    named = classifier_of(model)
    if isinstance(named, (nn.Linear, nn.Conv2d)):
        return named
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _unit_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
