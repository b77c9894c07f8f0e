"""The trained model that a recipe's `distill` learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.base.errors import PlanError
from trainer.components.distillation import Distillation
from trainer.models.build import check_model_name
from trainer.models.initialization import is_head_loaded, load_file
from trainer.models.sizes import refusal, size_options_of, train_sizes
from trainer.models.timm_options import create_model
from trainer.models.trained import classes_in_file, shown_as
from trainer.models.weights import WeightsError, WeightsFile, read_weights, weights_path
from trainer.recipe.schema import Recipe, load_recipe

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan

_WEIGHTS, _TEACHER = ("distill", "weights"), ("distill", "teacher")


class Teacher(nn.Module):
    """A trained model in evaluation mode, asked for its logits without gradients.

    mean, std: per channel, as its images are normalized; own_mean, own_std: as the student's are.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.is_shown_alike = (tuple(mean), tuple(std)) == (tuple(own_mean), tuple(own_std))
        before, after, own, theirs = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (own_mean, mean, own_std, std)
        )
        self.register_buffer("scale", (own / theirs).float())
        self.register_buffer("shift", ((before - after) / theirs).float())
        self.eval()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, K] of the student's inputs [N, C, H, W]."""
        if not self.is_shown_alike:
            inputs = inputs.float() * self.scale + self.shift
        return self.model(inputs)


def hashed_teacher(recipe: Recipe) -> dict[str, Any]:
    """The override that says which file a recipe's teacher is; empty where it says so itself.

    Raises WeightsError.
    """
    distill = recipe.distill
    if distill is None or distill.weights is None or distill.sha256 is not None:
        return {}
    return {"distill.sha256": _file_of(distill).sha256}


def open_teacher(plan: Plan) -> Teacher | None:
    """The teacher of a plan, on the CPU; None where its recipe has none.

    torch's global generator is left as it was.

    Raises WeightsError for weights that are not given, not there, not the recipe's or not the
    teacher's, PlanError for a teacher of other classes, channels or image sizes than the data's.
    """
    distill, profile = plan.recipe.distill, plan.profile
    if distill is None:
        return None
    check_model_name(distill.teacher, ".".join(_TEACHER))
    weights = _file_of(distill)
    _check_plain(weights.path)
    shown = shown_as(distill.teacher, distill.weights or "", weights.path)
    if len(shown["mean"]) != profile.channels:
        _refuse(plan, f"is shown images of {len(shown['mean'])} channels", f"{profile.channels}")
    sizes = train_sizes(plan)
    name = distill.teacher.partition(".")[0]
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and at once written over
        options = size_options_of(name, plan.recipe.image.train_px, set(sizes))
        model = create_model(name, profile.num_classes, profile.channels, options)
    number = classes_in_file(model, weights.tensors)
    if number != profile.num_classes:
        _refuse(plan, f"knows {number:,} classes", f"{profile.num_classes:,}")
    try:
        loaded = load_file(model, weights, number, ".".join(_WEIGHTS))
    except WeightsError as error:
        raise error.raised_as(WeightsError, path=_WEIGHTS) from None
    if not is_head_loaded(model, [loaded]):
        raise WeightsError(
            f"distill.weights: {weights.path}: has no classifier of {name}",
            "use weights with one",
            path=_WEIGHTS,
        )
    for image_px, place in sizes.items():
        if reason := refusal(model, profile.channels, image_px):
            _refuse(plan, f"does not support {place} ({reason})", f"{image_px} px")
    return Teacher(model, shown["mean"], shown["std"], profile.mean, profile.std)


def _refuse(plan: Plan, what: str, of_data: str) -> None:
    assert plan.recipe.distill is not None
    raise PlanError(
        f"distill.teacher: {plan.recipe.distill.teacher} {what}, {plan.profile.name} has {of_data}",
        f"use a teacher that was trained on {plan.profile.name}",
        path=_TEACHER,
    )


def _file_of(distill: Distillation) -> WeightsFile:
    """The teacher's file, if it is the one. Raises WeightsError."""
    if distill.weights is None:
        raise WeightsError(
            f"distill.weights: this recipe learns from a {distill.teacher}, and its weights are not"
            " given",
            f'use set="distill.weights=timm:{distill.teacher.partition(".")[0]}.<tag>", a'
            " .safetensors or .pth file, or run:<a run's name>",
            path=_WEIGHTS,
        )
    try:
        weights = read_weights(weights_path(distill.weights))
    except WeightsError as error:
        found = f"distill.weights: {error.found}"
        raise error.raised_as(WeightsError, found=found, path=_WEIGHTS) from None
    if distill.sha256 not in (None, weights.sha256):
        raise WeightsError(
            f"distill.sha256: {weights.path} has {weights.sha256}, the recipe {distill.sha256}",
            "use the teacher's own file, or another sha256 for another run",
            path=("distill", "sha256"),
        )
    return weights


def _check_plain(path: Path) -> None:
    """A run whose recipe changed the model is not what timm builds, even where the names of the
    weights are the same. Raises WeightsError.
    """
    beside = path.parent / "recipe.yaml"
    if not beside.is_file():
        return
    recipe = load_recipe(beside)
    changed = ", ".join(f"model.{key}" for key, _ in recipe.model.parts()) if recipe.model else ""
    if not recipe.of_task.is_timms:
        changed = f"task {recipe.of_task.name}"
    if changed:
        raise WeightsError(
            f"distill.weights: {path.parent}: its run changed timm's model ({changed})",
            "use a run of the plain model",
            path=_WEIGHTS,
        )
