"""On a CPU large images are turned by PIL: its bytes, for any number of channels, and what tensors
make within a level.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.components.pixels.geometry import INTERPOLATIONS, affine
from trainer.components.pixels.matrices import rotate
from trainer.components.pixels.operations import OPERATIONS, operate

PX = 130
FILL = (124, 0, 255, 7, 99)


def photo(num_channels):
    """Smooth shapes with edges and some noise, [4, C, PX, PX] uint8."""
    random = np.random.default_rng(num_channels)
    rows, columns = np.mgrid[:PX, :PX]
    waves = [
        np.sin(rows / (7 + 3 * each)) + np.cos(columns / (5 + 2 * each))
        for each in range(4 * num_channels)
    ]
    levels = (
        128
        + 50 * np.stack(waves).reshape(4, num_channels, PX, PX)
        + random.normal(0, 10, (4, num_channels, PX, PX))
    )
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("num_channels", [1, 2, 3, 5])
@pytest.mark.parametrize("filter_place", [1, 2])
def test_a_large_image_is_turned_as_pil_turns_each_channel(num_channels, filter_place):
    images, degrees, fill = (
        photo(num_channels),
        torch.tensor([-30.0, 4.5, 12.25, 29.0], dtype=torch.float64),
        FILL[:num_channels],
    )
    turned = operate(
        images,
        torch.full((4,), OPERATIONS.index("rotate")),
        degrees,
        torch.full((4,), filter_place),
        fill,
    )
    resample = Image.Resampling[INTERPOLATIONS[filter_place].upper()]
    for image, result, angle in zip(images, turned, degrees.tolist(), strict=True):
        for channel, moved, level in zip(image, result, fill, strict=True):
            expected = Image.fromarray(channel.numpy()).rotate(
                angle, resample=resample, fillcolor=level
            )
            assert np.array_equal(moved.numpy(), np.asarray(expected))
    by_tensors = affine(
        images, rotate(degrees.numpy(), PX, PX), np.full(4, filter_place), "xy", fill
    )
    differences = (turned.int() - by_tensors.int()).abs()
    assert differences.max() <= 1 and differences.float().mean() < 0.01


def test_what_came_in_stays():
    images = photo(3)
    before = images.clone()
    operate(
        images,
        torch.full((4,), OPERATIONS.index("rotate")),
        torch.full((4,), 20.0, dtype=torch.float64),
        torch.ones(4, dtype=torch.int64),
        FILL[:3],
    )
    assert torch.equal(images, before)
