"""A plugin as a user would write it: one component of each kind, a data set known by name, and a
file format.
"""

import io
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn

from trainer.base.streams import uniforms
from trainer.components.augmentation import OfPixels
from trainer.components.losses import ImageLoss
from trainer.components.mixing import Mixing
from trainer.components.optimizers import Optimizer
from trainer.components.schedules import Schedule
from trainer.data.datasets.builtin import ArraySet, known_set
from trainer.data.datasets.formats import FileFormat
from trainer.data.datasets.listing import Listing
from trainer.models.edit.norm_placement import NormPart
from trainer.recipe.profiles import Adapt, Profile


class Trapezoid(Schedule):
    """The peak for `flat_epochs`, then a straight line down to `end`."""

    name: Literal["trapezoid"] = "trapezoid"
    flat_epochs: Annotated[float, Field(gt=0)]
    end: Annotated[float, Field(ge=0)]
    example: ClassVar[dict[str, Any]] = {"flat_epochs": 30.0, "end": 1e-6}

    def at(self, peak, update, num_warmup, num_updates, updates_per_epoch):
        num_flat = self.flat_epochs * updates_per_epoch
        done_share = max(0.0, (update - num_flat) / max(1, num_updates - num_flat))
        return peak + (self.end - peak) * done_share

    def scaled_to(self, epochs, epochs_before):
        return self.model_copy(update={"flat_epochs": self.flat_epochs * epochs / epochs_before})

    def scaled_by(self, ratio):
        return self.model_copy(update={"end": self.end * ratio})

    def end_rate(self):
        return self.end


class Brier(ImageLoss):
    """The squared distance of the softmax from the target."""

    name: Literal["brier"] = "brier"
    is_linear: ClassVar[bool] = False

    def __call__(self, logits, targets):
        return (logits.to(targets.dtype).softmax(1) - targets).square().sum(1).mean()


class OneGroup(NormPart):
    """GroupNorm of a single group."""

    name: Literal["one_group"] = "one_group"
    eps: Annotated[float, Field(gt=0)]
    example: ClassVar[dict[str, Any]] = {"eps": 1e-5}

    def num_groups(self, num_channels):
        return 1

    def layer(self, num_channels, is_activated):
        return nn.GroupNorm(1, num_channels, eps=self.eps)


class Adagrad(Optimizer):
    """torch's."""

    name: Literal["adagrad"] = "adagrad"
    decay_follows_rate: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"weight_decay": 1e-4}

    def build(self, groups, lr):
        return torch.optim.Adagrad(groups, lr=lr)


class Invert(OfPixels):
    """Black and white change places in some images."""

    name: Literal["invert"] = "invert"
    share: Annotated[float, Field(gt=0, le=1)]
    purpose: ClassVar[str] = "tests.invert"
    example: ClassVar[dict[str, Any]] = {"share": 0.25}

    def draw(self, seed, ids, image_px, num_channels=3):
        return {"is_inverted": uniforms(seed, self.purpose, ids, 1)[:, 0] < self.share}

    def apply(self, images, drawn, fill):
        is_inverted = drawn["is_inverted"].to(images.device)[:, None, None, None]
        return torch.where(is_inverted, 255 - images, images)


class HalfMix(Mixing):
    """Half of each of two images."""

    name: Literal["half_mix"] = "half_mix"
    example: ClassVar[dict[str, Any]] = {"partner": "rolled"}

    def choose(self, which):
        return 100.0, False


STRIPES = Profile(
    name="stripes", num_classes=2, num_train=64, num_val=20, mean=(0.5,) * 3, std=(0.5,) * 3,
    native_px=8,
    adapt=Adapt(
        train_px=32,
        test_px=32,
        test_crop_share=1.0,
        epochs=4,
        warmup_epochs=1,
        batch_images=16,
    ),
)  # fmt: skip


@known_set(STRIPES)
def stripes(name, data_dir, split):
    """Upright or lying stripes."""
    num_images = STRIPES.num_train if split == "train" else STRIPES.num_val
    images = np.zeros((num_images, 8, 8), np.uint8)
    images[::2, ::2], images[1::2, :, ::2] = 200, 255
    images[:, 0, 0] = np.arange(num_images)
    return ArraySet(images, np.arange(num_images, dtype=np.int64) % 2, ("lying", "upright"))


class Npz(FileFormat):
    """train.npz and val.npz with `images` [N, H, W] uint8 and `labels` [N]."""

    name, title, example = "npz", "npz files", "{}.npz"

    def files(self, root, split):
        return [path for path in [root / f"{split}.npz"] if path.is_file()]

    def scan(self, paths):
        listing, reader = Listing(), self.reader(paths)
        for number, label in enumerate(np.load(paths[0])["labels"].tolist()):
            listing.add(
                f"{number:06d}.png", f"class{label}", len(reader.content(0, number, 0)), 0, number
            )
        return listing

    def reader(self, paths):
        return _NpzReader(paths)


class _NpzReader:
    def __init__(self, paths):
        self.images = [np.load(path)["images"] for path in paths]

    def content(self, file, start, size):
        buffer = io.BytesIO()
        Image.fromarray(self.images[file][start]).save(buffer, "PNG")
        return buffer.getvalue()
