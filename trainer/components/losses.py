"""How far the answers are from the targets."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from trainer.base.component import Component, NonNegative, Positive
from trainer.base.errors import PlanError
from trainer.components.class_weighting import ClassWeighting

InnerShare = Annotated[float, Field(gt=0, lt=1)]
ClassWeights = Annotated[tuple[Positive, ...], Field(min_length=2)]


class Loss(Component):
    """How far answers are from targets.

    compares_splits: it is given several answers to each image, one for each of a recipe's
    augment_splits. takes_numbers: its targets may be any numbers, not shares alone.
    """

    kind: ClassVar[str] = "loss"
    compares_splits: ClassVar[bool] = False
    takes_numbers: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [B, K] to a scalar, in nats."""

    @property
    @abstractmethod
    def of_image(self) -> ImageLoss:
        """The part that the answer to a single image can be wrong for."""

    @property
    def needs_counts(self) -> bool:
        """Does it depend on how many training images the classes have?"""
        return False

    def for_counts(self, counts: np.ndarray) -> Self:
        """The same loss of classes that have so many training images, [K]."""
        return self


class ImageLoss(Loss):
    """A loss of one answer an image; most are, and derive from this.

    asks_each_class: each logit answers for itself, so that no class at all is an answer too.
    """

    kind: ClassVar[str] = "loss"
    asks_each_class: ClassVar[bool] = False

    @property
    @abstractmethod
    def is_linear(self) -> bool:
        """Is it linear in its targets, once they have passed `target_threshold`? Then their mean
        is enough.
        """

    @property
    def of_image(self) -> Self:
        return self

    @property
    def target_threshold(self) -> float | None:
        """Targets above it count as 1, the others as 0; None keeps them soft."""
        return None

    def without_threshold(self) -> Self:
        """The same loss of soft targets."""
        return self

    def best_logits(self, shares: Tensor) -> Tensor:
        """About the best constant logits for the mean targets [K] in (0, 1): a search for them
        starts there.
        """
        return shares.logit()


class _Weighted(ImageLoss):
    """What the losses share in which classes may count differently.

    class_weights: [K], in the order of the classes' names. class_weighting: a rule that makes them
    of the number of training images of each class.

    Raises ValueError where both are there.
    """

    class_weights: ClassWeights | None = None
    class_weighting: ClassWeighting | None = None

    @model_validator(mode="after")
    def _weighted_once(self) -> Self:
        if self.class_weights is not None and self.class_weighting is not None:
            raise ValueError("class_weights and class_weighting are both there: keep one of them")
        return self

    @property
    def needs_counts(self) -> bool:
        return self.class_weighting is not None

    def for_counts(self, counts: np.ndarray) -> Self:
        if self.class_weighting is None:
            return self
        weights = self.class_weighting.weights(counts)
        return self.model_copy(update={"class_weights": weights, "class_weighting": None})

    def check(self, plan) -> None:
        weights, num_classes = self.class_weights, plan.profile.num_classes
        if weights is not None and len(weights) != num_classes:
            raise PlanError(
                f"loss.class_weights: {len(weights)} weights for {num_classes} classes",
                "write one for each class, in the order of their names",
                path=("loss", "class_weights"),
            )

    def weights_like(self, targets: Tensor) -> Tensor | None:
        """The weights [K] as the targets are; None where all classes count the same."""
        assert self.class_weighting is None, "Plan.loss has the weights of its rule"
        if self.class_weights is None:
            return None
        return _copied(self.class_weights, targets.dtype, targets.device)


