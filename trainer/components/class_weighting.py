"""Weights of classes in a loss, by the number of their training images."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from trainer.base.component import Component


class ClassWeighting(Component):
    """A rule by which a class of fewer training images counts for more.

    mean_over: the weights are scaled so that their mean is 1, over the classes, or over the
        training images, so that the loss keeps its size.
    """

    kind: ClassVar[str] = "class weighting"
    mean_over: Literal["classes", "images"]

    @abstractmethod
    def _weights(self, counts: np.ndarray) -> np.ndarray:
        """The weights [K] up to a factor, of classes that have so many images [K] float64."""

    def weights(self, counts: np.ndarray) -> tuple[float, ...]:
        """The weight of each class. counts: [K], its training images; one without any has the
        weight of one image.
        """
        counts = np.asarray(counts, dtype=np.float64)
        found = self._weights(np.maximum(counts, 1.0))
        shares = counts / counts.sum() if self.mean_over == "images" else 1 / len(counts)
        return tuple((found / (shares * found).sum()).tolist())


class Inverse(ClassWeighting):
    """One over the number of images; mean_over images: scikit-learn's "balanced"."""

    name: Literal["inverse"] = "inverse"
    example: ClassVar[dict[str, Any]] = {"mean_over": "images"}

    def _weights(self, counts: np.ndarray) -> np.ndarray:
        return 1 / counts


class InverseSquareRoot(ClassWeighting):
    """One over the square root of the number of images.

    Source: Mahajan et al. 2018, arXiv:1805.00932, who sample so.
    """

    name: Literal["inverse_square_root"] = "inverse_square_root"
    example: ClassVar[dict[str, Any]] = {"mean_over": "images"}

    def _weights(self, counts: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(counts)


class EffectiveNumber(ClassWeighting):
    """One over the effective number of images, (1 - beta**n) / (1 - beta): with beta near 1 of many
    images less than all count, as they overlap.

    Source: Cui et al. 2019, arXiv:1901.05555; their code's mean is 1 over the classes.
    """

    name: Literal["effective_number"] = "effective_number"
    beta: Annotated[float, Field(gt=0, lt=1)]
    example: ClassVar[dict[str, Any]] = {"beta": 0.999, "mean_over": "classes"}

    def _weights(self, counts: np.ndarray) -> np.ndarray:
        # expm1: 1 - beta**n of a beta within rounding of 1
        return (1 - self.beta) / -np.expm1(counts * np.log(self.beta))
