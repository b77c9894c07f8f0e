"""Filters moved by the orthogonal part of their momentum, all other weights by gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

_COEFFICIENTS = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix: Tensor, iterations: int) -> Tensor:
    """About the nearest orthogonal matrix to one [M, N]: its singular values come near 1, between
    about 0.5 and 1.5 where they began within a thousandth of the largest.

    A Newton-Schulz iteration of degree five. In bfloat16 on a GPU, as the source; a CPU has no such
    units and computes in float32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = _COEFFICIENTS
    # The source adds 1e-7, small beside sums over a batch; gradients of means may be as small.
    made = matrix / matrix.norm().clamp_min(torch.finfo(torch.float32).tiny)
    made = made.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:
        made = made.T
    for _ in range(iterations):
        square = made @ made.T
        made = a * made + (b * square + c * square @ square) @ made
    return (made.T if is_tall else made).to(matrix.dtype)


class MuonSgdOptimizer(torch.optim.Optimizer):
    """Muon for the groups of weights [out, ...], torch's SGD for those with "use_fallback".

    Muon takes a filter as the matrix [out, rest]; decay shrinks it by lr * weight_decay. In the
    other groups decay is added to the gradient.

    normalize_weights: before its step each of Muon's weights is scaled to the norm sqrt(out).

    Source: KellerJordan/cifar10-airbench at f1c599c4, airbench94_muon.py.
    """

    def __init__(
        self,
        groups,
        lr: float,
        momentum: float,
        nesterov: bool,
        iterations: int,
        normalize_weights: bool,
        sgd_momentum: float,
        sgd_nesterov: bool,
    ) -> None:
        numbers = {
            "lr": lr, "weight_decay": 0.0, "use_fallback": False, "momentum": momentum,
            "nesterov": nesterov, "iterations": iterations, "normalize_weights": normalize_weights,
            "sgd_momentum": sgd_momentum, "sgd_nesterov": sgd_nesterov,
        }  # fmt: skip
        super().__init__(groups, numbers)

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step from the gradients; weights without one are left as they are."""
        assert closure is None, "MuonSgdOptimizer evaluates no loss"
        for group in self.param_groups:
            move = self._sgd_step if group["use_fallback"] else self._muon_step
            for weight in group["params"]:
                if weight.grad is not None:
                    move(weight, weight.grad, group)

    def _muon_step(self, weight: Tensor, gradient: Tensor, group: dict) -> None:
        update = self._with_momentum(weight, gradient, group["momentum"], group["nesterov"])
        if group["normalize_weights"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm())
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        update = orthogonalized(update.reshape(len(update), -1), group["iterations"])
        weight.add_(update.view(weight.shape), alpha=-group["lr"])

    def _sgd_step(self, weight: Tensor, gradient: Tensor, group: dict) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        momentum = group["sgd_momentum"], group["sgd_nesterov"]
        weight.add_(self._with_momentum(weight, gradient, *momentum), alpha=-group["lr"])

    def _with_momentum(
        self, weight: Tensor, gradient: Tensor, momentum: float, nesterov: bool
    ) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient.add(buffer, alpha=momentum) if nesterov else buffer
