"""Does an exported file answer as the model does?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.base.errors import UserError
from trainer.base.settings import Settings
from trainer.base.streams import uniforms
from trainer.inference.classifier import Classifier, ImageFacts
from trainer.inference.export.formats import Engine
from trainer.models.edit.hooks import converted
from trainer.models.trained import num_logits
from trainer.tasks.views import viewed

_TIE_SHARE = 1e-4  # of an image's range of logits: two so near are equally good answers
_MOST_SHARE = 0.01  # of it, by which a logit may differ
NUM_DRAWN = 9  # in batches of 8 and 1


@dataclass(frozen=True)
class Agreement:
    """num_answers: of the images, or of all their pixels. max_difference: the largest of two
    logits; max_share: the largest as a share of the answer's range of logits. num_same: answers of
    the same top-1 class. num_ties: others whose two classes are within rounding of each other.
    """

    num_images: int
    num_answers: int
    num_same: int
    num_ties: int
    max_difference: float
    max_share: float

    @property
    def is_good(self) -> bool:
        """The same function, to rounding."""
        return self.num_same + self.num_ties == self.num_answers and self.max_share <= _MOST_SHARE

    def __str__(self) -> str:
        ties = f" and {self.num_ties} ties" if self.num_ties else ""
        of = f"{self.num_images:,} images"
        if self.num_answers != self.num_images:
            of = f"{self.num_answers:,} pixels of {of}"
        return (
            f"top-1 the same on {self.num_same:,}{ties} of {of}, largest difference of a logit"
            f" {self.max_difference:.2g}"
        )


class _Ran(nn.Module):
    """An exported file in a model's place."""

    def __init__(self, engine: Engine, num_classes: int):
        super().__init__()
        self.engine, self.num_classes = engine, num_classes

    def forward(self, images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(self.engine(images.numpy()))
        except Exception as error:  # whatever another program's engine raises
            reason = " ".join(str(error).split())[-200:]
            raise UserError(
                f"the exported model does not run on {len(images)} images ({reason})",
                "use another format",
            ) from error


class _Viewed(nn.Module):
    """The mean of a model's logits for all views of an image."""

    def __init__(self, model: nn.Module, is_mirrored: bool, translate_px: int | None):
        super().__init__()
        self.model, self.is_mirrored, self.translate_px = model, is_mirrored, translate_px

    def forward(self, images: Tensor) -> Tensor:
        return viewed(self.model, images, self.is_mirrored, self.translate_px)


def as_exported(classifier: Classifier) -> nn.Module:
    """The module whose logits are the classifier's, in its form for use: all views of an
    evaluation.
    """
    model = converted(classifier.model)
    views = classifier.test_flip, classifier.test_translate_px
    return _Viewed(model, *views).eval() if any(views) else model


def ran_by(classifier: Classifier, engine: Engine) -> Classifier:
    """The same classifier with its logits from an exported file."""
    number = len(classifier.classes) or num_logits(classifier.model)
    return replace(classifier, model=_Ran(engine, number), test_flip=False, test_translate_px=None)


def compare(
    classifier: Classifier,
    exported: Classifier,
    batches: Iterable[Tensor],
    settings: Settings,
    each: Callable[[int], None] = lambda number: None,
) -> Agreement:
    """The logits of both on batches of images [B, C, px, px] uint8. each: called with the number
    of images after every batch.
    """
    num_images = num_answers = num_same = num_ties = 0
    largest = largest_share = 0.0
    for images in batches:
        both = (one.logits(images, settings).double() for one in (classifier, exported))
        ours, theirs = (one.movedim(1, -1).flatten(0, -2) for one in both)  # pixels as answers
        spread = ours.amax(1) - ours.amin(1)
        apart = (ours - theirs).abs().amax(1).nan_to_num(torch.inf)
        chosen = theirs.argmax(1)
        behind = ours.amax(1) - ours.gather(1, chosen[:, None])[:, 0]
        is_same = chosen == ours.argmax(1)
        num_same += int(is_same.sum())
        num_ties += int((~is_same & (behind <= _TIE_SHARE * spread)).sum())
        largest = max(largest, float(apart.max()))
        largest_share = max(largest_share, float((apart / spread.clamp(min=1e-12)).max()))
        num_images += len(images)
        num_answers += len(ours)
        each(len(images))
    return Agreement(num_images, num_answers, num_same, num_ties, largest, largest_share)


def drawn_batches(image: ImageFacts) -> Iterator[Tensor]:
    """A fixed few images of soft colours [B, C, px, px] uint8, where nobody has given photos: of
    two batch sizes.
    """
    side, places = 7, np.arange(NUM_DRAWN)
    colours = uniforms(0, "export", places, image.channels * side * side)
    coarse = torch.from_numpy(colours).float().view(-1, image.channels, side, side)
    px = image.test_px
    images = functional.interpolate(255 * coarse, (px, px), mode="bicubic", align_corners=False)
    pixels = images.round().clamp(0, 255).byte()
    yield pixels[:-1]
    yield pixels[-1:]
