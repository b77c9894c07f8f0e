"""One class for each image: soft targets, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainer.base.devices import sum_dtype
from trainer.components.mixing import UnitMixes, one_hot_targets
from trainer.components.task import Moved, TaskSection
from trainer.data.datasets.builtin import ImageSet
from trainer.data.evaluation import EvaluationStream, whole_images
from trainer.data.loader import MicroBatch, labels_of
from trainer.data.profile import majority_pct
from trainer.data.transforms import autocast, model_inputs, scored_inputs
from trainer.tasks.base import Scores, Shown, Task, count_of
from trainer.tasks.constant import bias_only_loss
from trainer.tasks.views import viewed

_PIXELS_AT_ONCE = 128 * 112**2  # that a CPU scores: a whole batch of evaluation up to 112 px
_LEAST_IMAGES = 16


@dataclass(frozen=True)
class ClassificationScores(Scores):
    """Counts over one pass; the percentages follow from them.

    num_top1, num_top5: images whose class is the first, or among the first five scores (all, with
    fewer classes). loss_nats: the recipe's loss against unsmoothed targets, mean over images; with
    image.test_flip, of the sum of both halves' logits.
    """

    num_top1: int
    num_top5: int

    @property
    def top1_pct(self) -> float:
        """Of the images, those whose class has the highest logit, in percent."""
        return 100 * self.num_top1 / self.num_images

    @property
    def top5_pct(self) -> float:
        """Of the images, those whose class is among the five highest logits, in percent."""
        return 100 * self.num_top5 / self.num_images

    def percentages(self) -> dict[str, float]:
        return {"top1_pct": self.top1_pct, "top5_pct": self.top5_pct}

    def counts(self) -> dict[str, int]:
        return {"num_top1": self.num_top1, "num_top5": self.num_top5, "num_images": self.num_images}

    def summary(self) -> str:
        return (
            f"top-1 {self.top1_pct:.2f} %  top-5 {self.top5_pct:.2f} %  loss {self.loss_nats:.4f}"
        )


class _OfFewClasses(ClassificationScores):
    """Of five classes or fewer: all images are among the first five, which says nothing."""

    def told(self) -> dict[str, float]:
        return {"top1_pct": self.top1_pct}

    def summary(self) -> str:
        return f"top-1 {self.top1_pct:.2f} %  loss {self.loss_nats:.4f}"


@dataclass(frozen=True)
class Classification(Task):
    """Soft targets [B, K] float32: one-hot, smoothed by the recipe's `smoothing`, mixed by its
    `mix`.
    """

    num_sums = 3  # images with the right class first, among the first five, and their losses

    def prepare(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(images [B, C, H, W] float, targets [B, K] float32), mixed by the units of the recipe.

        With augment_splits S the images are [S * B, C, H, W], split after split: the first as it
        came, the others augmented; the targets stay [B, K].
        """
        mixes = self._mixes(batch)
        images = model_inputs(self.plan, self.settings, batch, mixes)
        targets = self.targets(batch.labels.to(self.settings.device, non_blocking=True))
        return images, targets if mixes is None else mixes.of_targets(targets)

    def _mixes(self, batch: MicroBatch) -> UnitMixes | None:
        plan, address = self.plan, (batch.step, batch.micro_batch)
        mixing = plan.recipe.mix
        if mixing is None:
            return None
        units, own = plan.mixing_units(*address), None
        rows = np.arange(len(batch.labels))
        if batch.num_parts > 1:
            part, numbers = plan.part_rows(*address, batch.part, batch.num_parts), list(units)
            units = {numbers[place]: rows for place, rows in part.units.items()}
            own, rows = part.own if part.has_more else None, np.array(part.rows)
        places, epoch = rows // plan.recipe.units_together, batch.step // plan.steps_per_epoch
        image_px = batch.images.shape[-1]
        drawn = mixing.drawn(plan.seed, batch.step, units, image_px, places, epoch)
        return UnitMixes(mixing, drawn, len(batch.labels), own)

    def targets(self, labels: Tensor) -> Tensor:
        """Smoothed, unmixed targets [B, K] of labels [B] int64."""
        return one_hot_targets(labels, self.plan.profile.num_classes, self.plan.recipe.smoothing)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The recipe's loss of float32 logits; with a teacher, together with the distance from its
        answers, which a model with two heads learns with the second.
        """
        recipe = self.plan.recipe
        with autocast(self.settings):
            # first: the teacher's activations are gone before the student's are kept
            answers = None if self.teacher is None else self.teacher(inputs)
            made = model(inputs)
        logits, of_teacher = made if isinstance(made, tuple) else (made, made)
        loss = self.plan.loss(logits.float(), targets)
        if recipe.distill is None or answers is None:
            return loss
        return recipe.distill(loss, of_teacher.float(), answers.float())

    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        return self.loss(model, inputs, self.targets(labels))

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Sums over a batch: right at the first, right among the first five, the loss against
        unsmoothed targets.
        """
        recipe, device = self.plan.recipe, self.settings.device
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        images = scored_inputs(images, self.plan.profile, self.settings)
        is_mirrored, translate_px = recipe.image.test_flip, recipe.image.test_translate_px
        with autocast(self.settings):
            logits = viewed(partial(_scored, model), images, is_mirrored, translate_px)
        if is_mirrored:
            logits = 2 * logits
        first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = self.plan.loss(logits, one_hot_targets(labels, logits.shape[1], 0.0))
        sums = torch.stack([first[:, 0].sum(), first.sum(), loss * len(labels)])
        return sums.to(sum_dtype(device))

    def scores(self, sums: Sequence[float], num_images: int) -> ClassificationScores:
        num_top1, num_top5, loss_sum = sums
        kind = ClassificationScores if self.plan.profile.num_classes > 5 else _OfFewClasses
        return kind(num_images, loss_sum / num_images, int(num_top1), int(num_top5))

    def restored(self, record: Mapping[str, float]) -> ClassificationScores:
        counts = [count_of(record, name) for name in ("num_top1", "num_top5", "num_images")]
        if counts != sorted(counts):
            raise ValueError(f"counts {counts}")
        num_top1, num_top5, num_images = counts
        kind = ClassificationScores if self.plan.profile.num_classes > 5 else _OfFewClasses
        return kind(num_images, record["loss_nats"], num_top1, num_top5)

    def blank_targets(self, num_images: int, device: str) -> Tensor:
        return torch.empty(num_images, self.plan.profile.num_classes, device=device)

    def constant_loss(self, images: ImageSet, is_mixed: bool = True) -> float:
        return bias_only_loss(self.plan, images.labels, is_mixed)

    def majority_pct(self, train: ImageSet, val: ImageSet) -> float | None:
        return majority_pct(train.labels, val.labels)

    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Each image with its mixed targets, [n, K] float in [0, 1]."""
        pairs = zip(pictures, targets, strict=False)
        return [Shown(picture, _target_text(target, classes)) for picture, target in pairs]


def _target_text(target: Tensor, classes: Sequence[str]) -> str:
    """The two heaviest classes of a target, above what smoothing gives to every class."""
    floor = float(target.min()) + 1e-3
    values, places = target.topk(min(2, len(target)))
    parts = [
        f"{classes[int(place)][:12]} {float(value):.2f}"
        for value, place in zip(values, places, strict=False)
        if float(value) > floor
    ]
    return "\n".join(parts)


class ClassificationSection(TaskSection):
    """One class for each image; what a recipe without a `task` is for."""

    name: Literal["classification"] = "classification"
    scores: ClassVar[tuple[str, ...]] = ("top1_pct", "top5_pct")
    is_counted: ClassVar[bool] = True

    def bound(self, plan: Any, settings: Any) -> Task:
        return Classification(plan, settings)

    def targets(self, images: ImageSet, places: np.ndarray, moved: Moved) -> Tensor:
        """[b] int64."""
        return labels_of(images, places, moved)

    def evaluation_stream(
        self, images: ImageSet, plan: Any, batch_images: int, test_px: int
    ) -> EvaluationStream:
        return whole_images(images, plan, batch_images, test_px)


def _scored(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a batch in evaluation mode, where an image's do not depend on the others.

    A CPU takes large images in pieces: a whole batch of them takes several times a training step's
    memory. Even pieces of at least _LEAST_IMAGES, for which it chooses the whole batch's algorithms
    of convolution: the same bits on all that was tried.
    """
    if images.device.type != "cpu":
        return model(images)
    most = max(1, _PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    number = min(-(-len(images) // most), len(images) // _LEAST_IMAGES)
    if number < 2:
        return model(images)
    return torch.cat([model(piece) for piece in images.tensor_split(number)])
