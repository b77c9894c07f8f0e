"""Greys and blends are those of PIL, value for value."""

import numpy as np
import torch
from PIL import Image, ImageEnhance

from trainer.components.pixels.color import blend, color, grey, to_bytes


def test_grey_equals_pil_on_every_kind_of_colour():
    values = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(values).convert("L"))
    assert np.array_equal(
        grey(torch.from_numpy(values).permute(2, 0, 1)[None])[0].numpy(), expected
    )


def test_color_equals_pil(photos, batch, to_batch):
    factors = np.linspace(0, 2, 20)
    expected = [
        ImageEnhance.Color(photo).enhance(factor)
        for photo, factor in zip(photos, factors, strict=True)
    ]
    assert torch.equal(color(batch, factors), to_batch(expected))


def test_blend_equals_pil_within_and_beyond(photos, batch, to_batch):
    other = photos[::-1]
    factors = np.linspace(-0.5, 1.7, 20)
    expected = [Image.blend(*three) for three in zip(photos, other, factors, strict=True)]
    assert torch.equal(blend(batch.float(), batch.flip(0).float(), factors), to_batch(expected))


def test_bytes_are_clipped_and_truncated():
    values = torch.tensor([-3.0, -0.5, 0.99, 1.0, 254.999, 255.0, 256.0, 1e4])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
