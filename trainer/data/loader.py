"""Training micro-batches in order, from any step on: the same bytes for any number of workers.

One set of processes serves the whole run. A micro-batch is a pure function of its key, (step,
micro-batch), and each image in it of its draw (epoch, image, repeat): so images of different
micro-batches can be loaded together (see `parts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.base import streams
from trainer.components.augmentation import Augmentation, Crop
from trainer.components.sampling import Sampling
from trainer.components.task import Moved
from trainer.data.datasets.beton import BetonSet
from trainer.data.datasets.builtin import ImageSet, with_full_decoding
from trainer.data.decode import RESAMPLING, BadImage, Pixels, train_square
from trainer.data.jpeg import Jpeg
from trainer.data.order import Sampled, micro_batch_ids, window
from trainer.data.parts import Parts, has_parts, in_micro_batches, part_keys
from trainer.data.transforms import augmented
from trainer.data.workers import Started, Watch, items_of, whole
from trainer.recipe.assignment import WHOLE, Assignment
from trainer.recipe.plan import num_micro_batches_in
from trainer.recipe.sections import Growth

_NUM_REPLACEMENTS = 10
# Decoded but not yet cropped: bounds a worker's memory; crops are sampled for so many at once.
_IMAGES_AT_ONCE = 64


class MicroBatch(NamedTuple):
    """One statistics sample of a step, or a part of it, as it comes from the loader.

    images: [b, C, px, px] uint8, cropped and flipped. labels: their targets, one each along the
    first dimension; of classification [b] int64. ids: [b, 3] int64 =
    (epoch, image, repeat). drawn: sampled parameters by name, [b, ...], of each augmentation of
    stage `pixels`, then of stage `normalized`; with S splits [(S - 1) * b, ...], split after split,
    since the first is not augmented. shown: [b] int64, the images actually loaded: different from
    ids where an image replaces a bad one, whose draws it takes over. is_augmented: stage `pixels`
    is done and its parameters are dropped; with splits the images are [S * b, ...], see
    `augmented`. part, num_parts: of a micro-batch that several ranks share, see `PartRows`.
    """

    step: int
    micro_batch: int
    images: Tensor
    labels: Tensor
    ids: Tensor
    drawn: tuple[dict[str, Tensor], ...]
    shown: Tensor
    is_augmented: bool = False
    part: int = 0
    num_parts: int = 1

    @property
    def num_replaced(self) -> int:
        """Bad images replaced by others."""
        return int((self.shown != self.ids[:, 1]).sum())


def labels_of(images: ImageSet, places: np.ndarray, moved: Moved) -> Tensor:
    """The targets of whole images, [b] int64: their classes, however they were moved."""
    return torch.from_numpy(images.labels[places].astype(np.int64))


@dataclass(frozen=True)
class TrainStream:
    """The training micro-batches of a run by key: stream[step, micro_batch].

    repeats: 1 shows every image once an epoch. num_micro_batches: of a full step. bad_images:
    "fail" or "skip". growth: smaller images than train_px in early steps; the
    draws are the same. num_splits: 1 for none. fill: the fill color of stage `pixels`, if that is
    done here; None leaves it to `inputs_of`. assigned: this rank's images of each step. targets: of
    images at places of the set, moved as they were: see TaskSection.targets. sampling: how often
    each class is shown, over so many epochs; None shows each image alike.

    Under "fail" a bad image is returned as its BadImage: raised in a worker, it would arrive as a
    traceback.
    """

    image_set: ImageSet
    seed: int
    augment: tuple[Augmentation, ...]
    train_px: int
    repeats: int
    batch_images: int
    num_micro_batches: int
    steps_per_epoch: int
    drop_last: bool
    bad_images: str
    growth: Growth | None = None
    num_splits: int = 1
    fill: tuple[int, ...] | None = None
    assigned: Assignment = WHOLE
    targets: Callable[[ImageSet, np.ndarray, Moved], Tensor] = labels_of
    sampling: Sampling | None = None
    epochs: int = 1

    @property
    def sampled(self) -> Sampled | None:
        """What the epochs show, where not each image alike."""
        if self.sampling is None:
            return None
        labels, num_each = self.image_set.labels, self.repeats * self.num_splits
        return Sampled(self.sampling, labels, self.epochs, num_each)

    @property
    def shares_repeats(self) -> bool:
        """Decode an image once for all its repeats in a step, where possible? Uncompressed pixels
        need no decoding.
        """
        return not (isinstance(self.image_set, BetonSet) and self.image_set.facts.jpeg_share == 0)

    def batches(
        self,
        first_step: int,
        num_steps: int,
        workers: int | Started,
        device: str,
        watch: Watch = Watch(),
    ) -> Iterator[MicroBatch]:
        """All from first_step to the end of step num_steps - 1, in order; images pinned where the
        device is a GPU. workers: as of items_of; those that were started make items of `source`.

        Raises BadImage, DataTrouble, and what watch.check raises.
        """
        if has_parts(self):
            keys = part_keys(self, first_step, num_steps)
            parts = items_of(self.source(), keys, workers, "cpu", watch)
            return in_micro_batches(self, parts, first_step, num_steps, device, workers != 0)
        keys = self.keys(first_step, num_steps)
        return whole(items_of(self.source(), keys, workers, device, watch))

    def source(self) -> TrainStream | Parts:
        """What loader processes make items of."""
        return Parts(self) if has_parts(self) else self

    def keys(self, first_step: int, num_steps: int) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) from first_step up to the end of step num_steps - 1."""
        for step in range(first_step, num_steps):
            for micro_batch in self.assigned.micro_batches(*self.window(step)):
                yield step, micro_batch

    def window(self, step: int) -> tuple[int, int]:
        """(draws, micro-batches) of a step over all ranks."""
        _, _, num_draws = window(
            step, self.image_set.num_images, self.batch_images, self.steps_per_epoch
        )
        number = num_micro_batches_in(num_draws, self.batch_images, self.num_micro_batches)
        return num_draws, number

    def parts(self, step: int) -> dict[str, int]:
        """The part of a step's micro-batches that is this rank's, as MicroBatch names it."""
        num_parts = self.assigned.parts_in(*self.window(step))
        return {"part": self.assigned.part, "num_parts": num_parts} if num_parts > 1 else {}

    def px_at(self, step: int) -> int:
        """The side of a step's images."""
        return (
            self.growth.px_at(step, self.steps_per_epoch, self.train_px)
            if self.growth
            else self.train_px
        )

    def cropped_px(self, image_px: int) -> int:
        """The side that crops are resized to where the model sees image_px."""
        return self.growth.cropped_px(image_px, self.train_px) if self.growth else image_px

    def __getitem__(self, key: tuple[int, int]) -> MicroBatch | BadImage:
        return self.made(*key, self.ids_of(key))

    def ids_of(self, key: tuple[int, int]) -> np.ndarray:
        """This rank's draws of one micro-batch: ids [b, 3] int64 = (epoch, image, repeat)."""
        ids = micro_batch_ids(
            self.seed,
            *key,
            self.image_set.num_images,
            self.repeats,
            self.batch_images,
            self.num_micro_batches,
            self.steps_per_epoch,
            self.drop_last,
            self.sampled,
        )
        return ids[list(self.assigned.rows(len(ids)).rows)] if self.parts(key[0]) else ids

    def made(self, step: int, number: int, ids: np.ndarray) -> MicroBatch | BadImage:
        """The draws ids [b, 3] of a step, loaded as its micro-batch `number`."""
        image_px = self.px_at(step)
        try:
            images, shown, moved = self._images(ids, self.cropped_px(image_px))
            labels = self.targets(self.image_set, shown, moved)
        except BadImage as error:
            return error
        images = shrunk(images, image_px)
        drawn, shown = self._drawn(ids, image_px), torch.from_numpy(shown)
        batch = MicroBatch(
            step, number, images, labels, torch.from_numpy(ids), drawn, shown, **self.parts(step)
        )
        if self.fill is None:
            return batch
        return augmented(
            batch, self.augment, self.num_splits if self.num_splits > 1 else None, self.fill
        )

    def _images(self, ids: np.ndarray, image_px: int) -> tuple[Tensor, np.ndarray, Moved]:
        """[b, C, px, px] uint8 cropped and flipped, which images of the set they show [b], and how
        they were moved.
        """
        canvas = np.empty((len(ids), self.image_set.num_channels, image_px, image_px), np.uint8)
        shown, boxes = np.empty(len(ids), np.int64), np.empty((len(ids), 4), np.int64)
        flips = [part.draw(self.seed, ids) for part in self.augment if part.flips]
        is_flipped = np.logical_xor.reduce(flips) if flips else np.zeros(len(ids), bool)
        for i, (square, place, box) in enumerate(self._squares(ids, image_px)):
            # a grey square [1, px, px] fills all channels
            canvas[i] = square[:, :, ::-1] if is_flipped[i] else square
            shown[i], boxes[i] = place, box
        return torch.from_numpy(canvas), shown, Moved(boxes, is_flipped, image_px)

    def _squares(self, ids: np.ndarray, image_px: int) -> Iterator[tuple[np.ndarray, int, list]]:
        """The cropped image [C or 1, px, px] of each draw, its place in the set, and its box."""
        for start in range(0, len(ids), _IMAGES_AT_ONCE):
            chunk = ids[start : start + _IMAGES_AT_ONCE]
            images, places = zip(*self._reads(chunk), strict=True)
            draws = zip(chunk, images, places, *self._crops(chunk, images, places), strict=True)
            for _, repeats in itertools.groupby(draws, key=lambda draw: id(draw[1])):
                yield from self._squares_of(list(repeats), image_px)

    def _squares_of(
        self, repeats: list[tuple], image_px: int
    ) -> Iterator[tuple[np.ndarray, int, list]]:
        """The same for one image's repeats: (draw, image, place, box, filter) each. Decoded once
        where possible.
        """
        image = repeats[0][1]
        if isinstance(image, Jpeg):
            image = image.decoded_for([tuple(crop) for _, _, _, *crop in repeats], image_px)
        for draw, _, place, *crop in repeats:
            if not isinstance(image, Jpeg | Pixels):
                yield train_square(image, *crop, image_px), place, crop[0]
                continue
            try:
                yield image.square(*crop, image_px), place, crop[0]
            except BadImage:  # damaged after its header: read it again, as a bad image
                yield from replace(self, image_set=with_full_decoding(self.image_set))._squares(
                    draw[None], image_px
                )

    def _crops(self, ids: np.ndarray, images: tuple, places: tuple) -> tuple[list, list]:
        """The box and the filter of each image."""
        crop = next(part for part in self.augment if part.crops)
        if isinstance(self.image_set, BetonSet):
            boxes, is_bicubic = boxes_in(self.image_set, crop, self.seed, ids, np.array(places))
        else:
            widths, heights = np.array([image.size for image in images]).T
            boxes, is_bicubic = crop.draw(self.seed, ids, heights, widths)
        bilinear = "bilinear" if crop.antialias else "bilinear_no_antialias"
        return boxes.tolist(), [
            RESAMPLING["bicubic" if bicubic else bilinear] for bicubic in is_bicubic
        ]

    def _reads(self, ids: np.ndarray) -> Iterator[tuple[Image.Image, int]]:
        """_read of each draw; a repeat of the draw before it is not read again."""
        found, place = None, -1
        for draw in ids:
            if draw[1] != place or not self.shares_repeats:
                found, place = self._read(draw)
            yield found, place

    def _read(self, draw: np.ndarray) -> tuple[Image.Image, int]:
        """The image of one draw and its place in the set; under "skip" a bad one is replaced
        by another.

        The candidates depend on seed and draw alone, so every run uses the same replacement.
        """
        sample = int(draw[1])
        try:
            return self.image_set.read(sample), sample
        except BadImage as error:
            if self.bad_images == "fail":
                raise error.with_remedy("bad_images=skip in training") from None
            first_error = error
        for uniform in streams.uniforms(self.seed, "replacement", draw[None], _NUM_REPLACEMENTS)[0]:
            sample = int(uniform * self.image_set.num_images)
            try:
                return self.image_set.read(sample), sample
            except BadImage:
                continue
        raise BadImage(f"{first_error}; {_NUM_REPLACEMENTS} sampled replacements are bad as well")

    def _drawn(self, ids: np.ndarray, image_px: int) -> tuple[dict[str, Tensor], ...]:
        if self.num_splits > 1:  # a split has the draws of a further repeat
            ids = np.concatenate(
                [np.add(ids, [0, 0, self.repeats * split]) for split in range(1, self.num_splits)]
            )
        later = [
            part
            for stage in ("pixels", "normalized")
            for part in self.augment
            if part.stage == stage
        ]
        drawn = (part.draw(self.seed, ids, image_px, self.image_set.num_channels) for part in later)
        return tuple(
            {name: torch.from_numpy(values) for name, values in each.items()} for each in drawn
        )


def shrunk(images: Tensor, image_px: int) -> Tensor:
    """Images [B, C, px, px] with rows and columns left out, down to image_px: row i is row
    floor(i * px / image_px) of before, torch's and composer's "nearest".
    """
    if images.shape[-1] == image_px:
        return images
    kept = torch.arange(image_px) * images.shape[-1] // image_px
    return images[:, :, kept[:, None], kept]


def boxes_in(
    images: BetonSet, crop: Crop, seed: int, ids: np.ndarray, shown: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The box of each draw [b, 4] int64, and whether its resize is bicubic [b] bool: drawn in the
    source's pixels; where an image is stored smaller, scaled and rounded to whole pixels.

    ids: [b, 3]. shown: the image of each draw, [b].
    """
    source, stored = (
        np.stack(sides) for sides in (images.source_sides(shown), images.sides(shown))
    )
    drawn, is_bicubic = crop.draw(seed, ids, *source)
    first = drawn[:, :2].T
    last = first + drawn[:, 2:].T
    first, last = (np.rint(edge * stored / source).astype(np.int64) for edge in (first, last))
    first = np.minimum(first, stored - 1)
    return np.concatenate([first, np.maximum(last - first, 1)]).T, is_bicubic
