"""How gradients move the weights: one class each. Which weights decay, and at which learning rate
each moves: param_groups.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from timm.optim import RMSpropTF
from torch import Tensor, nn

from trainer.base.component import Component, Positive, StrictModel
from trainer.components import lamb, timm_optimizer
from trainer.components.clipping import clip_adaptively, clip_gradients, clip_values
from trainer.components.muon import MuonSgdOptimizer
from trainer.components.param_groups import Kind, head_of, named_weights
from trainer.components.sgd import DecoupledSgdOptimizer as _DecoupledSgd
from trainer.components.sgd import with_whole_first_step
from trainer.models.edit.replacement import classifier_of

Beta = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
LayerDecay = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, le=1)]


class OwnRates(StrictModel):
    """Weights with a learning rate or a decay of their own.

    names: dotted names, or patterns of them ("layers.*.norm1.bias"); each must fit at least one.
    lr_scale: what the recipe's learning rate is multiplied by for them. weight_decay: theirs.

    Raises ValueError for neither.
    """

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    lr_scale: Positive | None = None
    weight_decay: Decay | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.lr_scale is None and self.weight_decay is None:
            raise ValueError("names stand without lr_scale and weight_decay: give one of them")
        return self


class Optimizer(Component):
    """What all optimizers share.

    weight_decay: in [0, 1].
    no_decay: what is spared from it. "norms": all of a normalization layer; "biases": all that is
        called `bias`; "vectors": all with at most one dimension; "bn_in_name": all whose dotted
        name contains "bn". timm and ConvNeXt spare vectors and biases, torchvision's newer recipe
        norms, its older one nothing. ffcv's script goes by the name, and so decays the norms of a
        ResNet's shortcuts (downsample.1) and fc.bias. "no_weight_decay": what the model itself
        lists in timm's method of that name, as class tokens, position embeddings and Swin's tables
        of relative positions; nothing where it has no such method.
    no_decay_names: further weights that are spared, by their dotted names or patterns of them
        ("blocks.*.gamma_1"); each must fit at least one.
    layer_decay: the learning rate of each layer is this share of that of the layer after it; the
        classifier, and what comes last, has the recipe's. What a layer is timm says, as its
        `param_groups_layer_decay` does. None: one learning rate for all.
    layer_decay_blocks: so many consecutive layers of a stage, its rest too, count as one for
        layer_decay; what is in no stage is a layer. None: each by itself.
    head_lr_scale: times this, the learning rate of the classifier. None: as the others.
    own_rates: weights with rates or decays of their own; what no_decay spares stays spared.
    clip_global_norm: gradients are clipped to this norm over all of them (see `clip_gradients`);
        None does not clip.
    clip_adaptive: the gradient of each unit, but for the last linear layer's, is clipped to this
        share of its weight norm (see `clip_adaptively`); None does not clip.
    clip_value: each number of a gradient is clipped to this, up and down; None does not clip.

    Raises ValueError for a kind that is there twice, or two ways of clipping.
    """

    kind: ClassVar[str] = "optimizer"
    # under fp16 an infinite gradient leaves a step out: torch's scaler asks the host whether, where
    # the class does not decide it on the device
    waits_under_fp16: ClassVar[bool] = False
    weight_decay: Decay
    no_decay: tuple[Kind, ...] = ()
    no_decay_names: tuple[str, ...] = ()
    layer_decay: LayerDecay | None = None
    layer_decay_blocks: Annotated[int, Field(ge=2, le=100)] | None = None
    head_lr_scale: Positive | None = None
    own_rates: tuple[OwnRates, ...] = ()
    clip_global_norm: Positive | None = None
    clip_adaptive: Positive | None = None
    clip_value: Positive | None = None

    @field_validator("no_decay")
    @classmethod
    def _once_each(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("names a kind of weight twice: name it once")
        return kinds

    @model_validator(mode="after")
    def _clips_once(self) -> Self:
        ways = "clip_global_norm", "clip_adaptive", "clip_value"
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) > 1:
            both = "both" if len(given) == 2 else "all"
            raise ValueError(f"{' and '.join(given)} are {both} there: keep one of them")
        return self

    @model_validator(mode="after")
    def _blocks_of_a_decay(self) -> Self:
        if self.layer_decay_blocks is not None and self.layer_decay is None:
            raise ValueError("layer_decay_blocks stands without layer_decay: leave it out")
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

    def by_fallback(self, model: nn.Module) -> set[int]:
        """The ids of the weights that an optimizer of two rules moves by its second one, beside
        those that it chooses itself. Raises PlanError.
        """
        return set()

    def scaled_by(self, ratio: float) -> Self:
        """The same optimizer where rate and batch are `ratio` times as large: an image takes as
        much of a weight as before.
        """
        if self.decay_follows_rate:
            return self
        own = tuple(
            one.model_copy(update={"weight_decay": one.weight_decay * ratio})
            if one.weight_decay is not None
            else one
            for one in self.own_rates
        )
        decay = self.weight_decay * ratio
        return self.model_copy(update={"weight_decay": decay, "own_rates": own})

    def clip(self, model: nn.Module) -> None:
        """Clip the gradients of a model as the recipe says, in place."""
        if self.clip_global_norm is not None:
            clip_gradients(model.parameters(), self.clip_global_norm)
        if self.clip_adaptive is not None:
            clip_adaptively(model, self.clip_adaptive)
        if self.clip_value is not None:
            clip_values(model.parameters(), self.clip_value)


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


class MuonSgd(Optimizer):
    """Muon for filters and matrices: they move by the orthogonal part of their momentum. All else,
    vectors, the classifier and fallback_names, moves by gradient descent with a momentum of its
    own, mostly at own_rates.

    iterations: of Newton and Schulz, for the orthogonal part. normalize_weights: before its step
    each of Muon's weights is scaled to the norm sqrt(out), by which its direction alone is learned.
    sgd_momentum, sgd_nesterov: of the others. Decay shrinks Muon's weights by lr * weight_decay,
    and is added to the gradient of the others.

    Sources: see `muon.MuonSgdOptimizer`.
    """

    name: Literal["muon_sgd"] = "muon_sgd"
    waits_under_fp16: ClassVar[bool] = True
    decay_follows_rate: ClassVar[bool] = True
    momentum: Momentum
    nesterov: bool = False
    iterations: Annotated[int, Field(ge=1, le=20)]
    normalize_weights: bool = False
    sgd_momentum: Momentum
    sgd_nesterov: bool = False
    fallback_names: tuple[str, ...] = ()
    example: ClassVar[dict[str, Any]] = {
        "momentum": 0.6, "nesterov": True, "iterations": 3, "sgd_momentum": 0.85,
        "weight_decay": 0.0,
    }  # fmt: skip

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.sgd_nesterov and not self.sgd_momentum:
            raise ValueError("sgd_nesterov stands with sgd_momentum 0: leave it out")
        return _with_momentum(self)

    def by_fallback(self, model: nn.Module) -> set[int]:
        head = classifier_of(model)
        others = [] if head is None else list(head.parameters())
        others += [weight for weight in model.parameters() if weight.ndim < 2]
        return {id(one) for one in others} | named_weights(
            model, self.fallback_names, "fallback_names"
        )

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        names = {
            "momentum", "nesterov", "iterations", "normalize_weights", "sgd_momentum",
            "sgd_nesterov",
        }  # fmt: skip
        return _resumable(MuonSgdOptimizer(groups, lr, **self.model_dump(include=names)))


class RmspropTf(Optimizer):
    """Gradients over the root of their mean square, in the form of TensorFlow 1, as timm has it.

    The mean square starts at one, eps stands inside the root, and the learning rate enters the
    momentum. Decay is added to the gradient.

    alpha: how much of the mean square stays at a step. decoupled_decay: the weights shrink by lr *
    weight_decay instead. centered: the mean square less the square of the mean.

    Source: Tieleman and Hinton 2012, "Lecture 6.5: RMSProp"; timm's RMSpropTF.
    """

    name: Literal["rmsprop_tf"] = "rmsprop_tf"
    waits_under_fp16: ClassVar[bool] = True
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
    fallback_classifier, fallback_names: what Muon and its kin move as AdamW beside all vectors: the
    classifier, and weights by their dotted names or patterns of them (timm's fallback_list).

    Raises ValueError for an optimizer or a field that timm does not have, a value of another type,
    a number left out, a fallback of an optimizer that has none.
    """

    name: Literal["timm"] = "timm"
    waits_under_fp16: ClassVar[bool] = True
    decay_follows_rate: ClassVar[bool] = True
    optimizer: str
    fields: dict[str, Any] = {}
    fallback_classifier: bool = False
    fallback_names: tuple[str, ...] = ()
    example: ClassVar[dict[str, Any]] = {
        "optimizer": "lion", "fields": {"betas": (0.9, 0.99)}, "weight_decay": 1.0,
    }  # fmt: skip

    @model_validator(mode="after")
    def _fields_are_timms(self) -> Self:
        timm_optimizer.check_fields(self.optimizer, self.fields)
        if (self.fallback_classifier or self.fallback_names) and not timm_optimizer.has_fallback(
            self.optimizer
        ):
            raise ValueError(f"timm's {self.optimizer} has one rule: leave the fallback out")
        return self

    def by_fallback(self, model: nn.Module) -> set[int]:
        found = named_weights(model, self.fallback_names, "fallback_names")
        if self.fallback_classifier:
            found |= {id(weight) for weight in head_of(model, "fallback_classifier").parameters()}
        return found

    def build(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        return _resumable(timm_optimizer.build(self.optimizer, groups, lr, self.fields))


def _with_momentum(optimizer):
    if optimizer.nesterov and not optimizer.momentum:
        raise ValueError("nesterov stands with momentum 0: leave it out, or give a momentum")
    return optimizer


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
