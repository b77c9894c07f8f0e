"""What a trained model, the teacher, adds to a loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trainer.base.component import Component, Positive
from trainer.base.errors import PlanError


class Distillation(Component):
    """How a model, the student, learns from the answers of a trained one beside the labels: by
    (1 - share) of the recipe's loss and `share` of its distance from the teacher.

    The teacher sees the student's own images, augmented and mixed, in evaluation mode. A student
    with a head for it (timm's `set_distilled_training`: deit_*_distilled_*, levit_*) learns the
    labels with its first head and the teacher with its second, and answers by the mean of both; any
    other learns both with its one.

    share: of the distance in the loss, alpha in the sources. teacher: timm's name of the model; it
    has the data's classes. weights: its weights, in the forms of `model.pretrained.file`, or
    `run:<name>` for those of a run; sha256: of the file's bytes, in hex. A recipe without the two
    is given them by a run (set="distill.weights=..."). Where the file lies is no part of a recipe's
    digest, its sha256 is, worked out where it is not written.
    """

    kind: ClassVar[str] = "distillation"
    share: Annotated[float, Field(gt=0, le=1)]
    teacher: Annotated[str, Field(min_length=1)]
    weights: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def check(self, plan) -> None:
        task = plan.recipe.of_task
        if not task.is_timms:
            raise PlanError(
                f"distill: a teacher answers with classes of images, not for task {task.name}",
                "leave distill out",
                path=("distill",),
            )

    def __call__(self, loss: Tensor, logits: Tensor, answers: Tensor) -> Tensor:
        """The loss to train with, a scalar in nats, from the recipe's own and the logits [B, K]
        float32 of student and teacher.
        """
        return (1 - self.share) * loss + self.share * self.distance(logits, answers)

    @abstractmethod
    def distance(self, logits: Tensor, answers: Tensor) -> Tensor:
        """How far the student's logits [B, K] float32 are from the teacher's: a scalar, in nats."""


class HardDistillation(Distillation):
    """The teacher's first class is the label: cross-entropy, mean over images.

    Source: Touvron et al. 2020, arXiv:2012.12877, equation 3; facebookresearch/deit, losses.py.
    """

    name: Literal["hard"] = "hard"
    example: ClassVar[dict[str, Any]] = {"share": 0.5, "teacher": "regnety_160"}

    def distance(self, logits: Tensor, answers: Tensor) -> Tensor:
        return functional.cross_entropy(logits, answers.argmax(dim=1))


class SoftDistillation(Distillation):
    """The Kullback-Leibler divergence of the student's softmax from the teacher's, both of logits
    divided by a temperature, times the temperature squared; mean over images and, as in DeiT's
    code, over classes.

    sum_classes: the sum over classes in place of their mean, K times as large, as in the paper's
    divergence and in timm.

    Source: Hinton et al. 2015, arXiv:1503.02531; facebookresearch/deit, losses.py.
    """

    name: Literal["soft"] = "soft"
    temperature: Positive
    sum_classes: bool = False
    example: ClassVar[dict[str, Any]] = {
        "share": 0.1, "teacher": "regnety_160", "temperature": 3.0
    }  # fmt: skip

    def distance(self, logits: Tensor, answers: Tensor) -> Tensor:
        own, theirs = (
            (one / self.temperature).log_softmax(dim=1) for one in (logits, answers.to(logits))
        )
        divergence = functional.kl_div(own, theirs, reduction="sum", log_target=True)
        number = len(logits) if self.sum_classes else logits.numel()
        return divergence * (self.temperature**2 / number)
