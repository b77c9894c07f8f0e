"""Colours of whole images moved along the axes on which ImageNet's colours vary."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from scipy.special import ndtri
from torch import Tensor

from trainer.base.component import Positive
from trainer.base.streams import uniforms
from trainer.components.augmentation import InKernel, OfNormalized
from trainer.components.transfer import on

# Eigenvalues and eigenvectors of the covariance of ImageNet's colours, rows red, green and blue,
# column k for value k: the numbers that fb.resnet.torch published and pycls uses.
_VALUES = np.array([0.2175, 0.0188, 0.0045])
_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
# The same images' deviations: what one unit of a normalized image is in a colour.
_STD = np.array([0.229, 0.224, 0.225])


class Lighting(OfNormalized):
    """One colour is added to the whole image: a random mixture of the three main directions of
    ImageNet's colours.

    std: deviation of the three normal numbers that are multiplied with the directions' eigenvalues.

    The image is normalized already, and the colour is divided by ImageNet's deviations: on ImageNet
    that is the same as adding it before. Nothing is clipped or rounded.

    Raises UserError for images that have not three channels.
    Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural
    networks", as pycls does it.
    """

    name: Literal["lighting"] = "lighting"
    std: Positive
    purpose: ClassVar[str] = "lighting"
    keeps_places: ClassVar[bool] = True
    needs_rgb: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"std": 0.1}

    def draw(
        self, seed: int, ids: np.ndarray, image_px: int, num_channels: int = 3
    ) -> dict[str, np.ndarray]:
        """The colour of each image, for ids [B, 3] (epoch, sample, repeat); image_px plays no part.

        Gives color [B, 3] float32 in units of a normalized image: red, green, blue.
        """
        # A draw is a multiple of 2**-32, 0 among them: half a unit more keeps the normal number
        # finite.
        strengths = self.std * ndtri(uniforms(seed, self.purpose, ids, 3) + 2.0**-33)
        return {"color": (strengths * _VALUES @ _VECTORS.T / _STD).astype(np.float32)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor], fill: tuple[int, ...]) -> Tensor:
        """Adds the drawn colours: images [B, 3, H, W] float, normalized, to the same. `fill` is not
        used.
        """
        self.check_channels(images.shape[1])
        return images + on(images.device, drawn["color"].numpy()).to(images.dtype)[:, :, None, None]

    def in_kernel(self, drawn: dict[str, Tensor]) -> InKernel:
        return InKernel(colour=drawn["color"].numpy())
