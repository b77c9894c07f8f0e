"""All augmentations that come with the suite: to import them is to register them."""

from __future__ import annotations

from trainer.components.aug_mix import AugMix
from trainer.components.augmentation import Augmentation
from trainer.components.auto_augment import AutoAugment
from trainer.components.crops import Flip, RandomResizedCrop, Resize
from trainer.components.erasing import RandomErasing
from trainer.components.letterbox import Letterbox
from trainer.components.lighting import Lighting
from trainer.components.moves import PadCrop, VerticalFlip
from trainer.components.photometric import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HueJitter,
    Solarize,
    ThreeAugment,
)
from trainer.components.rand_augment import RandAugment
from trainer.components.torchvision_augment import TorchvisionAutoAugment, TorchvisionRandAugment
from trainer.components.trivial_augment import TrivialAugment

__all__ = [
    "AugMix",
    "Augmentation",
    "AutoAugment",
    "ColorJitter",
    "Flip",
    "GaussianBlur",
    "Grayscale",
    "HueJitter",
    "Letterbox",
    "Lighting",
    "PadCrop",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "Resize",
    "Solarize",
    "ThreeAugment",
    "TorchvisionAutoAugment",
    "TorchvisionRandAugment",
    "TrivialAugment",
    "VerticalFlip",
]
