"""All augmentations that come with the suite: to import them is to register them."""

from __future__ import annotations

from trainer.components.augmentation import Augmentation
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.lighting import Lighting
from trainer.components.rand_augment import RandAugment
from trainer.components.trivial_augment import TrivialAugment

__all__ = [
    "Augmentation",
    "Flip",
    "Lighting",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "TrivialAugment",
]
