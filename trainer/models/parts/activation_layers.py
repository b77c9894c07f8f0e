"""Nonlinearities that neither torch nor timm has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.edit.layer_kinds import ACTIVATIONS


@ACTIVATIONS.register
class LearnedSwish(nn.Module):
    """x * sigmoid(beta * x), with one learned beta [1] for the layer.

    Source: Ramachandran et al. 2017, arXiv:1710.05941.
    """

    def __init__(self, beta: float):
        super().__init__()
        self.beta = nn.Parameter(torch.full((1,), beta))

    def forward(self, given: Tensor) -> Tensor:
        """Any shape, any layout; in the dtype that is given, whatever beta's."""
        return given * torch.sigmoid(self.beta.to(given.dtype) * given)
