"""The draws that augmentations are asked for."""

import numpy as np


def make_ids(num_images: int, epoch: int = 0) -> np.ndarray:
    """Of so many samples in one epoch: [num_images, 3] = (epoch, image, repeat)."""
    return np.stack(
        [np.full(num_images, epoch), np.arange(num_images), np.zeros(num_images, int)], axis=1
    )
