"""The `task` of a recipe: what is learned from the images. The tasks themselves stand above, in
trainer.tasks; here is what recipes, data and models ask of them.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from trainer.base.component import Component, registered, tag_of
from trainer.base.errors import PlanError
from trainer.base.scores import CLASSIFICATION

if TYPE_CHECKING:  # torch takes seconds, which a table need not wait for
    from torch import Tensor, nn

    from trainer.tasks.base import Task


class Moved(NamedTuple):
    """How the images of a micro-batch were cut and mirrored: targets with places are moved alike.

    boxes: [b, 4] int64, (top, left, height, width) in px of the whole image; each was resized to
    image_px x image_px. Where the task takes_padding, a box may reach out of its image.
    is_flipped: [b] bool, left and right have changed places after that.
    """

    boxes: np.ndarray
    is_flipped: np.ndarray
    image_px: int


class Batches(Protocol):
    """Batches by number: (images [B, C, H, W] uint8, targets [B, ...]), or a BadImage."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class TaskSection(Component):
    """One task, with the fields that its recipes have.

    scores: names of the percentages of an evaluation, as in metrics.jsonl and rows; the first is
    the main score. is_counted: it is a share of the images, each right or wrong. takes_padding: its
    targets know of places outside an image, so that crops may reach there. ignores_places: its
    targets say nothing of places, so that augmentations may move pixels after the crop. is_timms:
    its model is the one that timm builds, with timm's classifier, and a teacher's answers are those
    of such a one too. answers_with_pictures: `predict`
    writes pictures (see Task.predict), not the names of classes. gives_maps: its model gives scores
    [B, K, H, W], of each pixel's classes, which can be exported. hub_tag: the Hugging Face Hub's
    name of the task.
    """

    kind: ClassVar[str] = "task"
    defined_in: ClassVar[str] = "trainer.tasks"
    scores: ClassVar[tuple[str, ...]]
    is_counted: ClassVar[bool] = False
    takes_padding: ClassVar[bool] = False
    ignores_places: ClassVar[bool] = True
    is_timms: ClassVar[bool] = True
    answers_with_pictures: ClassVar[bool] = False
    gives_maps: ClassVar[bool] = False
    hub_tag: ClassVar[str] = "image-classification"

    @abstractmethod
    def bound(self, plan, settings) -> Task:
        """The task as the engine asks it, for a plan and a run's settings."""

    @abstractmethod
    def targets(self, images, places: np.ndarray, moved: Moved) -> Tensor:
        """The targets of a micro-batch, one for each image along the first dimension: of the set
        `images` those at `places` [b], moved as the images were. Raises BadImage.
        """

    @abstractmethod
    def evaluation_stream(self, images, plan, batch_images: int, test_px: int) -> Batches:
        """Batches (images [B, C, H, W] uint8, targets [B, ...]) by number, every image of the set
        once, in order; BadImage in place of a batch with one that is bad.
        """

    def evaluation_px(self, image) -> tuple[int, str]:
        """The shorter side of what the model is shown in an evaluation, and the key that sets it.
        image: the recipe's section.
        """
        return image.test_px, "image.test_px"

    def model_options(self) -> dict[str, Any]:
        """Arguments of timm for the body of its model, by timm's names."""
        return {}

    def model_of(self, plan, body: nn.Module) -> nn.Module:
        """The model of a plan around a timm model with the recipe's parts, initialized or with its
        weights loaded. Draws from torch's global generator.
        """
        return body

    def check_data(self, profile) -> None:
        """Do the data of a profile have targets of this task? Raises PlanError."""
        of_data = profile.task or CLASSIFICATION
        if of_data != self.name:
            raise PlanError(
                f"task {self.name}: the data {profile.name} are for {of_data}",
                f"use a recipe for {of_data}, or other data",
            )


def scores_of_tasks() -> list[str]:
    """The names of all tasks' scores."""
    return [name for one in _tasks() for name in one.scores]


@functools.cache
def default_task() -> TaskSection:
    """Of a recipe that names none."""
    return next(one for one in _tasks() if tag_of(one) == CLASSIFICATION)()


def _tasks() -> list[type[TaskSection]]:
    return [one for one in registered(TaskSection) if issubclass(one, TaskSection)]
