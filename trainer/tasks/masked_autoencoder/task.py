"""Hidden patches: which, their pixels as targets, and how much of these is predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from trainer.base import streams
from trainer.base.component import StrictModel
from trainer.base.devices import sum_dtype
from trainer.base.errors import PlanError, UserError
from trainer.base.settings import Settings
from trainer.components.task import Moved, TaskSection
from trainer.data.datasets.builtin import ImageSet
from trainer.data.decode import BadImage
from trainer.data.evaluation import EvaluationStream, whole_image, whole_images
from trainer.data.loader import MicroBatch
from trainer.data.transforms import autocast, model_inputs, scored_inputs
from trainer.recipe.plan import Plan
from trainer.recipe.profiles import Profile
from trainer.tasks.base import Prediction, Scores, Shown, Task, count_of
from trainer.tasks.masked_autoencoder.model import (
    MaskedAutoencoder,
    autoencoder_of,
    hidden_places,
    images_of,
    initialized,
    patches_of,
    taken,
)

_PURPOSE = "hidden_patches"
_EPS = 1e-6  # of a patch's variance, as in the authors' code
_UNIT = 2.0**-20  # of an image's mean error: whole units add up exactly, in any order
_NO_EPOCH = 2**32 - 1
_GREY = 0.5


@dataclass(frozen=True)
class MaskedAutoencoderScores(Scores):
    """Sums over one pass, of the hidden patches' normalized pixels.

    loss_nats: the mean squared error, over images of the mean over pixels. spread_units: the sum
    over images of the mean square of the targets, in 2 ** -20.
    """

    spread_units: int

    def percentages(self) -> dict[str, float]:
        """The share of the targets' variance that is predicted; 0 where the error is larger."""
        spread = self.spread_units * _UNIT / self.num_images
        share = 1 - self.loss_nats / spread if spread else 0.0
        return {"explained_pct": 100 * max(0.0, share)}

    def counts(self) -> dict[str, int]:
        return {"num_spread_units": self.spread_units, "num_images": self.num_images}

    def summary(self) -> str:
        return f"explained {self.main_pct:.2f} %  loss {self.loss_nats:.4f}"


