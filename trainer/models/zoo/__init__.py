"""Models of the literature that timm lacks; importing this folder registers them with timm."""

from timm.models import model_entrypoint

from trainer.models.zoo import cct, cvt, pvt, shufflenet_v1, t2t_vit, vit_plain

__all__ = ["cct", "cvt", "has_model", "pvt", "shufflenet_v1", "t2t_vit", "vit_plain"]


def has_model(name: str) -> bool:
    """Is a model that timm knows one of these, not of timm's own?"""
    return model_entrypoint(name).__module__.startswith(f"{__name__}.")
