"""Affine sampling is PIL's, for any matrix, filter, size and number of channels."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.components.pixels.geometry import INTERPOLATIONS, affine

RESAMPLES = [Image.Resampling[name.upper()] for name in INTERPOLATIONS]


def random_matrices(num_images, width, height, seed):
    """Turned, stretched, sheared and moved at random, about the middle."""
    random = np.random.default_rng(seed)
    matrices = np.tile([1.0, 0, 0, 0, 1.0, 0], (num_images, 1)) + random.normal(
        0, 0.3, (num_images, 6)
    )
    matrices[:, [2, 5]] = random.normal(0, 0.1, (num_images, 2)) * [width, height]
    return matrices


@pytest.mark.parametrize("filter_place", range(3))
@pytest.mark.parametrize("size_px", [(53, 71), (8, 8), (3, 5), (1, 1)])
def test_any_matrix_equals_pil(filter_place, size_px, photos, to_batch):
    height, width = size_px
    small = [photo.resize((width, height)) for photo in photos]
    matrices = random_matrices(20, width, height, seed=filter_place)
    fill = (1, 200, 255)
    expected = [
        image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix.tolist(),
            RESAMPLES[filter_place],
            fillcolor=fill,
        )
        for image, matrix in zip(small, matrices, strict=True)
    ]
    moved = affine(to_batch(small), matrices, np.full(20, filter_place), "xy", fill)
    differences = (moved.int() - to_batch(expected).int()).abs()
    assert differences.max() <= (0 if filter_place == 0 else 1)
    assert differences.float().mean() < 0.01


def test_filters_may_be_mixed(batch):
    matrices = random_matrices(20, 71, 53, seed=3)
    filters = np.arange(20) % 2 + 1
    mixed = affine(batch, matrices, filters, "xy", (0, 0, 0))
    for place in (1, 2):
        alone = affine(batch, matrices, np.full(20, place), "xy", (0, 0, 0))
        assert torch.equal(mixed[filters == place], alone[filters == place])


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 7])
def test_channels_are_moved_alike(num_channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (3, num_channels, 12, 10), dtype=torch.uint8, generator=generator
    )
    fill = (255, 0, 1, 128, 254, 3, 77)[:num_channels]
    matrices, filters = random_matrices(3, 10, 12, seed=4), np.full(3, 2)
    moved = affine(images, matrices, filters, "xy", fill)
    for channel in range(num_channels):
        alone = affine(
            images[:, channel : channel + 1], matrices, filters, "xy", fill[channel : channel + 1]
        )
        assert torch.equal(moved[:, channel : channel + 1], alone)


def test_one_colour_stays_exactly(batch):
    plain = torch.full_like(batch, 201)
    assert (
        affine(plain, random_matrices(20, 71, 53, 5), np.full(20, 2), "xy", (201, 201, 201)) == 201
    ).all()


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("px", [8, 31, 64])
def test_moves_along_one_axis_are_those_of_the_general_road_bit_for_bit(axis, px):
    rng = np.random.default_rng(px)
    images = torch.from_numpy(rng.integers(0, 256, (12, 5, px, px + 3), dtype=np.uint8))
    matrices = np.tile([1.0, 0, 0, 0, 1.0, 0], (12, 1))
    columns = (1, 2) if axis == "x" else (3, 5)
    matrices[:, columns] = np.stack([rng.uniform(-1, 1, 12), rng.uniform(-px, px, 12)], 1)
    matrices[:3, columns] = [(0, 0.5), (0, -2), (0.25, 0.125)]
    for filters in (np.full(12, 1), np.full(12, 2), np.arange(12) % 2 + 1):
        moved = affine(images, matrices, filters, axis, (7, 100, 200, 3, 255))
        assert torch.equal(moved, affine(images, matrices, filters, "xy", (7, 100, 200, 3, 255)))
