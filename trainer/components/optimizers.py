"""How gradients move the weights, and which weights decay."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from timm.optim import RMSpropTF
from torch import Tensor, nn

from trainer.base.component import Component, Positive
from trainer.components import lamb, timm_optimizer
from trainer.components.clipping import clip_adaptively, clip_gradients
from trainer.components.sgd import DecoupledSgdOptimizer as _DecoupledSgd
from trainer.components.sgd import with_whole_first_step
from trainer.models.edit.replacement import is_norm

Beta = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["norms", "biases", "vectors", "bn_in_name"]


class Optimizer(Component):
    """What all optimizers share.

    weight_decay: in [0, 1].
    no_decay: what is spared from it. "norms": all of a normalization layer; "biases": all that is
        called `bias`; "vectors": all with at most one dimension; "bn_in_name": all whose dotted
        name contains "bn". timm and ConvNeXt spare vectors and biases, torchvision's newer recipe
        norms, its older one nothing. ffcv's script goes by the name, and so decays the norms of a
        ResNet's shortcuts (downsample.1) and fc.bias.
    clip_global_norm: gradients are clipped to this norm over all of them (see `clip_gradients`);
        None does not clip.
    clip_adaptive: the gradient of each unit, but for the last linear layer's, is clipped to this
        share of its weight norm (see `clip_adaptively`); None does not clip.

    Raises ValueError for a kind that is there twice, or both ways of clipping.
    """

    kind: ClassVar[str] = "optimizer"
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    no_decay: tuple[Kind, ...] = ()
    clip_global_norm: Positive | None = None
    clip_adaptive: Positive | None = None

    @field_validator("no_decay")
    @classmethod
    def _once_each(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("names a kind of weight twice: name it once")
        return kinds

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        if self.clip_global_norm is not None and self.clip_adaptive is not None:
            raise ValueError("clip_global_norm and clip_adaptive are both there: keep one of them")
        return self

    @property
    @abstractmethod
    def decay_follows_rate(self) -> bool:
        """Is the share of itself that a weight loses in a step in proportion to the learning rate's
        height?

        Where it is not, a batch of other size, with a rate in proportion to it, needs another
        weight_decay.
        """

    @abstractmethod
    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        """The optimizer of the groups that `param_groups` made; lr: the recipe's peak."""

    def scaled_by(self, ratio: float) -> Self:
        """The same optimizer where rate and batch are `ratio` times as large: an image takes as
        much of a weight as before.
        """
        return (
            self
            if self.decay_follows_rate
            else self.model_copy(update={"weight_decay": self.weight_decay * ratio})
        )

    def clip(self, model: nn.Module) -> None:
        """Clip the gradients of a model as the recipe says, in place."""
        if self.clip_global_norm is not None:
            clip_gradients(model.parameters(), self.clip_global_norm)
        if self.clip_adaptive is not None:
            clip_adaptively(model, self.clip_adaptive)


class Lamb(Optimizer):
    """LAMB as timm has it, without its hidden clipping: a recipe states clip_global_norm itself.

    Sources: see `lamb.LambOptimizer`.
    """

    name: Literal["lamb"] = "lamb"
    decay_follows_rate: ClassVar[bool] = True
    betas: tuple[Beta, Beta]
    eps: Epsilon
    example: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02}

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        return _resumable(lamb.LambOptimizer(groups, lr=lr, betas=self.betas, eps=self.eps))


class AdamW(Optimizer):
    """Adam with decay apart from the gradient, scaled by the learning rate.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """

    name: Literal["adamw"] = "adamw"
    decay_follows_rate: ClassVar[bool] = True
    betas: tuple[Beta, Beta]
    eps: Epsilon
    example: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        return _resumable(
            torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=True)
        )


class Sgd(Optimizer):
    """Gradient descent with heavy-ball or Nesterov momentum; decay is added to the gradient.

    timm's `sgd` is Nesterov, torchvision's is not: the recipe says which.

    Raises ValueError for nesterov without momentum.
    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning".
    """

    name: Literal["sgd"] = "sgd"
    decay_follows_rate: ClassVar[bool] = True
    momentum: Momentum
    nesterov: bool = False
    example: ClassVar[dict[str, Any]] = {"momentum": 0.9, "weight_decay": 1e-4}

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        return _with_momentum(self)

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=self.momentum, nesterov=self.nesterov, fused=True
        )
        return _resumable(with_whole_first_step(optimizer))


