"""Look-up operations are those of PIL, value for value."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from trainer.components.pixels.lookup import FIXED, MEASURED, look_up


def looked_up(name, images, arguments):
    """The images after one operation of the given arguments [B]."""
    arguments = np.asarray(arguments, dtype=np.float64)
    if name in MEASURED:
        tables = MEASURED[name](images, arguments)
    else:
        tables = torch.from_numpy(FIXED[name](arguments).astype(np.uint8))[:, None]
    return look_up(images, tables.expand(-1, images.shape[1], -1))


def solarize_add(image, added):
    """timm's operation, written out: no PIL function has it."""
    values = np.asarray(image).astype(int)
    return Image.fromarray(
        np.where(values < 128, np.minimum(255, values + int(added)), values).astype(np.uint8)
    )


ORIGINALS = {
    "invert": (lambda image, _: ImageOps.invert(image), np.zeros(20)),
    "posterize": (lambda image, bits: ImageOps.posterize(image, int(bits)), np.arange(20) % 8 + 1),
    "solarize": (
        lambda image, threshold: ImageOps.solarize(image, threshold),
        np.linspace(0, 256, 20),
    ),
    "solarize_add": (solarize_add, np.linspace(0, 128, 20).astype(int)),
    "brightness": (
        lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
        np.linspace(0, 2, 20),
    ),
    "contrast": (
        lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
        np.linspace(0, 2, 20),
    ),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), np.zeros(20)),
    "equalize": (lambda image, _: ImageOps.equalize(image), np.zeros(20)),
}


def test_every_operation_has_an_original():
    assert ORIGINALS.keys() == FIXED.keys() | MEASURED.keys()


@pytest.mark.parametrize("name", ORIGINALS)
def test_photos_equal_pil(name, photos, batch, to_batch):
    original, arguments = ORIGINALS[name]
    expected = to_batch(
        [original(photo, argument) for photo, argument in zip(photos, arguments, strict=True)]
    )
    assert torch.equal(looked_up(name, batch, arguments), expected)


@pytest.mark.parametrize("name", ["contrast", "autocontrast", "equalize"])
@pytest.mark.parametrize("levels", [1, 2, 5, 256])
@pytest.mark.parametrize("size_px", [3, 16, 23])
def test_few_pixels_and_few_levels_equal_pil(name, levels, size_px, to_batch):
    random = np.random.default_rng(levels * 100 + size_px)
    pixels = random.integers(0, levels, (20, size_px, size_px, 3)) * (255 // levels)
    pixels = pixels + random.integers(0, 20, (20, 1, 1, 3))
    images = [Image.fromarray(image) for image in pixels.clip(0, 255).astype(np.uint8)]
    arguments = random.uniform(0, 2, 20)
    expected = to_batch([ORIGINALS[name][0](*pair) for pair in zip(images, arguments, strict=True)])
    assert torch.equal(looked_up(name, to_batch(images), arguments), expected)


def test_no_bits_leave_black(batch):
    assert not looked_up("posterize", batch, np.zeros(20)).any()


def test_channels_are_looked_up_apart():
    images = torch.randint(
        0, 256, (2, 5, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    apart = [
        looked_up("equalize", images[:, channel : channel + 1], np.zeros(2)) for channel in range(5)
    ]
    assert torch.equal(looked_up("equalize", images, np.zeros(2)), torch.cat(apart, 1))