@functools.cache
def _copied(weights: ClassWeights, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once: a copy in every step would make the host wait for a GPU."""
    return torch.tensor(weights, dtype=dtype, device=device)


class _PerClass(ImageLoss):
    """What the losses share that ask one independent yes/no question per class: see
    BinaryCrossEntropy.
    """

    is_linear: ClassVar[bool] = True
    asks_each_class: ClassVar[bool] = True
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    sum_classes: bool = False

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [B, K] to a scalar, in nats."""
        if self.threshold is not None:
            targets = targets.gt(self.threshold).to(targets.dtype)
        # Half-precision logits are widened first: the sum over thousands of classes would lose
        # them.
        loss = self._mean(logits.to(targets.dtype), targets)
        return loss * targets.shape[1] if self.sum_classes else loss

    @property
    def target_threshold(self) -> float | None:
        return self.threshold

    def without_threshold(self) -> Self:
        return self.model_copy(update={"threshold": None})

    @abstractmethod
    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over images and classes, a scalar."""


class BinaryCrossEntropy(_Weighted, _PerClass):
    """One independent yes/no question per class.

    Called with the logits and the soft targets of one micro-batch:
        logits   [B, K] float, unnormalized scores
        targets  [B, K] float in [0, 1], after mixing and smoothing
    gives a scalar in the targets' dtype, the mean over images of the mean over classes, in nats.

    threshold: targets above it count as 1, the others as 0; None keeps them soft.
    sum_classes: the sum over classes in place of their mean, K times as large.
    class_weights: [K], what a yes of each class counts, a no counting 1 (torch's pos_weight).
    class_weighting: a rule that makes them of the training images.

    Source: Wightman et al. 2021, arXiv:2110.00476.
    """

    name: Literal["bce"] = "bce"
    example: ClassVar[dict[str, Any]] = {}

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.weights_like(targets)
        return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)

    def best_logits(self, shares: Tensor) -> Tensor:
        if self.class_weights is None:
            return shares.logit()
        return shares.logit() + shares.new_tensor(self.class_weights).log()


class FocalLoss(_Weighted, _PerClass):
    """Yes/no questions that count for less the surer the right answer is.

    With p the sigmoid of a logit, "yes" costs alpha * (1 - p)**gamma * -log(p) and "no" costs
    (1 - alpha) * p**gamma * -log(1 - p). A soft target t is t of a yes and 1 - t of a no, as in
    binary cross-entropy, so that the loss is linear in it; at 0 and 1 it is the paper's, and with
    gamma 0 and no alpha it is `bce`.

    gamma: how fast sure answers lose weight, at least 0.
    alpha: the weight of a yes, in (0, 1), a no weighing 1 - alpha; None weighs both with 1.
    threshold, sum_classes: as of `bce`. Summed over classes, one class an image, it is the paper's
        normalization by the number of positives.
    class_weights: [K], what all of an image's yes and no count, by its class; of an image that is
        of several, the sum of its shares of them. class_weighting: a rule that makes them of the
        training images.

    Sources: Lin et al. 2017, arXiv:1708.02002; Cui et al. 2019, arXiv:1901.05555 (class weights).
    """

    name: Literal["focal"] = "focal"
    gamma: NonNegative
    alpha: InnerShare | None = None
    example: ClassVar[dict[str, Any]] = {"gamma": 2.0, "alpha": 0.25}

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_yes, log_no = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        of_yes, of_no = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        # The power is taken of a logarithm: where the sigmoid is 0 the gradient then is a number
        # for any gamma.
        yes = of_yes * targets * (self.gamma * log_no).exp() * log_yes
        no = of_no * (1 - targets) * (self.gamma * log_yes).exp() * log_no
        weights = self.weights_like(targets)
        if weights is not None:
            return -((yes + no) * (targets @ weights)[:, None]).mean()
        return -(yes + no).mean()

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        return self.class_weights is None and self.class_weighting is None


class AsymmetricLoss(_PerClass):
    """Yes/no questions in which a sure "no" loses its weight faster than a sure "yes".

    With p the sigmoid of a logit and q = max(p - clip, 0), "yes" costs (1 - p)**gamma_positive *
    -log(p) and "no" costs q**gamma_negative * -log(1 - q). A soft target t is t of a yes and 1 - t
    of a no.

    gamma_positive, gamma_negative: at least 0.
    clip: a "no" that is surer than this, in probability, costs nothing; None shifts nothing.
    threshold, sum_classes: as of `bce`; the paper sums over classes.

    Source: Ridnik et al. 2020, arXiv:2009.14119.
    """

    name: Literal["asymmetric"] = "asymmetric"
    gamma_negative: NonNegative
    gamma_positive: NonNegative
    clip: InnerShare | None = None
    example: ClassVar[dict[str, Any]] = {"gamma_negative": 4.0, "gamma_positive": 1.0, "clip": 0.05}

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_yes, log_no = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        yes = targets * (self.gamma_positive * log_no).exp() * log_yes
        weight, log_rest = (self.gamma_negative * log_yes).exp(), log_no
        if self.clip is not None:
            # A power of exactly 0 would have no gradient where it is cut off.
            shifted = (log_yes.exp() - self.clip).clamp(min=torch.finfo(logits.dtype).tiny)
            weight, log_rest = shifted**self.gamma_negative, torch.log1p(-shifted)
        return -(yes + (1 - targets) * weight * log_rest).mean()


class CrossEntropy(_Weighted):
    """One question with K answers: the softmax of the scores against the target's shares.

    Called with the logits and the soft targets of one micro-batch:
        logits   [B, K] float, unnormalized scores
        targets  [B, K] float in [0, 1], rows summing to 1, after mixing and smoothing
    gives a scalar in the targets' dtype, the mean over images, in nats.

    class_weights: [K], what the share of each class in the targets counts. The mean is over images,
    whatever they count (torch's weight= of soft targets; that of labels divides by the sum).
    class_weighting: a rule that makes them of the training images.

    Source: Szegedy et al. 2015, arXiv:1512.00567 (soft targets).
    """

    name: Literal["ce"] = "ce"
    is_linear: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [B, K] to a scalar, in nats."""
        weights = self.weights_like(targets)
        return functional.cross_entropy(logits.to(targets.dtype), targets, weight=weights)

    def best_logits(self, shares: Tensor) -> Tensor:
        if self.class_weights is not None:
            shares = shares * shares.new_tensor(self.class_weights)
        return shares.log()


class SquaredError(ImageLoss):
    """The squared difference of answers and targets.

    Called with the answers and the targets of one micro-batch:
        logits   [N, K] float
        targets  [N, K] float, any numbers
    gives a scalar in the targets' dtype, the mean over rows of the mean over K.

    Source: He et al. 2021, arXiv:2111.06377, of pixels; Hui and Belkin 2020, arXiv:2006.07322, of
    classes, whose rescaled form for many classes this is not.
    """

    name: Literal["mse"] = "mse"
    is_linear: ClassVar[bool] = False
    takes_numbers: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [N, K] to a scalar."""
        return functional.mse_loss(logits.to(targets.dtype), targets)

    def best_logits(self, shares: Tensor) -> Tensor:
        return shares.clone()


class Dice(ImageLoss):
    """How little the predicted shares of each class overlap with the targets, of all rows at once.

    Called with the logits and the soft targets of one micro-batch, of pixels where the task is
    segmentation:
        logits   [N, K] float, unnormalized scores
        targets  [N, K] float in [0, 1], rows summing to 1
    gives a scalar in the targets' dtype: 1 minus the mean over classes of 2 * sum(p * t) / (sum(p)
    + sum(t)), p the softmax of the logits; plus `loss`, where there is one, in nats.

    smooth: added to both sides of the fraction, so that a class that is nowhere counts as met.
    loss: of the same logits and targets; absent, the overlap alone.

    Source: Milletari et al. 2016, arXiv:1606.04797, whose denominator has squares; without them as
    in MONAI and segmentation_models.pytorch.
    """

    name: Literal["dice"] = "dice"
    is_linear: ClassVar[bool] = False
    smooth: Positive
    loss: ImageLoss | None = None
    example: ClassVar[dict[str, Any]] = {"smooth": 1.0, "loss": {"name": "ce"}}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [N, K] to a scalar."""
        shares = logits.to(targets.dtype).softmax(1)
        overlap = 2 * (shares * targets).sum(0) + self.smooth
        dice = 1 - (overlap / (shares.sum(0) + targets.sum(0) + self.smooth)).mean()
        return dice if self.loss is None else dice + self.loss(logits, targets)


class JensenShannon(Loss):
    """A loss of the plain images, and how much the answers differ between splits that are augmented
    differently.

    Called with the logits of all splits, the plain one first, and the soft targets of the images:
        logits   [S * B, K] float: image b of split s stands at s * B + b
        targets  [B, K] float in [0, 1], after smoothing
    gives a scalar in the targets' dtype: `loss` of the first split, plus `weight` times the
    Jensen-Shannon divergence between the S softmax distributions of an image, mean over images, in
    nats. Softmax it is whatever `loss` is. For one split, as in an evaluation, the divergence is 0.

    Source: Hendrycks et al. 2019, arXiv:1912.02781; the mixture is kept from 0 at 1e-7, as in its
    code and timm's.
    """

    name: Literal["jensen_shannon"] = "jensen_shannon"
    weight: Positive
    loss: ImageLoss
    compares_splits: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"weight": 12.0, "loss": {"name": "ce"}}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits [S * B, K] and targets [B, K] to a scalar, in
        nats.
        """
        splits = logits.to(targets.dtype).unflatten(0, (-1, len(targets)))
        loss = self.loss(splits[0], targets)
        return loss if len(splits) == 1 else loss + self.weight * self._divergence(splits)

    @property
    def of_image(self) -> ImageLoss:
        return self.loss

    @property
    def needs_counts(self) -> bool:
        return self.loss.needs_counts

    def for_counts(self, counts: np.ndarray) -> Self:
        return self.model_copy(update={"loss": self.loss.for_counts(counts)})

    @staticmethod
    def _divergence(splits: Tensor) -> Tensor:
        """[S, B, K] logits to a scalar: the mean over images of the mean over splits of KL(split |
        mixture).
        """
        log_shares = splits.log_softmax(dim=2)
        shares = log_shares.exp()
        log_mixture = shares.mean(dim=0).clamp(1e-7, 1).log()
        return (shares * (log_shares - log_mixture)).sum(dim=2).mean()
