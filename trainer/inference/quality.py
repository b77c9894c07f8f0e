"""How good a model is: by class, by pair of classes, and whether it is as sure as it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.base.settings import Settings
from trainer.inference.classifier import Classifier

NUM_BINS = 15


@dataclass(frozen=True)
class Judged:
    """A model's answers on labelled images, one entry an image.

    labels, predicted: [N] int64. sureness: [N] float64, the softmax probability of the predicted
    class. of_label: [N] float64, that of the right one. rank: [N] int64, how many classes have a
    larger logit than the right one, or an equal one and a smaller number. classes: names, by
    number.
    """

    labels: np.ndarray
    predicted: np.ndarray
    sureness: np.ndarray
    of_label: np.ndarray
    rank: np.ndarray
    classes: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Images that were judged."""
        return len(self.labels)

    @property
    def num_top1(self) -> int:
        """Images whose class was the first answer."""
        return int((self.rank == 0).sum())

    @property
    def num_top5(self) -> int:
        """Images whose class was among the first five answers."""
        return int((self.rank < 5).sum())

    @cached_property
    def present(self) -> np.ndarray:
        """The numbers of the classes that have images here, ascending."""
        return np.unique(self.labels)

    def by_class(self) -> list[tuple[int, int, int]]:
        """(class, right, images) of each class present."""
        return [
            (int(one), int(((self.labels == one) & (self.rank == 0)).sum()),
             int((self.labels == one).sum()))
            for one in self.present
        ]  # fmt: skip

    def confusion(self) -> tuple[np.ndarray, np.ndarray]:
        """(counts [L, P] int64: of the images of a class, how many were taken for each; the classes
        [P] of the columns: those present and those they were taken for, ascending). The rows are
        the columns' classes too, empty where none has images.
        """
        shown = np.unique(np.concatenate([self.labels, self.predicted]))
        counts = np.zeros((len(shown), len(shown)), np.int64)
        rows, columns = np.searchsorted(shown, self.labels), np.searchsorted(shown, self.predicted)
        np.add.at(counts, (rows, columns), 1)
        return counts, shown

    def confused_pairs(self, most: int) -> list[tuple[int, int, int]]:
        """(class, taken for, images), the most frequent first, ties by number."""
        counts, shown = self.confusion()
        np.fill_diagonal(counts, 0)
        found = sorted(
            (-int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True)
        )  # ascending: the largest counts first
        return [(int(shown[i]), int(shown[j]), -n) for n, i, j in found[:most]]

    def worst(self, most: int) -> list[int]:
        """The wrong images, those first whose right class has the least probability."""
        order = np.argsort(self.of_label, kind="stable")
        return [int(place) for place in order if self.rank[place] > 0][:most]

    def calibration(self) -> list[tuple[float, float, int]]:
        """(mean sureness, share right, images) of each of NUM_BINS bins of equal width that has
        images; upper ends belong to their bins.
        """
        bins = np.clip(np.ceil(self.sureness * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
        right = self.rank == 0
        return [
            (float(self.sureness[bins == one].mean()), float(right[bins == one].mean()),
             int((bins == one).sum()))
            for one in np.unique(bins)
        ]  # fmt: skip

    def calibration_error(self) -> float:
        """Expected calibration error: the mean over images of how far sureness and share right are
        apart in their bin.

        Source: Guo et al. 2017, arXiv:1706.04599.
        """
        return sum(abs(sure - right) * n for sure, right, n in self.calibration()) / self.num_images


def judge(
    classifier: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: Settings,
    with_mirrored: bool = False,
    among: Sequence[int] | None = None,
    each: Callable[[int], None] = lambda number: None,
) -> Judged:
    """Ask about every image of batches (images [B, C, px, px] uint8, labels [B] int64). among: the
    only classes that may be answered, as ImageNet-A and -R score their 200; None: all. each: called
    with the number of images after every batch.
    """
    classifier = classifier.on(settings)
    kept: list[list[Tensor]] = []
    allowed = None if among is None else torch.tensor(among, device=settings.device)
    for pixels, labels in batches:
        logits = classifier.logits(pixels, settings, with_mirrored)
        if allowed is not None:
            others = torch.full_like(logits, -torch.inf)
            logits = others.index_copy(1, allowed, logits[:, allowed])
        judged = labels, *_judged(logits.cpu(), labels)
        kept.append([part.cpu() for part in judged])
        each(len(labels))
    found, predicted, sureness, of_label, rank = (
        torch.cat(parts).numpy() for parts in zip(*kept, strict=True)
    )
    num_classes = logits.shape[1]
    names = tuple(classifier.class_name(number) for number in range(num_classes))
    return Judged(found, predicted, sureness, of_label, rank, names)


def _judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    probabilities = torch.softmax(logits.double(), 1)
    predicted = logits.argmax(1)
    of_label = logits.gather(1, labels[:, None])
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > of_label) | ((logits == of_label) & (numbers < labels[:, None]))
    return (
        predicted,
        probabilities.gather(1, predicted[:, None])[:, 0],
        probabilities.gather(1, labels[:, None])[:, 0],
        before.sum(1),
    )
