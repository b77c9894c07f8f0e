"""All augmentations that a page's `augment` list can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.ingredients.crops import Flip, RandomResizedCrop
from trainer.ingredients.erasing import RandomErasing
from trainer.ingredients.lighting import Lighting
from trainer.ingredients.rand_augment import RandAugment
from trainer.ingredients.trivial_augment import TrivialAugment

Augmentation = Annotated[
    RandomResizedCrop | Flip | RandAugment | TrivialAugment | Lighting | RandomErasing,
    Field(discriminator="name"),
]
