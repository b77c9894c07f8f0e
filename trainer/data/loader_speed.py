"""How many images a core makes ready for a GPU, as measured."""

from __future__ import annotations

import math

# Photographs of ImageNet, random crops of 224 px, images a second and core: with two loader
# processes on two cores. Measured: results/bench/loader-224.json.
CORE_IMAGES_PER_S = 556.0
DECODED_ONCE_IMAGES_PER_S = 748.0  # where an image is shown three times in a step
FFCV_IMAGES_PER_S = 2083.0  # from a .beton of pixels at 256 px

# What a GPU then takes: NVIDIA's DeepLearningExamples 729963dd, mixed precision, one A100 of 80 GB.
A100_RESNET50_IMAGES_PER_S = 2470.0


def core_images_per_s(repeats: int | None, world_size: int) -> float:
    """Images a second and core, by the torch loader. Ranks that share a step's repeats of an image
    decode it each for itself.
    """
    return DECODED_ONCE_IMAGES_PER_S if repeats and world_size == 1 else CORE_IMAGES_PER_S


def cores_for(images_per_s: float, per_core: float = CORE_IMAGES_PER_S) -> int:
    """Cores that keep a GPU of this speed busy."""
    return math.ceil(images_per_s / per_core)
