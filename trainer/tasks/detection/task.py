"""Boxes of some classes in each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from trainer.base.devices import sum_dtype
from trainer.base.errors import PlanError, UserError
from trainer.base.settings import Settings
from trainer.components.losses import ImageLoss
from trainer.components.task import Moved, TaskSection
from trainer.data.loader import MicroBatch
from trainer.data.transforms import autocast, model_inputs, scored_inputs
from trainer.recipe.plan import Plan
from trainer.recipe.schema import Recipe
from trainer.tasks.base import Prediction, Scores, Shown, Task, count_of
from trainer.tasks.constant import lowest_constant_loss
from trainer.tasks.detection.boxes import (
    BoxEvaluation,
    BoxSet,
    padded,
    training_targets,
    whole_square,
)
from trainer.tasks.detection.detector import NO_CLASS, Detector
from trainer.tasks.detection.retinanet import RetinaNet
from trainer.tasks.detection.score import COLUMNS, check_pycocotools, matched, mean_precision

_IMAGES_AT_ONCE = 8  # that are scored: a batch of an evaluation has many, and their maps are large
_PIXELS_AT_ONCE = 2**24  # that are loaded: 48 MiB
_SHOWN_ABOVE = 0.3  # scores of the boxes in a picture
_CONSTANT_IMAGES = 256  # enough for a level to begin at
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


@dataclass(frozen=True)
class DetectionScores(Scores):
    """COCO's, in percent: see coco_score.MeanPrecision. loss_nats: of the validation images with
    the targets of training.
    """

    map_pct: float
    map50_pct: float
    class_pct: tuple[float | None, ...]

    def percentages(self) -> dict[str, float]:
        return {"map_pct": self.map_pct, "map50_pct": self.map50_pct}

    def counts(self) -> dict[str, int]:
        return {"num_images": self.num_images}

    def of_classes(self) -> tuple[float | None, ...]:
        return self.class_pct

    def record(self) -> dict[str, float]:
        of_classes = {
            f"class_{label}_pct": value
            for label, value in enumerate(self.class_pct)
            if value is not None
        }
        return super().record() | self.percentages() | of_classes

    def summary(self) -> str:
        return f"mAP {self.map_pct:.2f} %  mAP@50 {self.map50_pct:.2f} %  loss {self.loss_nats:.4f}"


@dataclass(frozen=True)
class Detection(Task):
    """Targets [B, M, 5] float32: (left, top, right, bottom) in px of the input, and the class."""

    @property
    def section(self) -> DetectionSection:
        """The recipe's section `task`."""
        section = self.plan.recipe.of_task
        assert isinstance(section, DetectionSection), "it made this"
        return section

    @property
    def detector(self) -> Detector:
        """The component that builds the model and has its loss."""
        return self.section.detector

    @property
    def _loss(self) -> ImageLoss:
        return self.plan.recipe.loss.of_image

    def prepare(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        images = model_inputs(self.plan, self.settings, batch)
        return images, batch.labels.to(self.settings.device, non_blocking=True)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The detector's, of float32 outputs."""
        with autocast(self.settings):
            outputs = model(inputs)
        return self.detector.loss(outputs.float(), targets, inputs.shape[-1], self._loss)

    def blank_targets(self, num_images: int, device: str) -> Tensor:
        return torch.full((num_images, 1, 5), float(NO_CLASS), device=device)

    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        return self.loss(model, inputs, as_trained(labels).to(inputs.device))

    def constant_loss(self, images: Any, is_mixed: bool = True) -> float:
        """Of the first images, whole, in the recipe's own size."""
        px, number = self.plan.recipe.image.train_px, min(images.num_images, _CONSTANT_IMAGES)
        rows = []
        for place in range(number):
            boxes = images.read_target(place)
            size = images.read(place).size
            kept, scale = ~boxes.is_crowd, px / max(size)
            rows.append(np.c_[boxes.sides[kept] * scale, boxes.labels[kept]])
        targets = torch.from_numpy(padded(rows, 5))
        parts = self.detector.constant_parts(targets, px, self.plan.profile.num_classes)
        return sum(
            part.num_asked * lowest_constant_loss(self._loss, part.shares) + part.box_loss
            for part in parts
        )

    @property
    def num_sums(self) -> int:
        """The loss; the boxes of each class; and for each image its best answers, matched."""
        profile = self.plan.profile
        return 1 + profile.num_classes + profile.num_val * self.detector.most_found * COLUMNS

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Each image has places of its own among the sums, which no other one adds to: so they are
        the same however images are shared by batches and ranks.
        """
        sums = np.zeros(self.num_sums)
        num_classes = self.plan.profile.num_classes
        of_images = sums[1 + num_classes :].reshape(self.plan.profile.num_val, -1, COLUMNS)
        parts = zip(images.split(_IMAGES_AT_ONCE), labels.split(_IMAGES_AT_ONCE), strict=True)
        for pixels, targets in parts:
            losses, found = self._answers(model, pixels, targets)
            sums[0] += losses
            for answers, (about, *rows) in zip(found, targets.double().numpy(), strict=True):
                boxes = np.array(rows)[[row[4] >= 0 for row in rows]].reshape(-1, 6)
                is_crowd, own = boxes[:, 5] > 0, boxes[:, 4].astype(int)
                answers[:, :4] *= about[3]
                of_images[int(about[0])] = matched(answers, boxes[:, :4], own, is_crowd)
                sums[1 : 1 + num_classes] += np.bincount(own[~is_crowd], minlength=num_classes)
        device = self.settings.device
        return torch.from_numpy(sums).to(sum_dtype(device)).to(device)

    def _answers(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[float, np.ndarray]:
        """The sum of the losses of some images [b, C, px, px] uint8, and what is found in them
        [b, D, 6] float64, in px of the input.
        """
        device, px = self.settings.device, images.shape[-1]
        images = scored_inputs(
            images.to(device, non_blocking=True), self.plan.profile, self.settings
        )
        with autocast(self.settings):
            outputs = model(images)
        outputs, about = outputs.float(), targets[:, 0]
        loss = self.detector.loss(outputs, as_trained(targets).to(device), px, self._loss)
        seen_px = about[:, 1:3] / about[:, 3:4]
        found = self.detector.found(outputs, px, seen_px)
        return loss.item() * len(images), found.double().cpu().numpy()

    def scores(self, sums: Sequence[float], num_images: int) -> DetectionScores:
        num_classes = self.plan.profile.num_classes
        found = np.array(sums[1 + num_classes :]).reshape(-1, COLUMNS)
        score = mean_precision(found, np.array(sums[1 : 1 + num_classes]))
        return DetectionScores(num_images, sums[0] / num_images, *score)

    def restored(self, record: Mapping[str, float]) -> DetectionScores:
        mean, at_half = record["map_pct"], record["map50_pct"]
        of_classes = tuple(
            record.get(f"class_{label}_pct") for label in range(self.plan.profile.num_classes)
        )
        known = [value for value in (mean, at_half, *of_classes) if value is not None]
        if not all(0 <= value <= 100 for value in known):
            raise ValueError(f"scores {known}")
        num_images = count_of(record, "num_images")
        return DetectionScores(num_images, record["loss_nats"], mean, at_half, of_classes)

    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Each image with its boxes."""
        made = []
        for picture, rows in zip(pictures, targets, strict=False):
            rows = rows[rows[:, 4] >= 0]
            image = Image.fromarray((picture * 255).round().astype(np.uint8))
            labels = [(row[:4], int(row[4]), "") for row in rows.tolist()]
            drawn = np.asarray(with_boxes(image, labels, classes)) / 255
            made.append(Shown(drawn, f"{len(rows)} boxes"))
        return made

    @torch.no_grad()
    def predict(
        self, model: nn.Module, image: Image.Image, classes: Sequence[str]
    ) -> Prediction | None:
        """The picture with its boxes, and the boxes."""
        facts, profile = self.plan.recipe.image, self.plan.profile
        px = facts.test_px
        pixels = torch.empty(1, profile.channels, px, px, dtype=torch.uint8)
        pixels[0] = torch.from_numpy(whole_square(image, px, facts.test_interpolation).copy())
        scale = max(image.size) / px
        inputs = scored_inputs(pixels.to(self.settings.device), profile, self.settings)
        with autocast(self.settings):
            outputs = model(inputs)
        seen_px = torch.tensor([image.size]) / scale
        found = self.detector.found(outputs.float(), px, seen_px)[0].double().cpu().numpy()
        rows = found[found[:, 5] >= 0]
        rows[:, :4] *= scale
        shown = [
            (row[:4].tolist(), int(row[5]), f" {row[4]:.2f}")
            for row in rows
            if row[4] >= _SHOWN_ABOVE
        ]
        answers = tuple(
            {
                "class": classes[int(row[5])],
                "score": round(float(row[4]), 4),
                "box": [round(side, 2) for side in row[:4].tolist()],
            }
            for row in rows
        )
        line = f"{len(shown)} boxes of {_SHOWN_ABOVE:g} or more" + _per_class(shown, classes)
        return Prediction({".png": with_boxes(image, shown, classes)}, line, answers)


def _per_class(shown: Sequence[tuple], classes: Sequence[str]) -> str:
    labels = [label for _, label, _ in shown]
    counts = [f"{labels.count(label)} {classes[label]}" for label in sorted(set(labels))]
    return f": {', '.join(counts)}" if counts else ""


def with_boxes(
    image: Image.Image, boxes: Sequence[tuple[Sequence[float], int, str]], classes: Sequence[str]
) -> Image.Image:
    """A picture with boxes (sides in px, class, what stands behind its name) drawn on it."""
    made = image.convert("RGB")
    pen, width = ImageDraw.Draw(made), max(2, round(max(image.size) / 250))
    for sides, label, more in reversed(boxes):  # the best ones on top
        color = _COLORS[label % len(_COLORS)]
        pen.rectangle(tuple(sides), outline=color, width=width)
        at = sides[0] + width, max(0, sides[1] - 11)
        text = f"{classes[label]}{more}"
        pen.rectangle(pen.textbbox(at, text), fill="white")
        pen.text(at, text, fill=color)
    return made


def as_trained(labels: Tensor) -> Tensor:
    """The targets of training [B, M, 5] of those of an evaluation: see BoxEvaluation."""
    rows = labels[:, 1:].clone()
    rows[:, :, :4] /= labels[:, :1, 3:4]
    rows[:, :, 4][rows[:, :, 5] > 0] = NO_CLASS
    return rows[:, :, :5].float()


class DetectionSection(TaskSection):
    """Boxes of the classes in each image.

    detector: what finds them. An image is shown whole in a square of image.test_px, padded, and
    scored by COCO's mean average precision.
    """

    name: Literal["detection"] = "detection"
    detector: Detector
    scores: ClassVar[tuple[str, ...]] = ("map_pct", "map50_pct")
    takes_padding: ClassVar[bool] = True
    ignores_places: ClassVar[bool] = False
    is_timms: ClassVar[bool] = False
    answers_with_pictures: ClassVar[bool] = True
    hub_tag: ClassVar[str] = "object-detection"
    example: ClassVar[dict[str, Any]] = {"detector": {"name": "retinanet", **RetinaNet.example}}

    def bound(self, plan: Plan, settings: Settings) -> Task:
        return Detection(plan, settings)

    def targets(self, images: BoxSet, places: np.ndarray, moved: Moved) -> Tensor:
        return torch.from_numpy(training_targets(images, places, moved))

    def evaluation_stream(
        self, images: BoxSet, plan: Plan, batch_images: int, test_px: int
    ) -> BoxEvaluation:
        most = max(1, _PIXELS_AT_ONCE // test_px**2)
        interpolation = plan.recipe.image.test_interpolation
        return BoxEvaluation(images, test_px, interpolation, min(batch_images, most))

    def model_of(self, plan: Plan, body: nn.Module) -> nn.Module:
        return self.detector.build(body, plan.profile.num_classes)

    def check(self, plan: Plan) -> None:
        recipe, image = plan.recipe, plan.recipe.image
        for path in _refused(recipe):
            raise PlanError(
                f"{path}: not with task detection, whose targets are boxes",
                f'use set="{path}=null"',
                fix={path: None},
            )
        if not recipe.loss.of_image.asks_each_class or recipe.loss.compares_splits:
            raise PlanError(
                f"loss {recipe.loss.name}: an anchor may have no class, which it cannot answer",
                'use set="loss={name: focal, gamma: 2.0, alpha: 0.25, sum_classes: true}", or bce',
                path=("loss",),
            )
        if image.test_crop_share != 1 or image.test_flip:
            raise PlanError(
                "image: task detection is scored on whole images, each seen once",
                'use set="image.test_crop_share=1.0 image.test_flip=false"',
                fix={"image.test_crop_share": 1.0, "image.test_flip": False},
            )
        sides = {"train_px": image.train_px, "test_px": image.test_px}
        sides |= {"growth.multiple_px": image.growth.multiple_px} if image.growth else {}
        for key, side in sides.items():
            self.detector.check_side(key, side)

    def check_settings(self, plan: Plan, settings: Settings) -> None:
        check_pycocotools()
        for test_px in settings.test_px:
            self.detector.check_side("test_px", test_px)
        if settings.loader != "torch":
            raise UserError(f"loader={settings.loader}: reads no boxes", "use loader=torch")
        if settings.cuda_graphs:
            raise UserError(
                "cuda_graphs=1: there are other numbers of boxes in every step",
                "use cuda_graphs=0",
            )


def _refused(recipe: Recipe) -> list[str]:
    """The keys of a recipe that are on and mean whole images, or would leave boxes behind."""
    start = recipe.model.start if recipe.model else None
    growth = recipe.image.growth
    are_on = {
        "mix": recipe.mix,
        "smoothing": recipe.smoothing,
        "repeats": recipe.repeats,
        "augment_splits": recipe.augment_splits,
        "image.growth.shrink": growth and growth.shrink,
        "image.test_crop_mode": recipe.image.test_crop_mode,
        # counted by an anchor's own class: those without one would not count at all
        "loss.class_weights": getattr(recipe.loss, "class_weights", None),
        "loss.class_weighting": getattr(recipe.loss, "class_weighting", None),
        "model.head_init_scale": recipe.model and recipe.model.head_init_scale,
        "model.start.head_std": start and start.head_std is not None,
        "model.start.head_bias": start and start.head_bias is not None,
    }
    moving = [one for one in recipe.augment if one.stage != "decode" and not one.keeps_places]
    return [path for path, is_on in are_on.items() if is_on] + [
        f"augment.{one.name}" for one in moving
    ]
