"""timm models with a recipe's options, initialized from the run's seed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.base import streams
from trainer.base.errors import PlanError, did_you_mean
from trainer.models.edit.layer_kinds import FROZEN_NORMS, AnyBatchNorm, RunningNorm, can_join
from trainer.models.edit.replacement import Replacement, is_norm
from trainer.models.freezing import freeze_for_good
from trainer.models.initialization import initialize_weights, scale_head
from trainer.models.parts.depth import LayerScale
from trainer.models.parts.norm_layers import StepNorm
from trainer.models.whitening import whiten
from trainer.models.zoo import timm_name, torchvision_models

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan

# The recipe's name of an option -> timm's.
_OPTIONS = {
    "zero_init_last": "zero_init_last",
    "layer_scale": "ls_init_value",
    "head_init_scale": "head_init_scale",
    "dropout": "drop_rate",
    "attention_dropout": "attn_drop_rate",
    "projection_dropout": "proj_drop_rate",
    "patch_px": "patch_size",
}
# what some of timm's models raise over images of a size that they do not take
_REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError)
_TRIED_PX = (32, 64, 96, 128, 160, 192, 224)  # sizes to suggest where a model rejects one


def check_model_name(model: str, place: str = "model") -> None:
    """Refuse a model that neither timm nor, as `torchvision:<name>`, torchvision has. place: what
    names it.

    Raises PlanError with the nearest name.
    """
    if model.startswith("torchvision"):
        torchvision_models.check_name(model)
        return
    # is_model looks only at what stands before the first point
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", model) or not timm.is_model(model):
        near, other = "", torchvision_models.name_where_timm_lacks_it(model)
        if other == model:
            near, other = did_you_mean(model, torchvision_models.known_models()), "resnet50"
        raise PlanError(f"{place}={model}: timm has no such model{near}; use {place}={other}")
    try:
        timm.models.get_pretrained_cfg(model)
    except RuntimeError:
        name, _, tag = model.partition(".")
        raise PlanError(
            f"{place}={model}: timm has no pretrained weights {tag!r} for {name}; "
            f"use {place}={name}, which starts from random weights"
        ) from None


def build_model(plan: Plan) -> nn.Module:
    """The model of a plan, its initial weights a function of the seed alone. See `assemble`."""
    return assemble(plan)[0]


def assemble(plan: Plan) -> tuple[nn.Module, tuple[Replacement, ...]]:
    """The model of a plan, and what each part of its recipe's `model` section replaced in it.

    timm and the parts sample from torch's global generator, which is forked here and left as it
    was.

    Raises PlanError for an unknown model, for image sizes or options that it does not support, and
    for running statistics that its norms do not keep or would compute from a single value;
    ReplacementError for a part that finds nothing to replace.
    """
    check_model_name(plan.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.torch_seed(plan.seed, "weights"))
        model, replacements = assembled(plan)
        replacements += initialize_weights(model, plan.recipe.model, plan.profile.num_classes)
        if plan.recipe.model and plan.recipe.model.whitening:
            replacements += (whiten(model, plan.recipe.model.whitening, plan),)
        model = plan.recipe.of_task.model_of(plan, model)
        _check_sizes(plan, model)
        _check_sample(plan, model)
        _check_joined(plan, model)
        check_precise_norm(plan, model)
        if plan.recipe.model and plan.recipe.model.freeze:
            _check_frozen(plan, model)
            freeze_for_good(model, plan.recipe.model.freeze)
    return model, replacements


def assembled(plan: Plan) -> tuple[nn.Module, tuple[Replacement, ...]]:
    """The timm model with the recipe's parts, before its task makes a model of it: initialized from
    torch's global generator as it stands.
    """
    section, image_px = plan.recipe.model, plan.recipe.image.train_px
    options = _model_options(plan) | size_options(plan) | plan.recipe.of_task.model_options()
    parts = [] if section is None else [part for _, part in section.parts()]
    layer_scale, head_scale = options.get("ls_init_value"), options.get("head_init_scale")
    if layer_scale is not None and not takes_option(plan.model, ls_init_value=layer_scale):
        del options["ls_init_value"]
        if takes_option(plan.model, init_values=layer_scale):  # ViTs and their kin
            options["init_values"] = layer_scale
        else:
            parts.append(LayerScale(start=layer_scale))
    is_timms = head_scale is None or takes_option(plan.model, head_init_scale=head_scale)
    if not is_timms:
        del options["head_init_scale"]
    model = create_model(plan.model, plan.profile.num_classes, plan.profile.channels, options)
    if plan.recipe.distill:
        train_both_heads(model)
    replacements = tuple(part.apply(model, image_px) for part in parts)
    if head_scale is not None and not is_timms:
        replacements += (scale_head(model, head_scale),)
    return model, replacements


def train_both_heads(model: nn.Module) -> bool:
    """Let a timm model that has a head for a teacher answer, in training, with both of its heads;
    gives whether it has one. In evaluation it answers with their mean all the same.
    """
    train_apart = getattr(model, "set_distilled_training", None)
    if train_apart is not None:
        train_apart(True)
    return train_apart is not None


def takes_option(model: str, **option: Any) -> bool:
    """Does the class of a timm model accept an option, and this value of it?"""
    return _without_weights(model, **option) is not None


def _without_weights(model: str, **options: Any) -> nn.Module | None:
    """A timm model on the meta device; None where its class does not take the options."""
    try:
        with torch.device("meta"):
            return timm.create_model(timm_name(model), **options)
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return None


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
    built = _without_weights(model, **options)
    with torch.device("meta"):
        return built is not None and refusal(built, 3, image_px) is None


def _check_sizes(plan: Plan, model: nn.Module) -> None:
    """Reject image sizes that the model does not support now, not at the first step or the first
    evaluation.
    """
    channels = plan.profile.channels
    # train_px comes last: where both sizes are equal, the message names it
    tested = dict([plan.recipe.of_task.evaluation_px(plan.recipe.image)])
    for image_px, place in (tested | train_sizes(plan)).items():
        reason = refusal(model, channels, image_px)
        if reason is not None:
            larger = [px for px in _TRIED_PX if px > image_px]
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


def _check_sample(plan: Plan, model: nn.Module) -> None:
    """Reject batch statistics of a single value, as of one image with a 1x1 map: torch raises at
    such a step. Reject a last step of one image where all others have larger samples.
    """
    batch, rest = plan.recipe.batch, plan.window_images(plan.steps_per_epoch - 1)
    if rest == 1 and batch.norm_images > 1:
        named = (
            name for name, norm in model.named_modules() if is_norm(norm) and has_statistics(norm)
        )
        name = next(named, None)
        if name is not None:
            raise PlanError(
                f"the last step of an epoch would hold one image ({plan.profile.num_train} images,"
                f" {batch.images} per step), and {name} of {plan.model} takes batch statistics",
                "use batch.drop_last=true",
                path=("batch", "images"),
            )
    steps = (0, plan.steps_per_epoch - 1)  # any full step, and the last, which may be smaller
    least_images = min(
        plan.window_images(step) // (plan.micro_batches(step) * plan.norm_samples(step))
        for step in steps
    )
    if least_images * (plan.recipe.augment_splits or 1) > 1:
        return
    channels = plan.profile.channels
    for image_px, place in train_sizes(plan).items():
        name = _single_value(model, channels, image_px)
        if name is not None:
            larger = (
                px
                for px in _TRIED_PX
                if px > image_px and _single_value(model, channels, px) is None
            )
            fitting_px = next(larger, None)
            remedy = f', or larger images (set="{place}={fitting_px}")' if fitting_px else ""
            raise PlanError(
                f"batch.norm_images {plan.recipe.batch.norm_images}: {name} gets a 1x1 feature map "
                f"from images of {image_px} px ({place}), so its batch statistics would be of one "
                f"value; use batch.norm_images of 2 or more{remedy}"
            )


def _single_value(model: nn.Module, channels: int, image_px: int) -> str | None:
    """The first norm with batch statistics that gets one value per channel from one image of a
    size, or None.
    """
    found: list[str] = []

    def measuring(name: str):
        return lambda norm, given: (
            found.append(name) if given[0].numel() == norm.num_features else None
        )

    norms = {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, AnyBatchNorm) and norm.training
    }
    handles = [norm.register_forward_pre_hook(measuring(name)) for name, norm in norms.items()]
    try:
        refusal(model, channels, image_px)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _check_joined(plan: Plan, model: nn.Module) -> None:
    """Reject ranks that would share a statistics sample of norms that cannot be joined."""
    num_parts, batch = plan.assignment(0, plan.world_size).num_parts, plan.recipe.batch
    norms = norms_of_micro_batch(model)
    if num_parts == 1 or not norms:
        return
    number = plan.num_micro_batches
    fitting = [n for n in range(1, number + 1) if number % n == 0]
    ranks = f"use {', '.join(map(str, fitting))} rank{'s' * (number > 1)}"
    what = f"{num_parts} of the {plan.world_size} ranks would share each statistics sample"
    for name, norm in norms.items():
        if not can_join(norm):
            raise PlanError(f"{what}, which {name} ({type(norm).__name__}) cannot join", ranks)
    if plan.recipe.images_together > batch.norm_images:
        raise PlanError(
            f"{what} of {batch.norm_images} images, and a mixing unit spans several of them",
            f'{ranks}, or set="mix.images={batch.norm_images}"',
            path=("mix", "images"),
        )


def _check_frozen(plan: Plan, model: nn.Module) -> None:
    """Reject norms whose statistics are made outside their passes: frozen ones keep theirs."""
    made = "precise_norm" if plan.recipe.precise_norm is not None else ""
    if any(isinstance(module, StepNorm) for module in model.modules()):
        made = "a norm with estimated statistics"
    if made:
        raise PlanError(
            f"model.freeze: not possible with {made}, which moves the statistics of frozen norms",
            "leave one of them out",
            path=("model", "freeze"),
        )


def has_statistics(norm: nn.Module) -> bool:
    """Are there running statistics that training moves? timm's frozen norms have them as
    constants.
    """
    return getattr(norm, "running_var", None) is not None and not FROZEN_NORMS.has(norm)


def norms_of_micro_batch(model: nn.Module) -> dict[str, nn.Module]:
    """The norms, by name, that normalize by the statistics of a micro-batch: for them its size is
    science.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if is_norm(module) and has_statistics(module)
    }
    return {name: module for name, module in named.items() if not isinstance(module, StepNorm)}


