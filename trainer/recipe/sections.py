"""The plain sections of a recipe: how many images, how large, and what was scored with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.base.component import NonNegative, Positive, StrictModel
from trainer.components.epochs import scaled_epochs

# The bounds only catch slips of the keyboard: no published run is near them.
NumImages = Annotated[int, Field(ge=1, le=1 << 20)]
Side = Annotated[int, Field(ge=8, le=2048)]
Percent = Annotated[float, Field(ge=0, le=100)]
Level = Annotated[float, Field(ge=0, le=1)]


class Batch(StrictModel):
    """How many images there are per optimizer step, and per sample of the normalization statistics.

    images: per step, over all ranks and micro-batches. norm_images: per micro-batch, which
    BatchNorm sees: science under BatchNorm, and also where a mix has no `images` of its own; `plan`
    says whether it is memory only. drop_last: an epoch's last, smaller step is left out.
    """

    images: NumImages
    norm_images: NumImages
    drop_last: bool = False


class Growth(StrictModel):
    """Training images that grow in the course of the run: from_px until from_epoch, train_px from
    to_epoch on.

    Between the two the side is on the straight line, rounded to the nearest multiple of multiple_px
    (halves to an even multiple, as NumPy). updated: "per_epoch" takes the epoch's number and keeps
    the size for all of it; "per_step" takes the share of the epoch that is over as well.
    shrink: "nearest" resizes a crop to train_px first and then leaves rows and columns out, as
    composer; None resizes it to the wanted side at once, as ffcv.

    Raises ValueError for a line that does not rise.
    Sources: Tan and Le 2021, arXiv:2104.00298; the rounding is that of ffcv's ImageNet training
    script.
    """

    from_px: Side
    from_epoch: NonNegative
    to_epoch: NonNegative
    multiple_px: Annotated[int, Field(ge=1, le=256)]
    updated: Literal["per_epoch", "per_step"]
    shrink: Literal["nearest"] | None = None

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.from_epoch >= self.to_epoch:
            raise ValueError(
                f"from_epoch {self.from_epoch:g} is not before to_epoch {self.to_epoch:g}: start"
                " earlier"
            )
        return self

    def scaled_to(self, epochs: int, epochs_before: int) -> Growth:
        """The same growth in a run of other length: over the same share of it."""
        places = {
            key: scaled_epochs(getattr(self, key), epochs, epochs_before)
            for key in ("from_epoch", "to_epoch")
        }
        return self.model_copy(update=places)

    def px_at(self, step: int, steps_per_epoch: int, train_px: int) -> int:
        """The side of the training images of an optimizer step, in px."""
        epoch = step // steps_per_epoch if self.updated == "per_epoch" else step / steps_per_epoch
        if epoch <= self.from_epoch:
            return self.from_px
        if epoch >= self.to_epoch:
            return train_px
        grown_share = (epoch - self.from_epoch) / (self.to_epoch - self.from_epoch)
        side = self.from_px + (train_px - self.from_px) * grown_share
        return round(side / self.multiple_px) * self.multiple_px

    def cropped_px(self, image_px: int, train_px: int) -> int:
        """The side that crops are resized to where the model sees image_px."""
        return image_px if self.shrink is None else train_px


class PreciseNorm(StrictModel):
    """Before each evaluation the running statistics of all norms become the plain mean over
    training images.

    images: how many, the first of the epoch just done, in micro-batches of batch.norm_images.

    Source: Wu and Johnson 2021, arXiv:2105.07576; pycls recomputes them on 8192 images.
    """

    images: Annotated[int, Field(ge=2, le=1 << 20)]


class EarlyStopping(StrictModel):
    """The run ends after the first evaluation whose score and those of patience_epochs before it
    were no better than an earlier one.

    The images that score a run then also choose its end, and the schedule does not come to its end:
    no recipe of the literature here does so, and a row of such a run has it among its deviations.
    """

    patience_epochs: Annotated[int, Field(ge=1, le=10_000)]

    def is_over(self, curve: Mapping[int, float]) -> bool:
        """curve: the main score by epoch, of all evaluations so far."""
        return bool(curve) and max(curve) - max(curve, key=curve.__getitem__) >= (
            self.patience_epochs
        )


class Image(StrictModel):
    """Sides in px. Testing resizes the shorter side to floor(test_px / test_crop_share) and crops
    the centre.

    test_crop_mode: "squash" resizes both sides to that, whatever the image's aspect, "border" the
    longer one, with a border of the mean colour around what is then missing (timm's crop modes).

    test_interpolation: "bilinear_no_antialias" does not smooth what it makes smaller (OpenCV,
    DALI); the others do (PIL).
    growth: smaller training images in the beginning; None trains on train_px throughout. test_flip:
    an image is scored by the sum of its logits and those of its mirror image. test_translate_px:
    half of the weight is on the image, half on it moved so many px up and to the left, and down and
    to the right (mirrored at the edges). mean, std: per channel, what images are normalized by, in
    units where black is 0 and white is 1; None: the data profile's. weights= sets those that its
    weights were trained with.

    Raises ValueError for a growth from no smaller size, or sizes that are no multiples of its
    multiple_px, for one of mean and std without the other, and for images moved out of sight.
    """

    train_px: Side
    test_px: Side
    test_crop_share: Annotated[float, Field(gt=0, le=1)]
    test_interpolation: Literal["bilinear", "bicubic", "bilinear_no_antialias"]
    test_crop_mode: Literal["squash", "border"] | None = None
    test_flip: bool = False
    test_translate_px: Annotated[int, Field(ge=1, le=64)] | None = None
    growth: Growth | None = None
    mean: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _mean_has_its_deviation(self) -> Self:
        if (self.mean is None) != (self.std is None):
            there, absent = ("mean", "std") if self.std is None else ("std", "mean")
            raise ValueError(f"{there} stands without {absent}: give both, or leave both out")
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}: write one per channel"
            )
        return self

    @model_validator(mode="after")
    def _stays_in_sight(self) -> Self:
        if self.test_translate_px is not None and self.test_translate_px >= self.test_px:
            raise ValueError(
                f"test_translate_px {self.test_translate_px} moves images of {self.test_px} px out"
                " of sight: make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.growth is None:
            return self
        if self.growth.from_px >= self.train_px:
            sentence = f"growth.from_px {self.growth.from_px} is not below train_px {self.train_px}"
            raise ValueError(f"{sentence}: start smaller, or leave growth out")
        for key, side in (("growth.from_px", self.growth.from_px), ("train_px", self.train_px)):
            if side % self.growth.multiple_px:
                raise ValueError(
                    f"{key} {side} is no multiple of growth.multiple_px {self.growth.multiple_px}:"
                    " make it one"
                )
        return self


class Score(StrictModel):
    """One published top-1 in per cent, on ImageNet-1k val unless `data` names another set known by
    name; sides in px where its source states them.

    std_pct, num_seeds: top1_pct is then the mean over seeds. precision: what the source trained in
    (fp16 and bf16 mean mixed precision). epoch: whether it is the last epoch's score, or that of
    the epoch with the best one on val, which lies a little higher. Absent: the source does not say.
    """

    model: str
    top1_pct: Percent
    train_px: Side | None = None
    test_px: Side | None = None
    std_pct: Percent | None = None
    num_seeds: Annotated[int, Field(ge=2)] | None = None
    precision: Literal["float32", "tf32", "fp16", "bf16"] | None = None
    epoch: Literal["best", "last"] | None = None
    data: Literal["cifar10", "cifar100"] | None = None
