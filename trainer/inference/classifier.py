"""A trained model with all that it takes to ask it about an image, from a run or from timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from trainer.base.errors import PlanError
from trainer.base.settings import Settings
from trainer.components.crops import CropMode
from trainer.data.decode import RESAMPLING
from trainer.data.transforms import autocast, scored_inputs
from trainer.models.build import check_model_name
from trainer.models.initialization import is_head_loaded, load_file
from trainer.models.sizes import at_size
from trainer.models.trained import classes_in_file, config_beside, num_logits, shown_as
from trainer.models.weights import WeightsError, read_weights, weights_path
from trainer.models.zoo import timm_name
from trainer.runs.export import weights_digest
from trainer.runs.run_folder import open_model, recipe_of
from trainer.tasks.views import viewed

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ImageFacts:
    """How a model is shown an image, as its training's evaluation did.

    test_px: the side of the square; crop_share: of it, what is left of the shorter side after
    resizing, or of the sides that crop_mode says; mean, std: per channel, of values in [0, 1].
    """

    channels: int
    test_px: int
    crop_share: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: CropMode = "center"


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode on the CPU. name: for people. classes: the names of the logits,
    empty where nobody has given any; meanings: in words, where the names are codes.
    weights_sha256: of its parameters and buffers.
    """

    name: str
    model: nn.Module
    image: ImageFacts
    classes: tuple[str, ...]
    weights_sha256: str
    meanings: tuple[str, ...] = ()
    test_flip: bool = False  # its evaluation adds the mirrored images
    test_translate_px: int | None = None  # and images moved by so much
    gives_maps: bool = False  # its logits are [B, K, H, W], of each pixel

    def class_name(self, number: int) -> str:
        """The name of a logit, with its meaning: "n01440764 tench"."""
        if not self.classes:
            return str(number)
        name = self.classes[number]
        return f"{name} {self.meanings[number]}" if self.meanings else name

    def facts(self) -> dict[str, Any]:
        """What an answer depends on beside the image and the device."""
        return {"weights_sha256": self.weights_sha256, "image": vars(self.image)}

    def on(self, settings: Settings) -> Classifier:
        """The same on a run's device, in its memory format."""
        is_last = settings.is_channels_last(self.image.test_px)
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        model = self.model.to(settings.device).to(memory_format=memory_format)
        return replace(self, model=model)

    @torch.no_grad()
    def logits(self, images: Tensor, settings: Settings, with_mirrored: bool = False) -> Tensor:
        """Float32 logits [B, K], on the device, of images [B, C, H, W] uint8; with_mirrored: the
        mean with those of the mirrored images. As its evaluation sees them.
        """
        images = scored_inputs(images.to(settings.device), self.image, settings)
        with autocast(settings):
            is_mirrored = with_mirrored or self.test_flip
            return viewed(self.model, images, is_mirrored, self.test_translate_px)


def of_run(folder: Path, with_maps: bool = False) -> Classifier:
    """The trained model of a finished run. with_maps: one that names the class of each pixel too,
    of squares and without what its evaluation does beside, such as mirroring.

    Raises PlanError where there is none, or it names no such classes.
    """
    recipe, facts = recipe_of(folder)
    gives_maps = recipe.of_task.gives_maps
    if recipe.of_task.answers_with_pictures and not (gives_maps and with_maps):
        raise PlanError(
            f"{folder}: a run of {recipe.of_task.name}, whose model names no class of an image",
            "use predict without other sizes, or eval with run= alone",
        )
    model = open_model(folder)
    image, profile = recipe.image, facts["profile"]
    found = ImageFacts(
        profile["channels"],
        recipe.of_task.evaluation_px(image)[0],
        image.test_crop_share,
        image.test_interpolation,
        tuple(profile["mean"]),
        tuple(profile["std"]),
        image.test_crop_mode or "center",
    )
    names = _label_names(folder / "config.json", profile["num_classes"])
    digest = weights_digest(model)
    # an export of maps leaves mirroring to who uses it
    test_flip, test_translate_px = (
        (False, None) if gives_maps else (bool(image.test_flip), image.test_translate_px)
    )
    return Classifier(
        folder.name,
        model,
        found,
        names,
        digest,
        test_flip=test_flip,
        test_translate_px=test_translate_px,
        gives_maps=gives_maps,
    )


def of_weights(model: str, weights: str) -> Classifier:
    """A timm model with weights from a file, a folder or `timm:<model>.<tag>`; shown images as
    timm's facts of that model say.

    Raises PlanError for a model that timm does not have, WeightsError for weights that do not fit.
    """
    check_model_name(model)
    path = weights_path(weights)
    file = read_weights(path)
    bare = timm_name(model.partition(".")[0])
    made = timm.create_model(bare)
    head = classes_in_file(made, file.tensors)
    if head != num_logits(made):
        made = timm.create_model(bare, num_classes=head)
    loaded = load_file(made, file, head, "weights")
    if not is_head_loaded(made, [loaded]):
        raise WeightsError(f"{path}: has no classifier for {bare}", "use weights with one")
    facts = shown_as(model, weights, path)
    found = ImageFacts(
        facts["input_size"][0],
        (facts.get("test_input_size") or facts["input_size"])[-1],
        facts.get("test_crop_pct") or facts["crop_pct"],
        facts["interpolation"],
        tuple(facts["mean"]),
        tuple(facts["std"]),
        facts.get("crop_mode") or "center",
    )
    names = _label_names(path, head)
    meanings: tuple[str, ...] = ()
    if not names and head == _IMAGENET_CLASSES:
        imagenet = ImageNetInfo("imagenet-1k")
        names = tuple(imagenet.label_names())
        meanings = tuple(_first_word(imagenet.index_to_description(i)) for i in range(head))
    return Classifier(model, made.eval(), found, names, weights_digest(made), meanings)


def _first_word(description: str) -> str:
    """Of the words of a class: "tench, Tinca tinca"."""
    return description.partition(",")[0]


def shown_otherwise(classifier: Classifier, changes: Mapping[str, Any]) -> Classifier:
    """The same model, shown images with some facts changed; at another size with its position
    embeddings interpolated, where it has such. Raises PlanError for a value that does not make
    sense.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    image = replace(classifier.image, **given)
    if image.interpolation not in RESAMPLING:
        raise PlanError(
            f"interpolation={image.interpolation}: unknown", f"use {', '.join(RESAMPLING)}"
        )
    model = at_size(classifier.model, classifier.name, image.channels, image.test_px)
    return replace(classifier, model=model, image=image)


def _label_names(path: Path, number: int) -> tuple[str, ...]:
    """The names of so many classes in the config.json beside a file; empty where there are none."""
    names = config_beside(path).get("label_names")
    if not isinstance(names, list) or len(names) != number:
        return ()
    return tuple(names) if all(isinstance(one, str) for one in names) else ()
