"""Lighting is AlexNet's colour jitter as pycls does it to images between 0 and 1, before they are
normalized.
"""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from support.draws import make_ids
from trainer.base.errors import UserError
from trainer.components.lighting import Lighting
from trainer.recipe.profiles import IMAGENET_MEAN, IMAGENET_STD

# Written down again from the source, blue first as OpenCV reads images there.
EIG_VALS = np.array([[0.2175, 0.0188, 0.0045]])
EIG_VECS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def source_colors(alpha):
    """What the source adds to (red, green, blue) of an image in [0, 1] for its three normal
    numbers.
    """
    return np.sum(
        EIG_VECS * np.repeat(alpha[None], 3, axis=0) * np.repeat(EIG_VALS, 3, axis=0), axis=1
    )


def test_the_directions_are_those_of_a_covariance():
    assert np.allclose(EIG_VECS.T @ EIG_VECS, np.eye(3), atol=1e-3)


def test_colors_are_distributed_as_the_sources():
    num_images, std = 20_000, 0.1
    color = Lighting(std=std).draw(0, make_ids(num_images), 8)["color"].astype(float) * IMAGENET_STD
    alpha = (
        color @ np.linalg.inv(EIG_VECS).T / EIG_VALS
    )  # solved for the normal numbers behind each colour
    for column in range(3):
        assert kstest(alpha[:, column] / std, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(alpha.T) - np.eye(3)).max() < 0.03
    expected = np.array([source_colors(one) for one in alpha[:50]])
    assert np.allclose(color[:50], expected, atol=1e-6)


def test_a_normalized_image_gets_what_the_source_adds_before_normalization():
    light, ids = Lighting(std=0.1), make_ids(4)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    drawn = {key: torch.from_numpy(value) for key, value in light.draw(1, ids, 5).items()}
    lit = light.apply((pixels - mean) / std, drawn, (0, 0, 0)) * std + mean
    added = lit - pixels
    assert torch.allclose(
        added, added[:, :, :1, :1].expand_as(added), atol=1e-6
    )  # one colour for the whole image
    colors = drawn["color"].double().numpy() * IMAGENET_STD
    assert np.allclose(added[:, :, 0, 0], colors, atol=1e-6)
    assert len(np.unique(colors.round(6), axis=0)) == 4


def test_a_draw_depends_on_its_own_address_alone():
    light, ids = Lighting(std=0.1), make_ids(40)
    drawn = light.draw(3, ids, 8)["color"]
    assert np.array_equal(drawn[[9, 2, 31]], light.draw(3, ids[[9, 2, 31]], 8)["color"])
    assert not np.array_equal(drawn, light.draw(4, ids, 8)["color"])


def test_images_without_three_colors_are_refused():
    light = Lighting(std=0.1)
    drawn = {key: torch.from_numpy(value) for key, value in light.draw(1, make_ids(2), 5).items()}
    with pytest.raises(UserError, match="augment.lighting.*have 1 channel;"):
        light.apply(torch.zeros(2, 1, 5, 5), drawn, (0,))