def running_norms(model: nn.Module) -> list[RunningNorm]:
    """Norms that keep running statistics of batches."""
    return [
        module
        for module in model.modules()
        if isinstance(module, RunningNorm) and module.track_running_stats
    ]


def check_precise_norm(plan: Plan, model: nn.Module) -> None:
    """Reject a precise_norm that cannot be computed.

    Raises PlanError for a model whose norms keep no running batch statistics, for images that make
    no whole micro-batches, and for more images than the full steps of an epoch have.
    """
    section = plan.recipe.precise_norm
    if section is None:
        return
    if not running_norms(model):
        raise PlanError(
            f"precise_norm: no norm of {plan.model} keeps running batch statistics; "
            "leave precise_norm out"
        )
    batch = plan.recipe.batch
    whole, rest = divmod(section.images, batch.norm_images)
    if rest:
        near = " or ".join(str(n * batch.norm_images) for n in (whole, whole + 1) if n)
        raise PlanError(
            f"precise_norm.images {section.images} is not a multiple of "
            f"batch.norm_images {batch.norm_images}; use {near}"
        )
    num_images = plan.profile.num_train // batch.images * batch.images
    if section.images > num_images:
        remedy = (
            f'use set="precise_norm.images={num_images}"'
            if num_images
            else "leave precise_norm out"
        )
        raise PlanError(
            f"precise_norm.images {section.images} is more than the {num_images} images in the "
            f"full steps of an epoch; {remedy}"
        )


