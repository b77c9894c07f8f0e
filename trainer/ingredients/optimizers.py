"""How gradients move the weights, and which weights decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from trainer.ingredients import lamb
from trainer.ingredients.base import Ingredient, Positive
from trainer.ingredients.surgery import is_norm

Beta = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Kind = Literal["norms", "biases", "vectors"]


class _Optimizer(Ingredient):
    """What all optimizers share.

    weight_decay: in [0, 1].
    no_decay: what is spared from it. "norms": all of a normalization layer; "biases": all that is called `bias`;
        "vectors": all with at most one dimension. timm and ConvNeXt spare vectors and biases, torchvision's newer
        recipe norms, its older one nothing.
    clip_global_norm: the norm over all gradients is cut down to it (see `clip_gradients`); None leaves it.
    """

    weight_decay: Annotated[float, Field(ge=0, le=1)]
    no_decay: tuple[Kind, ...] = ()
    clip_global_norm: Positive | None = None

    @field_validator("no_decay")
    @classmethod
    def _once_each(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("names a kind of weight twice: name it once")
        return kinds


class Lamb(_Optimizer):
    """LAMB as timm has it, without its hidden clipping: a page states clip_global_norm itself.

    Sources: see `lamb.Lamb`.
    """

    name: Literal["lamb"] = "lamb"
    betas: tuple[Beta, Beta]
    eps: Epsilon

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        """The optimizer of the groups that `param_groups` made."""
        return _resumable(lamb.Lamb(groups, lr=lr, betas=self.betas, eps=self.eps))


class AdamW(_Optimizer):
    """Adam with decay apart from the gradient, scaled by the learning rate.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """

    name: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta]
    eps: Epsilon

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        """The optimizer of the groups that `param_groups` made."""
        return _resumable(torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=True))


class Sgd(_Optimizer):
    """Gradient descent with heavy-ball or Nesterov momentum; decay is added to the gradient.

    timm's `sgd` is Nesterov, torchvision's is not: the page says which.

    Raises ValueError for nesterov without momentum.
    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)]
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov stands with momentum 0: leave it out, or give a momentum")
        return self

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        """The optimizer of the groups that `param_groups` made."""
        return _resumable(torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=self.nesterov, fused=True))


Optimizer = Annotated[Lamb | AdamW | Sgd, Field(discriminator="name")]


def param_groups(model: nn.Module, optimizer: Optimizer) -> list[dict]:
    """The trainable weights as at most two groups: those that decay, and those that `no_decay` spares.

    Each is {"params": list of tensors, "weight_decay": number}; a weight used twice in the model appears once.
    """
    spared = {
        id(weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if any(_is_of_kind(kind, module, name, weight) for kind in optimizer.no_decay)
    }
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if id(weight) not in spared], "weight_decay": optimizer.weight_decay},
        {"params": [weight for weight in weights if id(weight) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_of_kind(kind: Kind, module: nn.Module, name: str, weight: Tensor) -> bool:
    if kind == "norms":
        return is_norm(module)
    return name == "bias" if kind == "biases" else weight.ndim <= 1


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Divides all gradients by max(1, norm / max_norm), in place; gives their global norm before that, a scalar.

    timm's rule, without the small number that torch's clip_grad_norm_ adds. No host sync on a GPU.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(lamb.norms(gradients))
    # Reading the norm is free on a CPU and saves a pass over all gradients; on a GPU it would stop the queue.
    if norm.device.type != "cpu" or norm > max_norm:
        torch._foreach_div_(gradients, (norm / max_norm).clamp(min=1.0))
    return norm


def _resumable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets a saved state go on under another memory format.

    torch's fused kernels walk weight, gradient and state by address: on the CPU a channels_last weight with a
    contiguous moment is not refused but scrambled.
    """
    optimizer.register_load_state_dict_post_hook(_relay_state)
    return optimizer


def _relay_state(optimizer: torch.optim.Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
