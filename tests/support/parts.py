"""Every part of the model section as a test writes it: walked, so that a new one is there without
being named.
"""

import functools

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from support.plans import small_plan
from trainer.models.build import assemble
from trainer.models.edit.replacement import Part
from trainer.models.parts.depth import LayerScale
from trainer.models.spec import PARTS, Model
from trainer.recipe import check
from trainer.recipe.tree import plain

IMAGE_PX = 64
PAGE = "torchvision-v1"  # the shortest recipe


@register_model
def bottlenecks(pretrained=False, **options):
    """A whole ResNet of few channels, for tests: four stages of bottlenecks, one of them with a
    plain shortcut.
    """
    shape = {"block": Bottleneck, "layers": (1, 2, 1, 1), "channels": (32, 32, 32, 64)}
    return build_model_with_cfg(ResNet, "bottlenecks", pretrained, **shape, **options)


FAMILIES = ("bottlenecks", "test_convnext2")


def public_kinds(kind: type = Part) -> list[type[Part]]:
    below = [found for one in kind.__subclasses__() for found in public_kinds(one)]
    return below or [kind]


FOUND = [
    (key, kind) for key in PARTS for kind in check.kinds_in(Model.model_fields[key].annotation)
]
CASES = [*FOUND, ("layer_scale", LayerScale)]


def case_name(case) -> str:
    key, kind = case
    return check.tag_of(kind) or key


# The source's own bodies have 28 and 22 million weights.
SMALLER = {
    "body": {"depths": (1, 1, 2, 1), "widths": (32, 32, 64, 64)},
    "isotropic": {"depth": 3, "width": 32},
}


def written(case) -> str:
    """A part as set= has it, with the fields that its source has."""
    key, kind = case
    if kind is LayerScale:
        return f"model.layer_scale={kind.example['start']}"
    tag = check.tag_of(kind)
    given = (
        plain(check.check(kind, plain(kind.example)))
        | SMALLER.get(key, {})
        | ({"name": tag} if tag else {})
    )
    text = ", ".join(f"{name}: {_yaml(value)}" for name, value in given.items())
    return f"model.{key}={{{text}}}"


def _yaml(value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def plain_model(family: str) -> nn.Module:
    return assemble(small_plan(PAGE, model=family, overrides="drop_path=0.05"))[0]