class DecoupledSgd(Optimizer):
    """Gradient descent with momentum; each step first shrinks the weights by weight_decay * lr /
    lr.peak.

    Sources: see `sgd.DecoupledSgd`.
    """

    name: Literal["decoupled_sgd"] = "decoupled_sgd"
    decay_follows_rate: ClassVar[bool] = False
    momentum: Momentum
    nesterov: bool = False
    example: ClassVar[dict[str, Any]] = {"momentum": 0.875, "weight_decay": 5e-4}

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        return _with_momentum(self)

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        return _resumable(
            _DecoupledSgd(groups, lr=lr, momentum=self.momentum, nesterov=self.nesterov)
        )


class RmspropTf(Optimizer):
    """Gradients over the root of their mean square, in the form of TensorFlow 1, as timm has it.

    The mean square starts at one, eps stands inside the root, and the learning rate enters the
    momentum. Decay is added to the gradient.

    alpha: how much of the mean square stays at a step. decoupled_decay: the weights shrink by lr *
    weight_decay instead. centered: the mean square less the square of the mean.

    Source: Tieleman and Hinton 2012, "Lecture 6.5: RMSProp"; timm's RMSpropTF.
    """

    name: Literal["rmsprop_tf"] = "rmsprop_tf"
    decay_follows_rate: ClassVar[bool] = True
    alpha: Beta
    eps: Epsilon
    momentum: Momentum
    centered: bool = False
    decoupled_decay: bool = False
    example: ClassVar[dict[str, Any]] = {
        "alpha": 0.9,
        "eps": 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-5,
    }

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        fields = self.model_dump(
            include={"alpha", "eps", "momentum", "centered", "decoupled_decay"}
        )
        return _resumable(RMSpropTF(groups, lr=lr, **fields))


class TimmOptimizer(Optimizer):
    """Any optimizer of timm by name.

    optimizer: as timm.optim.list_optimizers() has it. fields: the class's own, under its own names,
    checked against its signature. Each number of the class must be there; a switch that is left out
    stands as timm has it.

    Raises ValueError for an optimizer or a field that timm does not have, a value of another type,
    a number left out.
    """

    name: Literal["timm"] = "timm"
    decay_follows_rate: ClassVar[bool] = True
    optimizer: str
    fields: dict[str, Any] = {}
    example: ClassVar[dict[str, Any]] = {
        "optimizer": "lion", "fields": {"betas": (0.9, 0.99)}, "weight_decay": 1.0,
    }  # fmt: skip

    @model_validator(mode="after")
    def _fields_are_timms(self) -> Self:
        timm_optimizer.check_fields(self.optimizer, self.fields)
        return self

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        return _resumable(timm_optimizer.build(self.optimizer, groups, lr, self.fields))


def param_groups(model: nn.Module, optimizer: Optimizer) -> list[dict]:
    """The trainable weights as at most two groups: those that decay, and those that `no_decay`
    spares.

    Each is {"params": list of tensors, "weight_decay": number}; a weight used twice in the model
    appears once.
    """
    spared = {
        id(weight)
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(path, recurse=False)
        if any(_is_of_kind(kind, module, name, weight) for kind in optimizer.no_decay)
    }
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in weights if id(weight) not in spared],
            "weight_decay": optimizer.weight_decay,
        },
        {"params": [weight for weight in weights if id(weight) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _with_momentum(optimizer):
    if optimizer.nesterov and not optimizer.momentum:
        raise ValueError("nesterov stands with momentum 0: leave it out, or give a momentum")
    return optimizer


def _is_of_kind(kind: Kind, module: nn.Module, name: str, weight: Tensor) -> bool:
    if kind == "norms":
        return is_norm(module)
    if kind == "bn_in_name":
        return "bn" in name
    return name.rpartition(".")[2] == "bias" if kind == "biases" else weight.ndim <= 1


def _resumable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets a saved state be loaded under another memory format.

    torch's fused kernels walk weight, gradient and state by address: on the CPU a channels_last
    weight with a contiguous moment is not refused but scrambled.
    """
    optimizer.register_load_state_dict_post_hook(_relay_state)
    return optimizer


def _relay_state(optimizer: torch.optim.Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == weight.shape
                and value.stride() != weight.stride()
            ):
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
