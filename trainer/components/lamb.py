"""LAMB on top of torch's fused Adam: few passes over the weights, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adam import adam

# Weights that go through the three passes together. On a CPU the second and the third then find
# them in the cache; a GPU wants few, large launches. A tensor above the limit goes alone.
_CPU_BUNDLE_WEIGHTS = 1 << 18
_GPU_BUNDLE_WEIGHTS = 1 << 26


class LambOptimizer(torch.optim.Optimizer):
    """Adam whose step on each tensor is as long as the tensor's own norm, times the learning rate.

    With u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * w, a tensor w
    moves by -lr * |w| / |u| * u; where either norm is zero the ratio is 1. A group with
    weight_decay 0 has no ratio: it takes Adam's step at the full learning rate (timm's rule, so the
    choice of what decays also sets step lengths). Gradients are not clipped here: timm's class does
    that inside, ours leaves it to `clip_gradients`.

    groups: dictionaries of "params", dense and floating-point, and "weight_decay".

    Sources: You et al. 2019, arXiv:1904.00962; timm's lamb.py at fbf59c04, of the week of
    arXiv:2110.00476.
    """

    def __init__(
        self, groups, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ):
        # "fused" tells torch's load_state_dict to put the step counts on the weights' device.
        super().__init__(
            groups,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True},
        )
        # torch's GradScaler then leaves a step to us that has an infinite gradient, in `found_inf`
        # on the device: to leave it out itself it would wait for the device in every step.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step from the gradients; weights without one are left as they are. No host
        sync.
        """
        assert closure is None, "LAMB evaluates no loss"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights and group["weight_decay"]:
                self._adapted_steps(list(_bundled(weights)), group)
            else:
                self._add_adam_step(weights, weights, -group["lr"], group)

    def _adapted_steps(self, bundles: list[list[Tensor]], group: dict) -> None:
        room = max(sum(weight.numel() for weight in bundle) for bundle in bundles)
        scratch = bundles[0][0].new_empty(room)
        for weights in bundles:
            # The ratio is blind to the length of u, so u / weight_decay serves: the weights plus
            # Adam's step.
            updates = _copies(weights, scratch)
            self._add_adam_step(updates, weights, 1 / group["weight_decay"], group)
            weight_norms = norms(weights)
            update_norms = norms(updates)
            has_ratio = (weight_norms > 0) & (update_norms > 0)
            ratios = torch.where(has_ratio, weight_norms / update_norms, group["weight_decay"])
            if (found_inf := getattr(self, "found_inf", None)) is not None:
                ratios = torch.where(found_inf > 0, 0.0, ratios)
            # torch has no public call over a list of tensors; its own optimizers stand on
            # torch._foreach_*
            torch._foreach_addcmul_(weights, updates, ratios.unbind(), value=-group["lr"])

    def _add_adam_step(
        self, targets: list[Tensor], weights: list[Tensor], factor: float, group: dict
    ) -> None:
        """Moves the moments of `weights` by their gradients and adds factor * Adam's update to
        `targets`.
        """
        states = [self._state_of(weight) for weight in weights]
        adam(
            targets,
            [weight.grad for weight in weights if weight.grad is not None],  # each has one
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=-factor,
            eps=group["eps"],
            weight_decay=0.0,
        )

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


def _bundled(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in order, split into bundles of a size that suits their device."""
    bundle: list[Tensor] = []
    num_weights = 0
    for weight in weights:
        limit = _CPU_BUNDLE_WEIGHTS if weight.device.type == "cpu" else _GPU_BUNDLE_WEIGHTS
        if bundle and num_weights + weight.numel() > limit:
            yield bundle
            bundle, num_weights = [], 0
        bundle.append(weight)
        num_weights += weight.numel()
    if bundle:
        yield bundle


def _copies(weights: list[Tensor], scratch: Tensor) -> list[Tensor]:
    """The weights copied into one tensor after another, each with its shape and memory format."""
    views, offset = [], 0
    for weight in weights:
        views.append(scratch.as_strided(weight.size(), weight.stride(), offset))
        offset += weight.numel()
    torch._foreach_copy_(views, weights)
    return views


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: [N], on their device.

    On a CPU the rows' norms come first: all cores take part, and the error falls from 3e-5 to 2e-7,
    for torch sums a whole tensor of two million float32 in a few float32 lanes.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors))
    rows = [
        torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)) or None)
        for tensor in tensors
    ]
    return torch.stack([torch.linalg.vector_norm(row) for row in rows])
