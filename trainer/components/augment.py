"""All augmentations that a page's `augment` list can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.lighting import Lighting
from trainer.components.rand_augment import RandAugment
from trainer.components.trivial_augment import TrivialAugment

Augmentation = Annotated[
    RandomResizedCrop | Flip | RandAugment | TrivialAugment | Lighting | RandomErasing,
    Field(discriminator="name"),
]
