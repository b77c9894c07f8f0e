"""Each operation moves pixels as PIL does, in the same direction."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.components.pixels.geometry import affine
from trainer.components.pixels.matrices import MATRICES

FILL = (124, 116, 104)
ARGUMENTS = {
    "shear_x": np.linspace(-0.99, 0.99, 20),
    "shear_y": np.linspace(-0.99, 0.99, 20),
    "centered_shear_x": np.linspace(-0.99, 0.99, 20),
    "centered_shear_y": np.linspace(-0.99, 0.99, 20),
    "translate_x": np.linspace(-32, 32, 20),
    "translate_y": np.linspace(-24, 24, 20),
    "rotate": np.array([-180, -135, -90, -30, 0, 45, 90, 180, 270, *np.linspace(-40, 170, 11)]),
}


def original(name, photo, argument, resample):
    """The same movement by PIL itself."""
    if name == "rotate":
        return photo.rotate(argument, resample=resample, fillcolor=FILL)
    slope, (width, height) = np.tan(argument), photo.size
    entries = {
        "centered_shear_x": (1, slope, -slope * height / 2, 0, 1, 0),
        "centered_shear_y": (1, 0, 0, slope, 1, -slope * width / 2),
        "shear_x": (1, argument, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, argument, 1, 0),
        "translate_x": (1, 0, argument, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, argument),
    }
    return photo.transform(
        photo.size, Image.Transform.AFFINE, entries[name], resample=resample, fillcolor=FILL
    )


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_movements_equal_pil(name, interpolation, photos, batch, to_batch):
    arguments = (
        ARGUMENTS[name].round() if (name[0], interpolation) == ("t", "nearest") else ARGUMENTS[name]
    )
    resample = Image.Resampling[interpolation.upper()]
    expected = to_batch(
        [original(name, *pair, resample) for pair in zip(photos, arguments, strict=True)]
    )
    rule, axes = MATRICES[name]
    filters = np.full(20, ("nearest", "bilinear", "bicubic").index(interpolation))
    moved = affine(batch, rule(arguments, 53, 71), filters, axes, FILL)
    differences = (moved.int() - expected.int()).abs()
    assert differences.max() <= (0 if interpolation == "nearest" else 1)
    assert (
        differences.float().mean() < 0.01
    )  # whole values in exact arithmetic fall on either side when rounded


def test_rotation_by_quarters_is_exact():
    square = torch.randint(
        0, 256, (4, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    quarters = np.arange(4)
    turned = affine(
        square, MATRICES["rotate"][0](quarters * 90.0, 9, 9), np.full(4, 2), "xy", (0, 0, 0)
    )
    expected = torch.stack(
        [image.rot90(int(quarter), (1, 2)) for image, quarter in zip(square, quarters, strict=True)]
    )
    assert torch.equal(turned, expected)
