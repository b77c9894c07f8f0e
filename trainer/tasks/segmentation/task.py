"""A class for each pixel: the pixels' loss, and scores that are counts of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.base.component import Positive
from trainer.base.devices import sum_dtype
from trainer.base.errors import PlanError, UserError
from trainer.components.mixing import one_hot_targets
from trainer.components.task import Moved, TaskSection
from trainer.data.loader import MicroBatch
from trainer.data.transforms import autocast, model_inputs, scored_inputs
from trainer.tasks.base import Prediction, Scores, Shown, Task, count_of
from trainer.tasks.constant import lowest_constant_loss
from trainer.tasks.segmentation.heads import Head, resized
from trainer.tasks.segmentation.masks import IGNORED, MaskedSet, MaskedStream, input_of, moved_masks
from trainer.tasks.segmentation.model import SegmentationModel, with_heads
from trainer.tasks.segmentation.windows import Windows, slid

_MOST_MASKS = 256  # looked at for the shares of the classes
_MOST_ROWS = 8192  # of targets, for a loss that has to be told each
_OPACITY = 0.55  # of a mask over its image


@dataclass(frozen=True)
class SegmentationScores(Scores):
    """Counts of pixels over one pass, ignored ones left out.

    right, expected, predicted: of each class [K], the pixels that are it and are called so, that
    are it, and that are called so. loss_nats: the recipe's loss of the main head against unsmoothed
    targets, mean over pixels.
    """

    right: tuple[int, ...]
    expected: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def num_pixels(self) -> int:
        """The pixels that count, over all images."""
        return sum(self.expected)

    def of_classes(self) -> tuple[float | None, ...]:
        """Intersection over union of each class in percent; None where no pixel is it, nor is
        called so.
        """
        unions = np.array(self.expected) + np.array(self.predicted) - np.array(self.right)
        pairs = zip(self.right, unions.tolist(), strict=True)
        return tuple(100 * right / union if union else None for right, union in pairs)

    def percentages(self) -> dict[str, float]:
        """mIoU: the mean over the classes that have one. Accuracy: of pixels."""
        found = [one for one in self.of_classes() if one is not None]
        mean = sum(found) / len(found) if found else 0.0
        accuracy = 100 * sum(self.right) / self.num_pixels if self.num_pixels else 0.0
        return {"mIoU_pct": mean, "pixel_accuracy_pct": accuracy}

    def counts(self) -> dict[str, int]:
        each = {"right": self.right, "expected": self.expected, "predicted": self.predicted}
        named = {
            f"num_{name}_{number}": count
            for name, counts in each.items()
            for number, count in enumerate(counts)
        }
        return named | {"num_images": self.num_images}

    def summary(self) -> str:
        mean, accuracy = self.percentages().values()
        return f"mIoU {mean:.2f} %  pixels {accuracy:.2f} %  loss {self.loss_nats:.4f}"


@dataclass(frozen=True)
class Segmentation(Task):
    """Targets [B, H, W] uint8: the class of each pixel, or IGNORED."""

    @property
    def _section(self) -> SegmentationSection:
        section = self.plan.recipe.task
        assert isinstance(section, SegmentationSection)
        return section

    @property
    def _num_classes(self) -> int:
        return self.plan.profile.num_classes

    def prepare(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(images [B, C, H, W] float, masks [B, H, W] uint8)."""
        images = model_inputs(self.plan, self.settings, batch)
        return images, batch.labels.to(self.settings.device, non_blocking=True)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The recipe's loss over the pixels of the micro-batch that are not ignored; the auxiliary
        head's is added, times its weight.
        """
        with autocast(self.settings):
            found = model(inputs)
        main, *rest = found if isinstance(found, tuple) else (found,)
        loss = self._of_pixels(main, targets, self.plan.recipe.smoothing)
        for logits in rest:
            aux = self._of_pixels(logits, targets, self.plan.recipe.smoothing)
            loss = loss + (self._section.aux_weight or 0.0) * aux
        return loss

    def _of_pixels(self, logits: Tensor, masks: Tensor, smoothing: float | None) -> Tensor:
        """The mean over pixels that are not ignored; 0 where all are."""
        is_scored = masks != IGNORED
        of_pixels = logits.float().movedim(1, -1)[is_scored]
        if not len(of_pixels):
            return logits.float().sum() * 0
        targets = one_hot_targets(masks[is_scored].long(), self._num_classes, smoothing or 0.0)
        return self.plan.loss(of_pixels, targets)

    def blank_targets(self, num_images: int, device: str) -> Tensor:
        side = self.plan.recipe.image.train_px
        return torch.zeros(num_images, side, side, dtype=torch.uint8, device=device)

    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        with autocast(self.settings):
            logits = model(inputs)
        logits = resized(logits.float(), labels.shape[-2:])
        return self._of_pixels(logits, labels, self.plan.recipe.smoothing)

    def constant_loss(self, images: Any, is_mixed: bool = True) -> float:
        """Of the shares of the classes among the pixels of up to 256 masks."""
        counts = self._pixels_of_classes(images)
        shares = counts / max(1, counts.sum())
        loss = self.plan.loss.of_image
        of_each = one_hot_targets(
            torch.arange(self._num_classes), self._num_classes, self.plan.recipe.smoothing
        ).double()
        if not loss.is_linear:
            rows = np.repeat(np.arange(self._num_classes), np.rint(shares * _MOST_ROWS).astype(int))
            return lowest_constant_loss(loss, of_each[torch.from_numpy(rows)])
        if loss.target_threshold is not None:
            of_each = of_each.gt(loss.target_threshold).double()
        return lowest_constant_loss(loss, torch.from_numpy(shares) @ of_each)

    def _pixels_of_classes(self, images: Any) -> np.ndarray:
        """In up to 256 masks from all over a set: [K] int64."""
        places = np.linspace(0, images.num_images - 1, min(_MOST_MASKS, images.num_images))
        counts = np.zeros(256, np.int64)
        for place in places.astype(np.int64):
            counts += np.bincount(images.read_target(int(place)).ravel(), minlength=256)
        return counts[: self._num_classes]

    def majority_pct(self, train: Any, val: Any) -> float | None:
        """Of one class for all pixels: its share of them, over the classes that there are."""
        most, counts = self._pixels_of_classes(train).argmax(), self._pixels_of_classes(val)
        number = np.count_nonzero(counts) + (not counts[most])
        return 100 * float(counts[most] / counts.sum() / number) if counts.any() else None

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The confusion of classes, row by row of the right ones, then the sum of the pixels'
        losses: [K * K + 1].
        """
        device, number = self.settings.device, self._num_classes
        images, masks = (part.to(device, non_blocking=True) for part in (images, labels))
        logits = self.scored(model, images, masks.shape[-2:])
        is_scored = masks != IGNORED
        right = masks[is_scored].long()
        called = logits.argmax(1)[is_scored]
        confusion = torch.bincount(right * number + called, minlength=number * number)
        dtype = sum_dtype(device)
        loss = self._of_pixels(logits, masks, None).to(dtype) * len(right)
        return torch.cat([confusion.to(dtype), loss[None]])

    def scored(self, model: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
        """Scores [B, K, *size] of whole images [B, C, h, w] uint8 on the device, with task.window
        from windows; with image.test_flip the sum with those of the mirrored images, or windows.
        """
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        windows, score = self._section.window, partial(self._logits, model)
        logits = score(inputs) if windows is None else slid(score, inputs, windows)
        return resized(logits, size)

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Scores [B, K, h, w] of normalized images, or windows of them [B, C, h, w]."""
        with autocast(self.settings):
            logits = model(inputs).float()
            if self.plan.recipe.image.test_flip:
                logits = logits + model(inputs.flip(3)).float().flip(3)
        return logits

    @property
    def num_sums(self) -> int:
        return self._num_classes**2 + 1

    def scores(self, sums: Sequence[float], num_images: int) -> SegmentationScores:
        confusion = np.array(sums[:-1]).reshape(self._num_classes, -1).astype(np.int64)
        right, expected = np.diag(confusion), confusion.sum(1)
        loss = float(sums[-1] / expected.sum()) if expected.any() else 0.0
        counts = (tuple(each.tolist()) for each in (right, expected, confusion.sum(0)))
        return SegmentationScores(num_images, loss, *counts)

    def restored(self, record: Mapping[str, float]) -> SegmentationScores:
        right, expected, predicted = (
            tuple(count_of(record, f"num_{name}_{n}") for n in range(self._num_classes))
            for name in ("right", "expected", "predicted")
        )
        is_within = all(map(lambda n, *most: n <= min(most), right, expected, predicted))
        if not is_within or sum(expected) != sum(predicted):
            raise ValueError("more pixels right than there are, or than are called so")
        num_images = count_of(record, "num_images")
        return SegmentationScores(num_images, record["loss_nats"], right, expected, predicted)

    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Each image under its mask in colours, with the names of its largest classes."""
        found = []
        for picture, mask in zip(pictures, targets.numpy(), strict=False):
            counts = np.bincount(mask.ravel(), minlength=256)[: len(classes)]
            largest = [place for place in np.argsort(-counts)[:2] if counts[place]]
            title = "\n".join(classes[place][:14] for place in largest)
            found.append(Shown(_overlaid(picture, mask), title))
        return found

    @torch.no_grad()
    def predict(
        self, model: nn.Module, image: Image.Image, classes: Sequence[str]
    ) -> Prediction | None:
        """The mask, a PNG of the classes' numbers with a palette, and the image under it."""
        sides = self.plan.recipe.image
        pixels = input_of(image, sides.test_px, sides.test_interpolation)
        logits = self.scored(model, pixels.to(self.settings.device), image.size[::-1])
        mask = logits.argmax(1)[0].to("cpu", torch.uint8).numpy()
        labels = Image.fromarray(mask)
        labels.putpalette((255 * _COLOURS).round().astype(np.uint8).tobytes())
        picture = np.asarray(image.convert("RGB"), np.float32) / 255
        over = Image.fromarray((255 * _overlaid(picture, mask)).round().astype(np.uint8))
        shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
        largest = [place for place in np.argsort(-shares)[:3] if shares[place]]
        line = ", ".join(f"{classes[place]} {shares[place]:.0%}" for place in largest)
        return Prediction({".png": labels, ".overlay.png": over}, line)


class SegmentationSection(TaskSection):
    """A class for each pixel.

    Data: images and masks (see masks.py). Training sees squares that scale_crop or another crop
    cuts, masks moved alike; an evaluation sees whole images, their shorter side resized to
    image.test_px, and is scored at their full size. The loss is over all pixels of a micro-batch
    that are not ignored, whatever loss the recipe has.

    head: on the backbone's feature maps. output_stride: of the last maps, where the model can
    dilate; absent, the model's own. aux_weight: of the loss of an FCN head on the maps before the
    last, in training alone; absent, there is none. window: an evaluation's images are scored by
    windows, not whole.
    """

    name: Literal["segmentation"] = "segmentation"
    head: Head
    output_stride: Literal[8, 16, 32] | None = None
    aux_weight: Positive | None = None
    window: Windows | None = None
    scores: ClassVar[tuple[str, ...]] = ("mIoU_pct", "pixel_accuracy_pct")
    takes_padding: ClassVar[bool] = True
    ignores_places: ClassVar[bool] = False
    is_timms: ClassVar[bool] = False
    answers_with_pictures: ClassVar[bool] = True
    gives_maps: ClassVar[bool] = True
    hub_tag: ClassVar[str] = "image-segmentation"
    example: ClassVar[dict[str, Any]] = {"head": {"name": "fcn", "dropout": 0.1}}

    def bound(self, plan: Any, settings: Any) -> Task:
        return Segmentation(plan, settings)

    def targets(self, images: MaskedSet, places: np.ndarray, moved: Moved) -> Tensor:
        """[b, px, px] uint8."""
        return moved_masks(images, places, moved)

    def evaluation_stream(
        self, images: MaskedSet, plan: Any, batch_images: int, test_px: int
    ) -> MaskedStream:
        return MaskedStream(images, test_px, plan.recipe.image.test_interpolation)

    def evaluation_px(self, image: Any) -> tuple[int, str]:
        whole = super().evaluation_px(image)
        return whole if self.window is None else (self.window.px, "task.window.px")

    def model_options(self) -> dict[str, Any]:
        return {} if self.output_stride is None else {"output_stride": self.output_stride}

    def model_of(self, plan: Any, body: nn.Module) -> SegmentationModel:
        has_aux = self.aux_weight is not None
        return with_heads(plan.model, body, self.head, plan.profile.num_classes, has_aux)

    def check(self, plan: Any) -> None:
        """Are there no keys that mean whole images?"""
        super().check(plan)
        recipe = plan.recipe
        moving = [
            part.name for part in recipe.augment if part.stage != "decode" and not part.keeps_places
        ]
        start = recipe.model.start if recipe.model else None
        growth = recipe.image.growth
        refused = {
            "mix": recipe.mix is not None,
            "augment_splits": recipe.augment_splits is not None,
            "distill": recipe.distill is not None,
            "sampling": recipe.sampling is not None,
            "image.test_crop_mode": recipe.image.test_crop_mode is not None,
            **{f"augment.{name}": True for name in moving},
            "image.growth.shrink": growth is not None and growth.shrink is not None,
            "model.head_init_scale": bool(recipe.model and recipe.model.head_init_scale),
            "model.start.head_std": start is not None and start.head_std is not None,
            "model.start.head_bias": start is not None and start.head_bias is not None,
        }
        for path, is_there in refused.items():
            if is_there:
                raise PlanError(
                    f"{path}: not with task segmentation, whose targets are pixels",
                    f'use set="{path}=null"',
                    fix={path: None},
                )
        if recipe.image.test_crop_share != 1:
            raise PlanError(
                "image.test_crop_share: task segmentation is scored on whole images",
                'use set="image.test_crop_share=1"',
                fix={"image.test_crop_share": 1.0},
            )

    def check_settings(self, plan: Any, settings: Any) -> None:
        if settings.loader != "torch":
            raise UserError(f"loader={settings.loader}: reads no masks", "use loader=torch")
        if settings.cuda_graphs:
            raise UserError(
                "cuda_graphs=1: the pixels that are not ignored are another number in every step",
                "use cuda_graphs=0",
            )


def _palette() -> np.ndarray:
    """Colours of the numbers 0 to 255, [256, 3] in [0, 1]: Pascal VOC's."""
    numbers, colours = np.arange(256), np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * bit + channel) & 1) << (7 - bit)
    return colours / 255


_COLOURS = _palette()


def _overlaid(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] in [0, 1] under the colours of a mask [H, W], but for ignored pixels."""
    over = (1 - _OPACITY) * picture + _OPACITY * _COLOURS[mask]
    return np.where((mask == IGNORED)[..., None], picture, over)
