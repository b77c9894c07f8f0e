"""Profiles: the facts of data sets, and how far each adapts a recipe that was written for
ImageNet.
"""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from trainer.base.component import Positive, StrictModel
from trainer.base.errors import UserError, did_you_mean
from trainer.base.names import one_name
from trainer.base.scores import CLASSIFICATION
from trainer.recipe.check import refuse

ImageCount = Annotated[int, Field(gt=0)]
CropShare = Annotated[float, Field(gt=0, le=1)]
ChannelMean = Annotated[float, Field(ge=0, le=1)]
Channels = Annotated[int, Field(ge=1, le=64)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# and those of `data.datasets.builtin.known_set`
KNOWN_SETS = {
    "digits",
    "fashion-mnist",
    "mnist",
    "cifar10",
    "cifar100",
}


def _is_known(name: str) -> str:
    if name not in KNOWN_SETS:
        raise ValueError(
            f"{name!r} is no data set known by name; write one of {', '.join(sorted(KNOWN_SETS))}"
        )
    return name


class Adapt(StrictModel):
    """What a profile changes in any recipe, so that it fits small images and small sets; absent:
    the recipe's own value.

    train_px, test_px, test_crop_share: of the recipe's `image`. epochs, warmup_epochs.
    batch_images, norm_images: of the recipe's `batch`; without norm_images one statistics sample is
    the whole batch. crop_area: the lower bound of random_resized_crop's area, a share of the image.
    """

    train_px: ImageCount | None = None
    test_px: ImageCount | None = None
    test_crop_share: CropShare | None = None
    epochs: ImageCount | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] | None = None
    batch_images: ImageCount | None = None
    norm_images: ImageCount | None = None
    crop_area: CropShare | None = None


class Profile(StrictModel):
    """The facts of one data set: looked up, never chosen.

    name: letters, digits and . + - _ only, since it becomes part of file names.
    mean, std: per channel of the training images, in units where black is 0 and white is 1.
    channels: of the images as the model takes them. For 1, a colour image becomes its luma; for 3,
        a grey one is repeated three times; for any other number the files themselves hold as many
        (.npy of [H, W, C] uint8, or what PIL opens).
    native_px: side of its images where all have the same.
    majority_pct: top-1 on val of always answering the class that train has most of; None where the
        labels have to be counted.
    images_of: the known set whose images these are, where `name` is another.
    task: what their targets are for (a recipe's `task`); None: classification.
    """

    file_is: ClassVar[str] = "data profile"
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$"), AfterValidator(one_name)]
    num_classes: ImageCount
    num_train: ImageCount
    num_val: ImageCount
    mean: tuple[ChannelMean, ...]
    std: tuple[Positive, ...]
    channels: Channels = 3
    native_px: ImageCount | None = None
    majority_pct: Annotated[float, Field(gt=0, le=100)] | None = None
    images_of: Annotated[str, AfterValidator(_is_known)] | None = None
    task: str | None = None
    adapt: Adapt | None = None

    @model_validator(mode="after")
    def _classes_to_choose_from(self) -> Self:
        if self.num_classes < 2 and self.task in (None, CLASSIFICATION):
            raise refuse(("num_classes",), "one class leaves nothing to tell", "write 2 or more")
        return self

    @model_validator(mode="after")
    def _a_mean_and_a_deviation_per_channel(self) -> Self:
        for key in ("mean", "std"):
            found = len(getattr(self, key))
            if found != self.channels:
                known = f"channels is {self.channels}" + (
                    " where it is not written" if self.channels == 3 else ""
                )
                raise refuse(
                    (key,),
                    f"{found} number{'s' * (found != 1)} where {known}",
                    "write one per channel",
                )
        return self


def _grey(
    name: str, num_train: int, num_val: int, mean: float, std: float, native_px: int, adapt: Adapt,
    majority_pct: float = 10.0,
) -> tuple[Profile, Profile]:  # fmt: skip
    """A grey set as the models of colour images take it, and as it is: `<name>-grey`, in one
    channel.
    """
    in_three = Profile(
        name=name,
        num_classes=10,
        num_train=num_train,
        num_val=num_val,
        mean=(mean,) * 3,
        std=(std,) * 3,
        native_px=native_px,
        majority_pct=majority_pct,
        adapt=adapt,
    )
    in_one = {
        "name": f"{name}-grey",
        "mean": (mean,),
        "std": (std,),
        "channels": 1,
        "images_of": name,
    }
    return in_three, Profile(**(dict(in_three) | in_one))


_MNIST_LIKE = Adapt(
    train_px=32, test_px=32, test_crop_share=1.0, epochs=6, warmup_epochs=1, batch_images=128
)
_CIFAR_LIKE = Adapt(
    train_px=32, test_px=32, test_crop_share=1.0, epochs=30, warmup_epochs=2, batch_images=128
)

# Means and deviations of the training split: the CIFAR and MNIST ones as commonly published and
# measured again on the files; the digits' own are held by a test.
PROFILES = {
    profile.name: profile
    for profile in (
        *_grey(
            "digits",
            1437,
            360,
            0.3047,
            0.3756,
            8,
            Adapt(
                train_px=32,
                test_px=32,
                test_crop_share=1.0,
                epochs=9,
                warmup_epochs=1,
                batch_images=32,
                crop_area=0.95,
            ),
        ),
        *_grey("fashion-mnist", 60_000, 10_000, 0.2860, 0.3530, 28, _MNIST_LIKE),
        *_grey("mnist", 60_000, 10_000, 0.1307, 0.3081, 28, _MNIST_LIKE, majority_pct=11.35),
        Profile(
            name="cifar10",
            num_classes=10,
            num_train=50_000,
            num_val=10_000,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            native_px=32,
            majority_pct=10.0,
            adapt=_CIFAR_LIKE,
        ),
        Profile(
            name="cifar100",
            num_classes=100,
            num_train=50_000,
            num_val=10_000,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            native_px=32,
            majority_pct=1.0,
            adapt=_CIFAR_LIKE,
        ),
        Profile(
            name="imagenet-1k",
            num_classes=1000,
            num_train=1_281_167,
            num_val=50_000,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            majority_pct=0.1,
        ),
    )
}


def unknown_data(data: str) -> UserError:
    """What to say of a data= that is neither a known dataset nor a path that is there."""
    if os.sep in data:
        return UserError(
            f"data={data}: no such folder",
            "use one with train/<class>/… and val/<class>/…, or a profile's .yaml",
        )
    return UserError(
        f"data={data}: unknown{did_you_mean(data, PROFILES)}",
        f"valid: {', '.join(PROFILES)}, an image folder (train/<class>/…, val/<class>/…), a folder "
        "of tar shards, parquet or `datasets` files, a profile's .yaml",
    )


def check_data_name(data: str) -> None:
    """Refuse a data= that names nothing, without looking into it. Raises UserError."""
    if data not in PROFILES and not os.path.exists(data):
        raise unknown_data(data)
