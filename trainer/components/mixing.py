"""Images and targets of one mixing unit, blended with one another."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.special import betaincinv
from torch import Tensor

from trainer.base.component import Component
from trainer.base.streams import uniforms
from trainer.components.epochs import NumEpochs, until_epochs_in
from trainer.components.transfer import on

Alpha = Annotated[float, Field(gt=0, le=100)]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Mix:
    """How the images of one mixing unit are mixed.

    share: how much of each image and target stays, in [0, 1]; with a box, exactly the area outside
    it. box: (top, left, bottom, right) in px, the part that comes from the partner; None blends
    whole images.
    """

    share: float
    box: Box | None


@dataclass(frozen=True)
class MixOfEach:
    """How the images of one mixing unit are mixed where each has a draw of its own.

    each: the mix of every image, in their order.
    """

    each: tuple[Mix, ...]

    @property
    def shares(self) -> np.ndarray:
        """[B] float32, of the targets."""
        return np.array([mix.share for mix in self.each], dtype=np.float32)


_NOT_MIXED = Mix(1.0, None)


class Mixing(Component):
    """What all ways of mixing share.

    partner: whom image b of B is mixed with. "reversed": image B - 1 - b (timm); "rolled": image b
    - 1 (torchvision). images: the B that share one draw and find their partners among one another:
    the source's images per GPU. Absent, they are those of a micro-batch (batch.norm_images).
    """

    kind: ClassVar[str] = "mix"
    purpose: ClassVar[str] = "mix"
    partner: Literal["reversed", "rolled"]
    images: Annotated[int, Field(ge=2, le=1 << 20)] | None = None
    mixed_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    each: Literal["image", "pair"] | None = None
    until_epochs: NumEpochs | None = None

    @model_validator(mode="after")
    def _pairs_are_partners(self) -> Self:
        if self.each == "pair" and self.partner != "reversed":
            raise ValueError(f"each: pair needs partner: reversed, not {self.partner}")
        return self

    def scaled_to(self, epochs: int, epochs_before: int) -> Self:
        """The same in a run of other length: it ends after the same share of it."""
        until = until_epochs_in(epochs, epochs_before, self.until_epochs)
        return self.model_copy(update={"until_epochs": until})

    def lengths(self, epochs: int) -> Iterator[tuple[str, float, float]]:
        """(field, epochs in it, the most that a run of `epochs` has room for)."""
        if self.until_epochs is not None:
            yield "until_epochs", self.until_epochs, epochs - 1

    def draw(self, seed: int, step: int, unit: int, image_px: int) -> Mix:
        """The mix of one of a step's units of square images of image_px pixels a side, a pure
        function of its address.
        """
        return self._mixes(seed, np.array([[step, unit]]), image_px)[0]

    def draw_each(
        self, seed: int, step: int, unit: int, places: np.ndarray, image_px: int
    ) -> MixOfEach:
        """The same of a unit with a draw for each image, or pair. places: of the images here, [B]
        int64 in the unit.
        """
        if self.each == "pair":
            places = np.where(np.arange(len(places)) * 2 < len(places), places, places[::-1])
        address = np.full((len(places), 3), (step, unit, 0))
        address[:, 2] = places
        return MixOfEach(tuple(self._mixes(seed, address, image_px)))

    def _mixes(self, seed: int, addresses: np.ndarray, image_px: int) -> list[Mix]:
        draws = uniforms(seed, self.purpose, addresses, 4 if self.mixed_share is None else 5)
        return [self._mix(image_px, *drawn) for drawn in draws]

    def _mix(
        self,
        image_px: int,
        which: float,
        level: float,
        down: float,
        across: float,
        whether: float = 0.0,
    ) -> Mix:
        if self.mixed_share is not None and whether >= self.mixed_share:
            return _NOT_MIXED
        alpha, has_box = self.choose(which)
        share = float(betaincinv(alpha, alpha, level))  # the Beta distribution's quantile
        if not has_box:
            return Mix(share, None)
        box = top, left, bottom, right = _box(
            share, image_px, int(down * image_px), int(across * image_px)
        )
        return Mix(1 - (bottom - top) * (right - left) / image_px**2, box)

    @abstractmethod
    def choose(self, which: float) -> tuple[float, bool]:
        """The Beta distribution's alpha, and whether to paste a box, for a uniform draw in
        [0, 1).
        """

    def num_blocks(self, num_images: int) -> int:
        """Blocks of a unit that can be mixed apart, as on several ranks: image and partner where
        they mix with one another, single images where a block needs the one before it.
        """
        return (num_images + 1) // 2 if self.partner == "reversed" else num_images

    def rows(self, num_images: int, blocks: range) -> tuple[list[int], list[int]]:
        """(further images, own images) of a unit's adjacent blocks, by their places in the unit:
        mixed in this order, the own ones are as in the whole unit.
        """
        if self.partner == "reversed":
            mirrored = {num_images - 1 - place for place in blocks}
            return [], sorted(mirrored.union(blocks))
        is_whole = len(blocks) in (0, num_images)
        return [] if is_whole else [(blocks.start - 1) % num_images], list(blocks)

    def drawn(
        self,
        seed: int,
        step: int,
        units: Mapping[int, slice],
        image_px: int,
        places: np.ndarray,
        epoch: int = 0,
    ) -> list[tuple[slice, Mix | MixOfEach]]:
        """The mix of each of a micro-batch's units. units: which images are a unit's, by its number
        in the step. places: of each image in its unit, [B] int64.
        """
        if self.until_epochs is not None and epoch >= self.until_epochs:
            return [(own, _NOT_MIXED) for own in units.values()]
        if self.each is None:
            return [(own, self.draw(seed, step, unit, image_px)) for unit, own in units.items()]
        return [
            (own, self.draw_each(seed, step, unit, places[own], image_px))
            for unit, own in units.items()
        ]

    def partners(self, places: np.ndarray) -> np.ndarray:
        """Whom each image of one unit is mixed with: [B] places in the order of those given."""
        return places[::-1] if self.partner == "reversed" else np.roll(places, 1)

    def _partners(self, tensor: Tensor) -> Tensor:
        return tensor.flip(0) if self.partner == "reversed" else tensor.roll(1, 0)

    def apply(self, images: Tensor, targets: Tensor, mix: Mix | MixOfEach) -> tuple[Tensor, Tensor]:
        """Mixed images [B, C, H, W] float and targets [B, K] float, on the device they are on.

        They may be mixed in place: do not use those given afterwards.
        """
        return self.of_images(images, mix), self.of_targets(targets, mix)

    def of_images(self, images: Tensor, mix: Mix | MixOfEach) -> Tensor:
        """Images [B, C, H, W] float: blended with their partners, or with a box of theirs."""
        if isinstance(mix, MixOfEach):
            return self._images_of_each(images, mix)
        if mix.box is None:
            return self._blended(images, mix.share)
        top, left, bottom, right = mix.box
        box = images[:, :, top:bottom, left:right]
        box.copy_(self._partners(box))
        return images

    def _images_of_each(self, images: Tensor, mix: MixOfEach) -> Tensor:
        partners = self._partners(images)
        blends = np.array([1.0 if one.box else one.share for one in mix.each], dtype=np.float32)
        mixed = _blended_by(images, partners, blends)
        for place, one in enumerate(mix.each):
            if one.box is not None:
                top, left, bottom, right = one.box
                mixed[place, :, top:bottom, left:right] = partners[place, :, top:bottom, left:right]
        return mixed

    def of_targets(self, targets: Tensor, mix: Mix | MixOfEach) -> Tensor:
        """Targets [B, K] float, mixed: each counts by its share of the image."""
        if isinstance(mix, MixOfEach):
            return _blended_by(targets, self._partners(targets), mix.shares)
        return self._blended(targets, mix.share)

    def _blended(self, tensor: Tensor, share: float) -> Tensor:
        if share == 1:
            return tensor
        if tensor.device.type == "cpu" and self.partner == "reversed":
            return _blended_in_pairs(tensor, share)
        return self._partners(tensor).mul_(1 - share).add_(tensor, alpha=share)


@dataclass(frozen=True)
class UnitMixes:
    """The mixes of a micro-batch of B images; images and targets given to it are used up.

    units: the images of each unit, with its mix. own_rows: which of the mixed images are kept, [N]
    int64: on a rank that has partners of others, fewer than B.
    """

    mixing: Mixing
    units: Sequence[tuple[slice, Mix | MixOfEach]]
    num_images: int
    own: Sequence[slice] | None = None

    @property
    def own_rows(self) -> np.ndarray:
        """[N] int, the rows of the images that are trained on here."""
        rows = np.arange(self.num_images)
        return rows if self.own is None else np.concatenate([rows[each] for each in self.own])

    def of_images(self, images: Tensor) -> Tensor:
        """[B, C, H, W] float to [N, C, H, W]."""
        return self._each(images, self.mixing.of_images)

    def of_targets(self, targets: Tensor) -> Tensor:
        """[B, K] float to [N, K]."""
        return self._each(targets, self.mixing.of_targets)

    def _each(self, tensor: Tensor, mixed: Callable[[Tensor, Mix | MixOfEach], Tensor]) -> Tensor:
        if len(self.units) == 1:
            tensor = mixed(tensor, self.units[0][1])
        else:
            for places, mix in self.units:
                tensor[places] = mixed(tensor[places], mix)
        return tensor if self.own is None else torch.cat([tensor[rows] for rows in self.own])


def _blended_by(tensor: Tensor, partners: Tensor, shares: np.ndarray) -> Tensor:
    """Each one with its partner, by a share of its own: [B, ...] float, shares [B]."""
    own = on(tensor.device, shares).to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
    return tensor * own + partners * (1 - own)


def _blended_in_pairs(tensor: Tensor, share: float) -> Tensor:
    """Each one and its partner where they lie: on a CPU so little at a time stays in its cache."""
    for place in range((len(tensor) + 1) // 2):
        first, last = tensor[place], tensor[len(tensor) - 1 - place]
        mixed = torch.mul(last, 1 - share).add_(first, alpha=share)
        last.copy_(torch.mul(first, 1 - share).add_(last, alpha=share))
        first.copy_(mixed)
    return tensor


class Mixup(Mixing):
    """Whole images blended: share * own + (1 - share) * partner, share ~ Beta(alpha, alpha).

    Source: Zhang et al. 2017, arXiv:1710.09412.
    """

    name: Literal["mixup"] = "mixup"
    example: ClassVar[dict[str, Any]] = {"alpha": 0.2, "partner": "reversed"}
    alpha: Alpha

    def choose(self, which: float) -> tuple[float, bool]:
        return self.alpha, False


class CutMix(Mixing):
    """A box pasted from the partner, of about 1 - Beta(alpha, alpha) of the area; targets follow
    the exact area.

    Source: Yun et al. 2019, arXiv:1905.04899.
    """

    name: Literal["cutmix"] = "cutmix"
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0, "partner": "reversed"}
    alpha: Alpha

    def choose(self, which: float) -> tuple[float, bool]:
        return self.alpha, True


class MixupOrCutMix(Mixing):
    """CutMix for cutmix_share of the mixing units, Mixup for the others.

    Source: Wightman et al. 2021, arXiv:2110.00476.
    """

    name: Literal["mixup_or_cutmix"] = "mixup_or_cutmix"
    example: ClassVar[dict[str, Any]] = {
        "mixup_alpha": 0.1, "cutmix_alpha": 1.0, "cutmix_share": 0.5, "partner": "reversed",
    }  # fmt: skip
    mixup_alpha: Alpha
    cutmix_alpha: Alpha
    cutmix_share: Annotated[float, Field(gt=0, lt=1)]

    def choose(self, which: float) -> tuple[float, bool]:
        has_box = which < self.cutmix_share
        return (self.cutmix_alpha if has_box else self.mixup_alpha), has_box


def _box(share: float, image_px: int, row: int, column: int) -> Box:
    """A square of about 1 - share of the image's area around (row, column), cut off at the border.

    The half side is floored: torchvision's rule, and timm's up to 1.0.26; later ones keep an odd
    last pixel.
    """
    half_px = int(math.sqrt(1 - share) * image_px) // 2
    top, bottom = max(row - half_px, 0), min(row + half_px, image_px)
    left, right = max(column - half_px, 0), min(column + half_px, image_px)
    return top, left, bottom, right


def one_hot_targets(labels: Tensor, num_classes: int, smoothing: float | None = None) -> Tensor:
    """Targets [B, num_classes] float32 of labels [B] int64: smoothing / K everywhere, the rest on
    the label.

    Source: Szegedy et al. 2015, arXiv:1512.00567.
    """
    off = (smoothing or 0.0) / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - (smoothing or 0.0) + off)
