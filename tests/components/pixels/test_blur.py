"""Blurs by tensor operations are PIL's to the bit, as a GPU has them."""

import numpy as np
import pytest
import torch

from trainer.components.pixels.blur import _box_blurred, box_blurred


@pytest.mark.parametrize("shape", [(3, 40, 57), (1, 5, 3), (2, 1, 9)])
def test_box_blurs_by_tensors_equal_pils(shape):
    radius = np.concatenate([np.linspace(0.01, 5.0, 60), [0.1, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    size = len(radius), *shape
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    assert torch.equal(_box_blurred(images, radius), box_blurred(images, radius))
