"""The batches of an evaluation: every image once, in order, preprocessed as in timm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.components.crops import CropMode
from trainer.components.task import Batches
from trainer.data.datasets.builtin import ImageSet
from trainer.data.decode import BadImage, Planes, evaluation_square, stack_squares
from trainer.data.transforms import fill_of
from trainer.data.workers import Started, Watch, items_of, whole


@dataclass(frozen=True)
class EvaluationStream:
    """The evaluation batches of a pass by number: every image once, in order, none padded.

    crop_mode, fill: as of evaluation_square. A bad image stops the evaluation whatever the run's
    bad_images: a score over fewer images is another score.
    """

    image_set: ImageSet
    test_px: int
    test_crop_share: float
    interpolation: str
    batch_images: int
    crop_mode: CropMode = "center"
    fill: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return -(-self.image_set.num_images // self.batch_images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | BadImage:
        first = number * self.batch_images
        places = range(first, min(first + self.batch_images, self.image_set.num_images))
        try:
            squares = [self._square(i) for i in places]
        except BadImage as error:
            return never_skipped(error)
        labels = self.image_set.labels[places.start : places.stop].astype(np.int64)
        images = _channels_first(stack_squares(squares, self.test_px), self.image_set.num_channels)
        return images, torch.from_numpy(labels)

    def _square(self, i: int) -> bytes:
        return evaluation_square(
            self.image_set.read(i), self.test_px, self.test_crop_share, self.interpolation,
            self.crop_mode, self.fill,
        )  # fmt: skip


def whole_images(
    images: ImageSet,
    plan,
    batch_images: int,
    test_px: int,
    kind: type[EvaluationStream] = EvaluationStream,
) -> EvaluationStream:
    """The batches of a set as a plan's recipe shows it in evaluations."""
    image = plan.recipe.image
    return kind(
        images,
        test_px=test_px,
        test_crop_share=image.test_crop_share,
        interpolation=image.test_interpolation,
        batch_images=batch_images,
        crop_mode=image.test_crop_mode or "center",
        fill=fill_of(plan.profile),
    )


def whole_image(image: Image.Image | Planes, plan) -> Tensor:
    """One image [1, C, px, px] uint8, shown so."""
    sides, px = plan.recipe.image, plan.recipe.image.test_px
    square = evaluation_square(
        image, px, sides.test_crop_share, sides.test_interpolation,
        sides.test_crop_mode or "center", fill_of(plan.profile),
    )  # fmt: skip
    return _channels_first(stack_squares([square], px), plan.profile.channels)


def never_skipped(error: BadImage) -> BadImage:
    """The error of a validation image, with the rule that holds for it."""
    rule = "no setting skips a validation image"
    return error.raised_as(BadImage, hint=f"{error.hint}: {rule}" if error.hint else rule)


def evaluation_batches(
    stream: Batches,
    workers: int | Started,
    device: str,
    rank: int = 0,
    num_ranks: int = 1,
    watch: Watch = Watch(),
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, C, H, W] uint8, targets [B, ...]) of one pass; pinned where the device is a
    GPU. workers: as of items_of.

    A rank gets every num_ranks-th batch from the rank-th on: a batch is the same however many ranks
    share them.

    Raises BadImage, DataTrouble, and what watch.check raises.
    """
    return whole(items_of(stream, range(rank, len(stream), num_ranks), workers, device, watch))


def _channels_first(pixels: np.ndarray, num_channels: int) -> Tensor:
    """[B, H, W, 1 or num_channels] to [B, num_channels, H, W]: grey is repeated."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return images.expand(-1, num_channels, -1, -1).contiguous()
