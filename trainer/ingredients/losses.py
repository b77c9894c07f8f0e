"""How far the answers are from the targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trainer.ingredients.base import Ingredient


class BinaryCrossEntropy(Ingredient):
    """One independent yes/no question per class.

    Called with the logits and the soft targets of one micro-batch:
        logits   [B, K] float, unnormalized scores
        targets  [B, K] float in [0, 1], after mixing and smoothing
    gives a scalar in the targets' dtype, the mean over images of the mean over classes, in nats.

    threshold: targets above it count as 1, the others as 0; None keeps them soft.
    sum_classes: the sum over classes in place of their mean, K times as large.

    Source: Wightman et al. 2021, arXiv:2110.00476.
    """

    name: Literal["bce"] = "bce"
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    sum_classes: bool = False

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [B, K] to a scalar, in nats."""
        if self.threshold is not None:
            targets = targets.gt(self.threshold).to(targets.dtype)
        # Half-precision logits are widened first: the sum over thousands of classes would lose them.
        loss = functional.binary_cross_entropy_with_logits(logits.to(targets.dtype), targets)
        return loss * targets.shape[1] if self.sum_classes else loss


class CrossEntropy(Ingredient):
    """One question with K answers: the softmax of the scores against the target's shares.

    Called with the logits and the soft targets of one micro-batch:
        logits   [B, K] float, unnormalized scores
        targets  [B, K] float in [0, 1], rows summing to 1, after mixing and smoothing
    gives a scalar in the targets' dtype, the mean over images, in nats.

    Source: Szegedy et al. 2015, arXiv:1512.00567 (soft targets).
    """

    name: Literal["ce"] = "ce"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch: logits and targets [B, K] to a scalar, in nats."""
        return functional.cross_entropy(logits.to(targets.dtype), targets)


Loss = Annotated[BinaryCrossEntropy | CrossEntropy, Field(discriminator="name")]
