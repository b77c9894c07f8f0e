"""timm models with weights from a file: what these say of classes, and of how images are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from trainer.base.json_text import json_file
from trainer.models.initialization import head_places
from trainer.models.weights import (
    RUN,
    TIMM,
    TORCHVISION,
    WeightsError,
    read_weights,
    weights_path,
)
from trainer.models.zoo import timm_name, torchvision_models


@dataclass(frozen=True)
class GivenWeights:
    """weights= as it was written, and what it stands for.

    word: as written. file, sha256: of `model.pretrained`. mean, std: per channel, what the weights
    expect images to be normalized by, in units where black is 0 and white is 1; empty where nobody
    says.
    """

    word: str
    file: str
    sha256: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def overrides(self, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
        """What a recipe is changed by, on data of this mean and deviation per channel: those of the
        weights come with them, as in timm's fine-tuning, where they differ.

        Weights for another number of channels say nothing of these.
        """
        made: dict[str, Any] = {
            "model.pretrained.file": self.file,
            "model.pretrained.sha256": self.sha256,
        }
        own, data = (self.mean, self.std), (tuple(mean), tuple(std))
        if own != data and [len(one) for one in own] == [len(one) for one in data]:
            made |= {"image.mean": self.mean, "image.std": self.std}
        return made


def given_weights(word: str, model: str, runs: Path) -> GivenWeights | None:
    """What weights= means for a timm model, read and hashed now; None where it is empty.

    Raises WeightsError.
    """
    if not word:
        return None
    name = word.removeprefix(RUN)
    given = str(runs / name) if (runs / name).is_dir() else word
    try:
        path = weights_path(given)
        sha256 = read_weights(path).sha256
    except WeightsError as error:
        raise error.raised_as(WeightsError, place="weights") from None
    facts = shown_as(model, given, path)
    mean, std = (tuple(map(float, facts.get(key) or ())) for key in ("mean", "std"))
    return GivenWeights(word, given, sha256, mean, std)


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
    try:
        config = timm.get_pretrained_cfg(timm_name(name))
    except RuntimeError:  # no such tag
        config = None
    facts = config.to_dict() if config else {}
    return facts | (own if isinstance(own, dict) and not is_named else {})


def config_beside(path: Path) -> dict[str, Any]:
    """The config.json beside a file of weights, as a run and timm write it; empty where there is
    none.
    """
    try:
        found = json_file(path.parent / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
