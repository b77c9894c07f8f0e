"""Real photos, as PIL images and as one batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image


def _cut(photo, random):
    height, width = random.integers(60, 300, 2)
    top, left = random.integers(photo.shape[0] - height), random.integers(photo.shape[1] - width)
    return Image.fromarray(photo[top : top + height, left : left + width]).resize(
        (71, 53), Image.Resampling.BILINEAR
    )


@pytest.fixture(scope="session")
def photos():
    """Twenty pieces of two photos, 71 px wide and 53 px high."""
    whole = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    random = np.random.default_rng(0)
    return [_cut(whole[number % 2], random) for number in range(20)]


@pytest.fixture(scope="session")
def batch(photos):
    """The same photos: [20, 3, 53, 71] uint8."""
    return as_batch(photos)


def as_batch(images):
    """PIL images of one size: [B, 3, H, W] uint8."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


@pytest.fixture(scope="session")
def to_batch():
    """The function that makes a batch of PIL images."""
    return as_batch
