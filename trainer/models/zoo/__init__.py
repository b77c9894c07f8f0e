"""Models of the literature that timm lacks, and torchvision's; importing this folder registers them
with timm.
"""

from timm.models import model_entrypoint

from trainer.models.zoo import (
    airbench,
    cct,
    condensenet_v2,
    cvt,
    ea_resnet,
    pvt,
    shufflenet_v1,
    t2t_vit,
    torchvision_models,
    vit_32,
    vit_plain,
)
from trainer.models.zoo.torchvision_models import timm_name

__all__ = [
    "airbench", "cct", "condensenet_v2", "cvt", "ea_resnet", "has_model", "pvt", "shufflenet_v1",
    "t2t_vit", "timm_name", "torchvision_models", "vit_32", "vit_plain",
]  # fmt: skip


def has_model(name: str) -> bool:
    """Is a model one of these, not of timm's own?"""
    return model_entrypoint(timm_name(name)).__module__.startswith(f"{__name__}.")
