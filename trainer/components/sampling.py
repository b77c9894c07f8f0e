"""How often each class is shown, where it is not as often as it has images."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np

from trainer.base.component import Component


class Sampling(Component):
    """How the draws of an epoch, as many as without it, are shared among the classes.

    Within a class all images are shown equally often, to within one: an image of a small class
    several times an epoch, each time cropped and augmented anew, of a large class perhaps not at
    all. A class's number of draws is its share of them, rounded up or down at random so that its
    mean over epochs is the share. `data.order` does both.
    """

    kind: ClassVar[str] = "sampling"

    @abstractmethod
    def shares(self, counts: np.ndarray, done_share: float) -> np.ndarray:
        """The share of each class in the draws of an epoch: [K] float64, their sum 1.

        counts: [K], training images of each class; one without any has no share. done_share: how
        much of the run is over when the epoch begins, in [0, 1).
        """


class Balanced(Sampling):
    """All classes alike.

    Source: Shen et al. 2016, arXiv:1512.05830 (class-aware sampling); Kang et al. 2020,
    arXiv:1910.09217 (q = 0).
    """

    name: Literal["balanced"] = "balanced"
    example: ClassVar[dict[str, Any]] = {}

    def shares(self, counts: np.ndarray, done_share: float) -> np.ndarray:
        return _normalized(counts > 0)


class SquareRoot(Sampling):
    """In proportion to the square root of the number of images.

    Source: Mahajan et al. 2018, arXiv:1805.00932; Kang et al. 2020, arXiv:1910.09217 (q = 1/2).
    """

    name: Literal["square_root"] = "square_root"
    example: ClassVar[dict[str, Any]] = {}

    def shares(self, counts: np.ndarray, done_share: float) -> np.ndarray:
        return _normalized(np.sqrt(counts))


class ProgressivelyBalanced(Sampling):
    """In proportion to the number of images in the first epoch, on a straight line towards all
    classes alike.

    Source: Kang et al. 2020, arXiv:1910.09217, equation 2, with t the epoch and T their number.
    """

    name: Literal["progressively_balanced"] = "progressively_balanced"
    example: ClassVar[dict[str, Any]] = {}

    def shares(self, counts: np.ndarray, done_share: float) -> np.ndarray:
        return (1 - done_share) * _normalized(counts) + done_share * _normalized(counts > 0)


def _normalized(numbers: np.ndarray) -> np.ndarray:
    return numbers / numbers.sum()
