"""timm models with weights from a file: what these say of classes, and of how images are shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from trainer.base.json_text import json_file
from trainer.models.initialization import head_places
from trainer.models.weights import TIMM, TORCHVISION
from trainer.models.zoo import timm_name, torchvision_models


def num_logits(model: nn.Module) -> int:
    """How many classes a timm model answers with."""
    number = model.num_classes
    assert isinstance(number, int)
    return number


def classes_in_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Of a file: the rows of the classifier's weight, by timm's name of it."""
    heads = head_places(model)
    rows = (len(one) for name, one in tensors.items() if name.startswith(heads) and one.ndim > 1)
    return next(rows, num_logits(model))


def shown_as(model: str, weights: str, path: Path) -> dict[str, Any]:
    """What timm says of how images are shown to weights: by their tag, by the config.json beside
    them, else by the model's name.
    """
    own = config_beside(path).get("pretrained_cfg")
    is_named = weights.startswith((TIMM, TORCHVISION))
    name = weights.removeprefix(TIMM) if is_named else torchvision_models.tagged(model, path.name)
    config = timm.get_pretrained_cfg(timm_name(name))
    assert config is not None, "check_model_name"
    is_beside = isinstance(own, dict) and not is_named
    return config.to_dict() | (own if is_beside else {})


def config_beside(path: Path) -> dict[str, Any]:
    """The config.json beside a file of weights, as a run and timm write it; empty where there is
    none.
    """
    try:
        found = json_file(path.parent / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
