"""Smoothing and sharpening are those of PIL, value for value."""

import numpy as np
import torch
from PIL import ImageEnhance, ImageFilter

from trainer.components.pixels.filters import sharpness, smooth


def test_smooth_equals_pil(photos, batch, to_batch):
    expected = to_batch([photo.filter(ImageFilter.SMOOTH) for photo in photos])
    assert torch.equal(smooth(batch.float()), expected.float())


def test_sharpness_equals_pil(photos, batch, to_batch):
    factors = np.linspace(0, 2, 20)
    expected = [
        ImageEnhance.Sharpness(photo).enhance(factor)
        for photo, factor in zip(photos, factors, strict=True)
    ]
    assert torch.equal(sharpness(batch, factors), to_batch(expected))
