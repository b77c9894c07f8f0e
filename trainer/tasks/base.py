"""What the engine, runs and their readers ask of a task, so that they know no classes, no targets
and no kind of score. What recipes, data and models ask is in components/task.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor, nn

from trainer.base.settings import Settings
from trainer.data.datasets.builtin import ImageSet
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
        """What is drawn as curves, by names that end in _pct: those of the section's `scores`, the
        main score first.
        """

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """The numbers that the percentages are made of, num_images among them."""

    @abstractmethod
    def summary(self) -> str:
        """The scores in a few words for a line of the log."""

    @property
    def main_pct(self) -> float:
        """What runs are compared by."""
        return next(iter(self.percentages().values()))

    def told(self) -> dict[str, float]:
        """Those of the percentages that say something."""
        return self.percentages()

    def of_classes(self) -> tuple[float | None, ...]:
        """A score of each class in percent, None where the pass had none of it; empty where a task
        has no such scores.
        """
        return ()

    def record(self) -> dict[str, float]:
        """All of it as numbers by name: what a checkpoint keeps, and `Task.restored` reads."""
        return {"num_images": self.num_images, "loss_nats": self.loss_nats, **self.counts()}


class Shown(NamedTuple):
    """One image with its target, for a reader. picture: [H, W, 3] float in [0, 1]."""

    picture: np.ndarray
    title: str


class Prediction(NamedTuple):
    """What `predict` writes of one image: pictures by what their names end in (".png"), one line
    about them, and what a program reads, one mapping of plain values for each thing found.
    """

    pictures: dict[str, Image.Image]
    line: str
    answers: tuple[dict[str, Any], ...] = ()


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
    def blank_targets(self, num_images: int, device: str) -> Tensor:
        """Targets without content, as `prepare` would give them for so many images of the training
        size.
        """

    @abstractmethod
    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """`loss` of unaugmented images [B, C, H, W] uint8 with the targets of training, unmixed."""

    @abstractmethod
    def constant_loss(self, images: ImageSet, is_mixed: bool = True) -> float:
        """The least loss that a prediction has which is the same for all images: the level from
        which a model begins to learn. is_mixed: with the recipe's mixing, as in training.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Sums over a batch of an evaluation, [N] float64 on the device; added up over batches they
        become `scores`. Counts, which are exact below 2**53 however batches are shared by ranks.
        """

    @property
    @abstractmethod
    def num_sums(self) -> int:
        """The N of `evaluate`."""

    @abstractmethod
    def scores(self, sums: Sequence[float], num_images: int) -> Scores:
        """The scores of a pass over num_images images, from the sums over all of its batches."""

    @abstractmethod
    def restored(self, record: Mapping[str, float]) -> Scores:
        """The scores of a `Scores.record`. Raises ValueError or KeyError for what no pass over any
        images gives.
        """

    def majority_pct(self, train: ImageSet, val: ImageSet) -> float | None:
        """The main score of always answering what training has most of; None where that is
        unknown.
        """
        return None

    def features(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What a model makes of images before its classifier: [B, D] of its inputs [B, C, H, W];
        of a timm model what its classifier sees.
        """
        of_timm: Any = model
        return of_timm.forward_head(of_timm.forward_features(inputs), pre_logits=True)

    @abstractmethod
    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Prepared images as a reader sees them. pictures: [n, H, W, 3] float in [0, 1], the inputs
        of the model. targets: theirs, on the CPU.
        """

    def predict(
        self, model: nn.Module, image: Image.Image, classes: Sequence[str]
    ) -> Prediction | None:
        """A trained model's answer to one image file, where answers are pictures (see
        TaskSection.answers_with_pictures).
        """
        return None


def count_of(record: Mapping[str, float], name: str) -> int:
    """A count of a record. Raises ValueError for what is none."""
    value = record[name]
    if value < 0 or value != int(value):
        raise ValueError(f"{name} is {value}")
    return int(value)
