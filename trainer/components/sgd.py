"""Gradient descent whose decay does not pass through the momentum."""

from __future__ import annotations

import torch


def with_whole_first_step(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Under a GradScaler momentum starts at zero, which gives the same first step.

    torch's fused kernel allocates it and, where the first step is infinite, leaves it as it lay in
    memory; the second then adds to that.
    """
    optimizer.register_step_pre_hook(_start_momentum)
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer, *_) -> None:
    if getattr(optimizer, "found_inf", None) is None:  # no scaler, or one that decides by itself
        return
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] else ():
            state = optimizer.state[weight]
            if weight.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(weight)


class DecoupledSgdOptimizer(torch.optim.SGD):
    """torch's SGD on weights that first shrink by weight_decay * lr / initial_lr.

    The decay follows the shape of the schedule but not its height: at the first rate, initial_lr, a
    weight loses weight_decay of itself in a step, whatever that rate is.

    groups: dictionaries of "params" and "weight_decay". lr: the rate that the decay counts as
    whole, the peak.

    Sources: Loshchilov and Hutter 2017, arXiv:1711.05101; the form is that of MosaicML's composer
    0.7.1, DecoupledSGDW.
    """

    def __init__(self, groups, lr: float, momentum: float, nesterov: bool):
        groups = [
            {**group, "weight_decay": 0.0, "decoupled_decay": group["weight_decay"]}
            for group in groups
        ]
        groups = [{**group, "initial_lr": lr} for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        with_whole_first_step(self)

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step from the gradients; weights without one are left as they are.

        A step that torch's GradScaler finds infinite, in `found_inf` on the device, leaves out the
        decay as well.
        """
        assert closure is None, "DecoupledSgdOptimizer evaluates no loss"
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            lost_share = group["decoupled_decay"] * group["lr"] / group["initial_lr"]
            if weights and lost_share:
                kept_share = 1 - lost_share
                if found_inf is not None:
                    kept_share = torch.where(found_inf > 0, 1.0, kept_share)
                # see lamb.py for torch._foreach_*
                torch._foreach_mul_(weights, kept_share)
        super().step()