def create_model(model: str, num_classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """A timm model with random weights.

    Raises PlanError naming the option that the model's class does not take.
    """
    try:
        return timm.create_model(
            timm_name(model), num_classes=num_classes, in_chans=channels, **options
        )
    except TypeError:
        refused = [
            name for name, value in options.items() if not takes_option(model, **{name: value})
        ]
        if "zero_init_last" in refused:
            if options["zero_init_last"]:
                raise PlanError(
                    f"model.zero_init_last: {_no_last_gamma(model)}; "
                    'use set="model.zero_init_last=null"'
                ) from None
            # `false` holds anyway: in a class without the option no gamma starts at zero
            rest = {name: value for name, value in options.items() if name != "zero_init_last"}
            return create_model(model, num_classes, channels, rest)
        recipe_keys = {theirs: f"model.{ours}" for ours, theirs in _OPTIONS.items()} | {
            "drop_path_rate": "drop_path",
            "output_stride": "task.output_stride",
        }
        for theirs, ours in recipe_keys.items():
            if theirs in refused:
                raise PlanError(
                    f'{ours}: {model} has no such option; use set="{ours}=null"'
                ) from None
        raise


def _no_last_gamma(model: str) -> str:
    """Why the last gammas of a timm model cannot start at zero."""
    with torch.device("meta"):
        is_convnext = isinstance(timm.create_model(timm_name(model)), timm.models.ConvNeXt)
    return (
        f"the residual branches of {model} do not end in a norm"
        if is_convnext
        else f"{model} has no such option"
    )


def _model_options(plan: Plan) -> dict[str, Any]:
    section = plan.recipe.model
    options: dict[str, Any] = (
        {"drop_path_rate": plan.recipe.drop_path} if plan.recipe.drop_path else {}
    )
    for ours, theirs in _OPTIONS.items():
        value = getattr(section, ours) if section else None
        if value is not None:
            options[theirs] = value
    return options


def num_parameters(model: nn.Module) -> int:
    """All that a model has, frozen ones too."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(model: nn.Module, channels: int, image_px: int) -> float:
    """Billions of multiply-adds of one image's forward pass: convolutions and matrix products."""
    first = next(model.parameters())
    image = torch.zeros(1, channels, image_px, image_px, device=first.device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops() / 2e9