@dataclass(frozen=True)
class MaskedAutoencoding(Task):
    """Targets [B, L] bool: which of an image's patches, row by row, are hidden. Their pixels are
    the image's own, see `normalized_patches`.
    """

    num_sums = 2  # of the squared errors and of the squared targets, in units

    @property
    def _section(self) -> MaskedAutoencoderSection:
        section = self.plan.recipe.task
        assert isinstance(section, MaskedAutoencoderSection)
        return section

    def prepare(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(images [B, C, H, W] float, which patches are hidden [B, L] bool): drawn for each image
        from (seed, epoch, image, repeat).
        """
        images = model_inputs(self.plan, self.settings, batch)
        is_hidden = self.hidden(self.plan.seed, batch.ids.numpy())
        return images, is_hidden.to(self.settings.device, non_blocking=True)

    def hidden(self, seed: int, addresses: np.ndarray) -> Tensor:
        """Which patches are hidden at addresses [B, k] of the random stream: [B, L] bool, all but
        those with the lowest numbers drawn.
        """
        num_patches, num_hidden = self._section.numbers(self.plan)
        drawn = streams.uniforms(seed, _PURPOSE, addresses, num_patches)
        order = np.argsort(drawn, axis=1, kind="stable")
        is_hidden = np.zeros(drawn.shape, bool)
        np.put_along_axis(is_hidden, order[:, num_patches - num_hidden :], True, axis=1)
        return torch.from_numpy(is_hidden)

    def hidden_in_evaluation(self, places: np.ndarray) -> Tensor:
        """Of the images at places [B] of a set: the same for every run."""
        return self.hidden(0, np.stack([np.full_like(places, _NO_EPOCH), places], 1))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The recipe's loss over the pixels of the hidden patches: each image has as many."""
        found, wanted = self._hidden_pixels(model, inputs, targets)
        return self.plan.loss(found.flatten(0, 1), wanted.flatten(0, 1))

    def _hidden_pixels(
        self, model: nn.Module, inputs: Tensor, is_hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(predictions, targets) of the hidden patches, [B, M, P] float32 each."""
        with autocast(self.settings):
            found = model(inputs, is_hidden)
        _, hidden = hidden_places(is_hidden, self._section.numbers(self.plan)[1])
        wanted = normalized_patches(taken(patches_of(inputs, self._section.patch_px), hidden))
        return taken(found.float(), hidden), wanted

    def blank_targets(self, num_images: int, device: str) -> Tensor:
        num_patches, num_hidden = self._section.numbers(self.plan)
        is_hidden = torch.arange(num_patches, device=device) < num_hidden
        return is_hidden.expand(num_images, -1).contiguous()

    def validation_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        inputs = scored_inputs(images, self.plan.profile, self.settings)
        is_hidden = self.hidden_in_evaluation(labels.cpu().numpy())
        return self.loss(model, inputs, is_hidden.to(inputs.device))

    def constant_loss(self, images: ImageSet, is_mixed: bool = True) -> float:
        """Of predicting each patch's mean: its normalized pixels have a variance of 1, by a divisor
        of one less than their number.
        """
        number = self._section.patch_px**2 * self.plan.profile.channels
        return (number - 1) / number

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        device = self.settings.device
        inputs = scored_inputs(images.to(device), self.plan.profile, self.settings)
        is_hidden = self.hidden_in_evaluation(labels.numpy()).to(device)
        found, wanted = self._hidden_pixels(model, inputs, is_hidden)
        each = torch.stack([(found - wanted).square().mean((1, 2)), wanted.square().mean((1, 2))])
        return (each.to(sum_dtype(device)) / _UNIT).round().sum(1)

    def scores(self, sums: Sequence[float], num_images: int) -> MaskedAutoencoderScores:
        error, spread = sums
        return MaskedAutoencoderScores(num_images, error * _UNIT / num_images, int(spread))

    def restored(self, record: Mapping[str, float]) -> MaskedAutoencoderScores:
        num_images, spread = (count_of(record, n) for n in ("num_images", "num_spread_units"))
        loss = record["loss_nats"]
        if not num_images or loss < 0:
            raise ValueError(f"a loss of {loss} over {num_images} images")
        return MaskedAutoencoderScores(num_images, loss, spread)

    def features(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The encoder's class token of whole images; of a model without one the patches' mean."""
        assert isinstance(model, MaskedAutoencoder)
        tokens = model.body.forward_features(inputs)
        return tokens[:, 0] if model.body.cls_token is not None else tokens.mean(1)

    def shown(self, pictures: np.ndarray, targets: Tensor, classes: Sequence[str]) -> list[Shown]:
        """Each image, and what the encoder sees of it."""
        found = []
        for picture, is_hidden in zip(pictures, targets, strict=False):
            found.append(Shown(picture, ""))
            found.append(Shown(self._covered(picture, is_hidden), "seen"))
        return found

    def _covered(self, picture: np.ndarray, is_hidden: Tensor) -> np.ndarray:
        """A picture [H, W, 3] with its hidden patches grey."""
        patch_px, side = self._section.patch_px, math.isqrt(len(is_hidden))
        covered = is_hidden.numpy().reshape(side, side)
        covered = covered.repeat(patch_px, 0).repeat(patch_px, 1)[..., None]
        return np.where(covered, _GREY, picture)

    @torch.no_grad()
    def predict(
        self, model: nn.Module, image: Image.Image, classes: Sequence[str]
    ) -> Prediction | None:
        """A PNG of three squares: the image, what the model sees of it, and that with its
        predictions in the hidden places. Predictions are of normalized pixels; the mean and the
        deviation of each patch are the image's own.
        """
        pixels = whole_image(image, self.plan).to(self.settings.device)
        inputs = scored_inputs(pixels, self.plan.profile, self.settings)
        is_hidden = self.hidden_in_evaluation(np.zeros(1, np.int64)).to(inputs.device)
        with autocast(self.settings):
            found = model(inputs, is_hidden).float()
        patches = patches_of(inputs.float(), self._section.patch_px)
        mean, deviation = _moments(patches)
        whole = torch.where(is_hidden[..., None], found * deviation + mean, patches)
        before, after = (
            self._picture(images_of(each, self._section.patch_px)) for each in (patches, whole)
        )
        squares = (before, self._covered(before, is_hidden[0].cpu()), after)
        picture = Image.fromarray((255 * np.concatenate(squares, 1)).round().astype(np.uint8))
        _, hidden = hidden_places(is_hidden, self._section.numbers(self.plan)[1])
        wanted = taken(normalized_patches(patches), hidden)
        error = float((taken(found, hidden) - wanted).square().mean())
        return Prediction({".png": picture}, f"loss {error:.4f} of the hidden patches")

    def _picture(self, inputs: Tensor) -> np.ndarray:
        """One image of the model's inputs [1, C, H, W] for a reader: [H, W, 3] in [0, 1]."""
        profile = self.plan.profile
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (profile.mean, profile.std))
        found = (inputs[0].cpu() * std + mean).clamp(0, 1)
        found = found[:3] if len(found) >= 3 else found[:1].expand(3, -1, -1)
        return found.permute(1, 2, 0).numpy()


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels of each patch [..., P]: [..., 1] each."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return mean, (variance + _EPS).sqrt()


def normalized_patches(patches: Tensor) -> Tensor:
    """The targets: the pixels of patches [..., P], less their mean over their deviation, float32.

    Source: He et al. 2021, arXiv:2111.06377 (norm_pix_loss of the authors' code).
    """
    mean, deviation = _moments(patches.float())
    return (patches.float() - mean) / deviation


@dataclass(frozen=True)
class NumberedStream(EvaluationStream):
    """The batches of an evaluation with the images' numbers in the place of their labels."""

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | BadImage:
        found = super().__getitem__(number)
        if isinstance(found, BadImage):
            return found
        first = number * self.batch_images
        return found[0], torch.arange(first, first + len(found[0]))


class DecoderOptions(StrictModel):
    """The decoder: the width of its tokens, its transformer blocks, and the heads of each."""

    width: Annotated[int, Field(ge=8, le=8192, multiple_of=4)]
    blocks: Annotated[int, Field(ge=1, le=64)]
    heads: Annotated[int, Field(ge=1, le=64)]


class MaskedAutoencoderSection(TaskSection):
    """Most patches of an image are hidden, and predicted from the others.

    The encoder, one of timm's ViTs, sees the patches that are not hidden; the decoder is there in
    pre-training alone. The loss is over the hidden patches, whose pixels are normalized patch by
    patch. Any images do: their classes are not looked at. `weights=<the run>` starts a classifier
    from the encoder.

    patch_px: the side of the model's patches. hidden_share: of the patches.

    Source: He et al. 2021, arXiv:2111.06377.
    """

    name: Literal["masked_autoencoder"] = "masked_autoencoder"
    patch_px: Annotated[int, Field(ge=1, le=256)]
    hidden_share: Annotated[float, Field(gt=0, lt=1)]
    decoder: DecoderOptions
    purpose: ClassVar[str] = _PURPOSE
    scores: ClassVar[tuple[str, ...]] = ("explained_pct",)
    is_timms: ClassVar[bool] = False
    answers_with_pictures: ClassVar[bool] = True
    hub_tag: ClassVar[str] = "image-feature-extraction"
    example: ClassVar[dict[str, Any]] = {
        "patch_px": 16,
        "hidden_share": 0.75,
        "decoder": {"width": 512, "blocks": 8, "heads": 16},
    }

    def bound(self, plan: Plan, settings: Settings) -> Task:
        return MaskedAutoencoding(plan, settings)

    def numbers(self, plan: Plan) -> tuple[int, int]:
        """Patches of an image, and how many of them are hidden."""
        number = (plan.recipe.image.train_px // self.patch_px) ** 2
        return number, number - int(number * (1 - self.hidden_share))

    def targets(self, images: ImageSet, places: np.ndarray, moved: Moved) -> Tensor:
        """[b] int64, the images' numbers: what is hidden is drawn by `prepare`."""
        return torch.from_numpy(places.astype(np.int64))

    def evaluation_stream(
        self, images: ImageSet, plan: Plan, batch_images: int, test_px: int
    ) -> EvaluationStream:
        return whole_images(images, plan, batch_images, test_px, NumberedStream)

    def model_of(self, plan: Plan, body: nn.Module) -> MaskedAutoencoder:
        section, decoder = plan.recipe.model, self.decoder
        sizes = decoder.width, decoder.blocks, decoder.heads
        made = autoencoder_of(plan.model, body, sizes, self.patch_px, self.numbers(plan)[1])
        return initialized(made, with_body=section is None or section.pretrained is None)

    def check_data(self, profile: Profile) -> None:
        """Any images do."""

    def check(self, plan: Plan) -> None:
        """Are there no keys that mean classes, and as many patches everywhere?"""
        super().check(plan)
        recipe = plan.recipe
        if not recipe.loss.takes_numbers:
            raise PlanError(
                f"loss: {recipe.loss.name} is of classes, and task masked_autoencoder predicts"
                " pixels",
                'use set="loss={name: mse}"',
                fix={"loss": {"name": "mse"}},
            )
        model, image = recipe.model, recipe.image
        refused = {
            "mix": recipe.mix,
            "distill": recipe.distill,
            "smoothing": recipe.smoothing,
            "augment_splits": recipe.augment_splits,
            "image.growth": image.growth,
            "image.test_flip": image.test_flip,
            "model.head_init_scale": model and model.head_init_scale,
            "model.start": model and model.start,
        }
        for path, there in refused.items():
            if there:
                raise PlanError(
                    f"{path}: not with task masked_autoencoder",
                    f'use set="{path}=null"',
                    fix={path: None},
                )
        if image.test_px != image.train_px:
            raise PlanError(
                f"image.test_px {image.test_px}: task masked_autoencoder is scored at its"
                " image.train_px",
                f'use set="image.test_px={image.train_px}"',
                fix={"image.test_px": image.train_px},
            )
        self._check_sizes(plan)

    def check_settings(self, plan: Plan, settings: Settings) -> None:
        if settings.test_px:
            raise UserError(
                "test_px=: task masked_autoencoder is scored at its image.train_px",
                "leave test_px= out",
            )

    def _check_sizes(self, plan: Plan) -> None:
        image_px, (number, hidden) = plan.recipe.image.train_px, self.numbers(plan)
        if image_px % self.patch_px:
            raise PlanError(
                f"image.train_px {image_px}: no multiple of task.patch_px {self.patch_px}",
                "use a multiple of it, or the model's own task.patch_px",
            )
        if not 0 < hidden < number:
            raise PlanError(
                f"task.hidden_share {self.hidden_share:g}: hides {hidden} of {number} patches",
                "hide some and leave some: use larger images, or another share",
            )
        if self.decoder.width % self.decoder.heads:
            raise PlanError(
                f"task.decoder.width {self.decoder.width}: no multiple of its"
                f" {self.decoder.heads} heads",
                "use another number of heads",
            )
