"""Which sizes of images a model takes, and how it is made to take others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from trainer.base.errors import PlanError
from trainer.models.timm_options import without_weights
from trainer.models.zoo import timm_name

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan

TRIED_PX = (32, 64, 96, 128, 160, 192, 224)  # sizes to suggest where a model rejects one
# what some of timm's models raise over images of a size that they do not take
_REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError)


def size_options(plan: Plan) -> dict[str, Any]:
    """timm's arguments for a model of one image size, as most transformers are: it is built for the
    recipe's training images, and where it is shown another size too, its position embeddings are
    interpolated for that. Empty where the model as timm builds it takes all of these sizes, and
    where its class has no such arguments: `assemble` refuses it then.
    """
    image = plan.recipe.image
    test_px, _ = plan.recipe.of_task.evaluation_px(image)
    return size_options_of(plan.model, image.train_px, {test_px, *train_sizes(plan)})


def size_options_of(model: str, image_px: int, sizes: set[int]) -> dict[str, Any]:
    """The same of any timm model: built for image_px, shown all of the sizes."""
    config = timm.models.get_pretrained_cfg(timm_name(model))
    if config is None or not config.fixed_input_size:
        return {}
    options: dict[str, Any] = {}
    is_own = config.input_size[-1] == image_px or _takes_size(model, image_px)
    if not is_own and _takes_size(model, image_px, img_size=image_px):
        options["img_size"] = image_px
    others = sizes - {image_px}
    is_dynamic = options | {"dynamic_img_size": True}
    if not all(_takes_size(model, px, **options) for px in others) and all(
        _takes_size(model, px, **is_dynamic) for px in others
    ):
        options = is_dynamic
    return options


def _takes_size(model: str, image_px: int, **options: Any) -> bool:
    """Does a timm model with these arguments take images of a size? Asked on the meta device."""
    built = without_weights(model, **options)
    with torch.device("meta"):
        return built is not None and refusal(built, 3, image_px) is None


def check_sizes(plan: Plan, model: nn.Module) -> None:
    """Reject image sizes that the model does not support now, not at the first step or the first
    evaluation.
    """
    channels = plan.profile.channels
    # train_px comes last: where both sizes are equal, the message names it
    tested = dict([plan.recipe.of_task.evaluation_px(plan.recipe.image)])
    for image_px, place in (tested | train_sizes(plan)).items():
        reason = refusal(model, channels, image_px)
        if reason is not None:
            larger = [px for px in TRIED_PX if px > image_px]
            fitting_px = next(
                (
                    px
                    for px in (*larger, plan.recipe.image.train_px)
                    if px != image_px and refusal(model, channels, px) is None
                ),
                None,
            )
            remedy = f'set="{place}={fitting_px}"' if fitting_px else "another model="
            raise PlanError(
                f"{place}={image_px}: {plan.model} does not support this image size "
                f"({reason}); use {remedy}"
            )


def train_sizes(plan: Plan) -> dict[int, str]:
    """The largest and the smallest side of the training images, each with the recipe key that sets
    it.
    """
    image = plan.recipe.image
    return {image.train_px: "image.train_px"} | (
        {image.growth.from_px: "image.growth.from_px"} if image.growth else {}
    )


def refusal(model: nn.Module, channels: int, image_px: int) -> str | None:
    """Why a model does not support an image size, or None: from a forward pass of one blank image,
    in evaluation mode.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, image_px, image_px))
    except _REFUSALS as error:
        return _reason(error)
    finally:
        model.train(was_training)
    return None


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or error.__class__.__name__


def at_size(model: nn.Module, name: str, channels: int, image_px: int) -> nn.Module:
    """A model for images of a size, to be evaluated: itself where it takes them, else a copy whose
    position embeddings and windows its own set_input_size (timm's) has interpolated for them.

    Raises PlanError where neither takes them.
    """
    reason = refusal(model, channels, image_px)
    if reason is None:
        return model
    resized = copy.deepcopy(model)
    set_input_size: Callable[..., None] | None = getattr(resized, "set_input_size", None)
    if set_input_size is not None:
        try:
            set_input_size(img_size=(image_px, image_px))
            reason = refusal(resized, channels, image_px)
        except _REFUSALS as error:
            reason = _reason(error)
        if reason is None:
            return resized
    raise PlanError(
        f"test_px={image_px}: {name} does not support it ({reason})", "use another test_px="
    )
