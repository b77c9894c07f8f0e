"""Training micro-batches loaded by ffcv, with the same random draws as the torch loader.

Order, boxes, filters, flips and all augmentations come from the same functions; boxes are sampled
in the source's pixels, and scaled, rounded to whole pixels, where a .beton stores smaller images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from trainer.base import streams
from trainer.data.datasets.beton import BetonSet
from trainer.data.decode import BadImage
from trainer.data.ffcv import loader as ffcv_loader
from trainer.data.ffcv import resize as ffcv_resize
from trainer.data.loader import MicroBatch, TrainStream, boxes_in, shrunk
from trainer.data.parts import Parts, has_parts, in_micro_batches, part_keys
from trainer.data.threads import map_in_threads
from trainer.data.transforms import augmented
from trainer.data.workers import Started, Watch, whole
from trainer.recipe.plan import num_micro_batches_in

_NUM_REPLACEMENTS = 10  # as the torch loader's
_DECODING = 3  # one decoding thread per three that augment: decoding takes a third of the time


@dataclass(frozen=True)
class FfcvStream(TrainStream):
    """A TrainStream over a BetonSet that ffcv's threads read; num_workers counts them.

    If stage `pixels` is done here, num_workers threads augment, and a third as many decode.
    """

    image_set: BetonSet

    def batches(
        self,
        first_step: int,
        num_steps: int,
        workers: int | Started,
        device: str,
        watch: Watch = Watch(),
    ) -> Iterator[MicroBatch]:
        """All from first_step to the end of step num_steps - 1, in order; images pinned where the
        device is a GPU. workers: the number of threads.

        Raises BadImage, DataTrouble, and what watch.check raises.
        """
        assert isinstance(workers, int)  # no process makes its micro-batches
        num_workers = workers
        in_parts = has_parts(self)
        ids_of = Parts(self).ids_of if in_parts else self.ids_of
        items = ffcv_loader.batches(
            self.image_set.path,
            self.image_set.num_channels,
            self.train_px,
            self._largest_batch(),
            num_workers if self.fill is None else -(-num_workers // _DECODING),
            (part_keys if in_parts else type(self).keys)(self, first_step, num_steps),
            lambda key: self.rows(
                ids_of(key), ids_of(key)[:, 1], self.cropped_px(self.px_at(key[0]))
            ),
            lambda key, squares, codes: self._made(
                key, ids_of(key), squares, codes, "cpu" if in_parts else device
            ),
            device,
            watch.check,
        )
        batches = (
            in_micro_batches(self, items, first_step, num_steps, device, True)
            if in_parts
            else whole(items)
        )
        return (
            batches if self.fill is None else map_in_threads(self._augmented, batches, num_workers)
        )

    def _largest_batch(self) -> int:
        """Images of the largest micro-batch: those of an epoch's last step may be larger than those
        of a full step.
        """
        rest = self.image_set.num_images % self.batch_images
        last = (
            -(-rest // num_micro_batches_in(rest, self.batch_images, self.num_micro_batches))
            if rest
            else 0
        )
        return max(-(-self.batch_images // self.num_micro_batches), last)

    def rows(self, ids: np.ndarray, shown: np.ndarray, side: int) -> np.ndarray:
        """The rows for ffcv_loader: [b, len(ffcv_loader.COLUMNS)] int64. shown: the image of each
        draw, [b].
        """
        crop = next(part for part in self.augment if part.crops)
        boxes, is_bicubic = boxes_in(self.image_set, crop, self.seed, ids, shown)
        height, width = boxes[:, 2], boxes[:, 3]
        is_flipped = np.zeros(len(ids), bool)
        for part in self.augment:
            if part.flips:
                is_flipped ^= part.draw(self.seed, ids)
        is_down_first = ffcv_resize.goes_down_first(height, width, side)
        num_bytes = self.image_set.places["size"][shown]
        columns = (
            shown,
            num_bytes,
            *boxes.T,
            is_bicubic,
            is_down_first,
            is_flipped,
            np.full(len(ids), side),
        )
        return np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)

    def _made(
        self, key: tuple, ids: np.ndarray, squares: np.ndarray, codes: np.ndarray, device: str
    ) -> MicroBatch | BadImage:
        shown = ids[:, 1].copy()
        images = torch.empty(squares.shape, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
        images.copy_(torch.from_numpy(squares))
        is_suspect = (codes != 0) | self._is_damaged(shown)
        # TurboJPEG is stricter than PIL: an image that PIL decodes is not bad
        for place in np.flatnonzero(is_suspect):
            try:
                square, shown[place] = self._by_pil(ids[place : place + 1], squares.shape[-1])
            except BadImage as error:
                return error
            images[place] = torch.from_numpy(square)
        image_px = self.px_at(key[0])
        images = shrunk(images, image_px)
        labels = torch.from_numpy(self.image_set.labels[shown])
        drawn = self._drawn(ids, image_px)
        return MicroBatch(
            *key, images, labels, torch.from_numpy(ids), drawn, torch.from_numpy(shown),
            **self.parts(key[0]),
        )  # fmt: skip

    def _augmented(self, batch: MicroBatch) -> MicroBatch:
        return augmented(
            batch, self.augment, self.num_splits if self.num_splits > 1 else None, self.fill
        )

    @cached_property
    def _is_seen(self) -> np.ndarray:
        return np.zeros(self.image_set.num_images, bool)

    def _is_damaged(self, shown: np.ndarray) -> np.ndarray:
        """Which images have a wrong CRC-32, [b] bool; each is checked until it was right once."""
        is_damaged = np.zeros(len(shown), bool)
        for place in np.flatnonzero(~self._is_seen[shown]):
            try:
                self.image_set.content(int(shown[place]))
                self._is_seen[shown[place]] = True
            except BadImage:
                is_damaged[place] = True
        return is_damaged

    def _by_pil(self, draw: np.ndarray, side: int) -> tuple[np.ndarray, int]:
        """The square [C, side, side] of one draw, [1, 3], and its image: under "skip" a
        replacement for a bad one.

        Raises BadImage.
        """
        try:
            return self._square(draw, draw[:, 1], side), int(draw[0, 1])
        except BadImage as error:
            if self.bad_images == "fail":
                raise error.with_remedy("bad_images=skip in training") from None
            first_error = error
        for uniform in streams.uniforms(self.seed, "replacement", draw, _NUM_REPLACEMENTS)[0]:
            shown = np.array([int(uniform * self.image_set.num_images)])
            try:
                return self._square(draw, shown, side), int(shown[0])
            except BadImage:
                continue
        raise BadImage(f"{first_error}; {_NUM_REPLACEMENTS} sampled replacements are bad as well")

    def _square(self, draw: np.ndarray, shown: np.ndarray, side: int) -> np.ndarray:
        row = dict(zip(ffcv_loader.COLUMNS, self.rows(draw, shown, side)[0].tolist(), strict=True))
        right, low = row["left"] + row["width"], row["top"] + row["height"]
        image = self.image_set.read(row["image"]).crop((row["left"], row["top"], right, low))
        filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
        pixels = np.asarray(image.resize((side, side), filters[row["is_bicubic"]]))
        pixels = pixels[:, ::-1] if row["is_flipped"] else pixels
        return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
