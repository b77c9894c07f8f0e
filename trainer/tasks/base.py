"""What the engine asks of a task, so that it knows no classes, no targets and no kind of score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.base.settings import Settings
from trainer.data.loader import MicroBatch
from trainer.recipe.plan import Plan
from trainer.tasks.teacher import Teacher


@dataclass(frozen=True)
class Scores(ABC):
    """Exact results of one pass over an evaluation's images.

    num_images: of the pass. loss_nats: the mean over them; NaN or infinite where training has
    diverged.
    """

    num_images: int
    loss_nats: float

    @abstractmethod
    def percentages(self) -> dict[str, float]:
        """What is drawn as curves, by names that end in _pct."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """The numbers that the percentages are made of, by the names of their fields, each no
        larger than the next; the last is num_images.
        """

    @abstractmethod
    def summary(self) -> str:
        """The scores in a few words for a line of the log."""


@dataclass(frozen=True)
class Task(ABC):
    """A plan's targets, loss and score, computed with a run's settings.

    teacher: whose answers are learned beside the targets, on the device.

    Targets are a tensor with one entry for each sample along its first dimension, so that a
    micro-batch can be split.
    """

    plan: Plan
    settings: Settings
    teacher: Teacher | None = None

    @abstractmethod
    def prepare(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """A decoded micro-batch as training uses it: (inputs of the model, targets), both on the
        device.
        """

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The forward pass in the run's precision, and its loss: a scalar, the mean over samples,
        in nats.
        """

    @abstractmethod
    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """`loss` of unaugmented images [B, C, H, W] uint8 with the targets of training, unmixed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Sums over a batch of an evaluation, [N] float64 on the device; added up over batches they
        become `scores`.
        """

    @property
    @abstractmethod
    def num_sums(self) -> int:
        """The N of `evaluate`."""

    @abstractmethod
    def scores(self, sums: Sequence[float], num_images: int) -> Scores:
        """The scores of a pass over num_images images, from the sums over all of its batches."""
