"""timm models with a recipe's own options, drawn from the run's own seed."""

from __future__ import annotations

import torch
from torch import nn

from trainer import streams
from trainer.errors import did_you_mean
from trainer.ingredients.depth import LayerScale
from trainer.ingredients.surgery import Swap
from trainer.plan import Plan, PlanError
from trainer.start import first_weights

# The page's word for an option -> timm's.
_OPTIONS = {
    "zero_init_last": "zero_init_last",
    "layer_scale": "ls_init_value",
    "head_init_scale": "head_init_scale",
    "dropout": "drop_rate",
}
_TRIED_PX = (32, 64, 96, 128, 160, 192, 224)  # sizes to propose where a model refuses one


def check_model_name(model: str) -> None:
    """Refuse a model that timm does not have.

    Raises PlanError with the nearest name.
    """
    import timm

    if not timm.is_model(model):
        known = timm.list_models()
        raise PlanError(f"model={model}: timm has no such model{did_you_mean(model, known)}; model=resnet50 would do")


def build_model(plan: Plan) -> nn.Module:
    """The model of a plan, its first weights a function of the seed alone. See `assemble`."""
    return assemble(plan)[0]


def assemble(plan: Plan) -> tuple[nn.Module, tuple[Swap, ...]]:
    """The model of a plan, and what each part of its page's `model` section replaced in timm's.

    timm and the parts draw from torch's global generator, which is forked here and left as it was.

    Raises PlanError for an unknown model, for one that cannot take the images, and for an option that it lacks;
    SurgeryError for a part that finds nothing to replace.
    """
    check_model_name(plan.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.torch_seed(plan.seed, "weights"))
        model, swaps = assembled(plan)
        swaps += first_weights(model, plan.recipe.model, plan.profile.num_classes)
        _check_sizes(plan, model)
    return model, swaps


def assembled(plan: Plan) -> tuple[nn.Module, tuple[Swap, ...]]:
    """The model and the swaps of a plan, drawn from torch's generator as it stands."""
    section, image_px = plan.recipe.model, plan.recipe.image.train_px
    options = _model_options(plan)
    parts = [] if section is None else [part for _, part in section.parts()]
    layer_scale = options.get("ls_init_value")
    if layer_scale is not None and not takes_option(plan.model, ls_init_value=layer_scale):
        parts.append(LayerScale(start=options.pop("ls_init_value")))
    model = create_model(plan.model, plan.profile.num_classes, plan.profile.channels, options)
    return model, tuple(part.apply(model, image_px) for part in parts)


def takes_option(model: str, **option: object) -> bool:
    """Does the class of a timm model know an option? Nothing is drawn for the question."""
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(model, **option)
    except TypeError:
        return False
    return True


def _check_sizes(plan: Plan, model: nn.Module) -> None:
    """Refuse image sizes that the model cannot take, rather than at the first step or after the first epoch."""
    image, channels = plan.recipe.image, plan.profile.channels
    # where both sizes are one, it goes by the name of the first
    places = {image.test_px: "image.test_px", image.train_px: "image.train_px"}
    if image.growth is not None:
        places |= {image.growth.from_px: "image.growth.from_px"}
    for image_px, place in places.items():
        refusal = _refusal(model, channels, image_px)
        if refusal is not None:
            fitting_px = next((px for px in _TRIED_PX if px > image_px and _refusal(model, channels, px) is None), None)
            remedy = f'set="{place}={fitting_px}"' if fitting_px else "another model="
            raise PlanError(f"{place}={image_px}: {plan.model} cannot take such images ({refusal}); {remedy} would do")


def _refusal(model: nn.Module, channels: int, image_px: int) -> str | None:
    """Why a model cannot take images of a size, or None: one grey image goes through it, and changes nothing."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, image_px, image_px))
    except (RuntimeError, AssertionError, ValueError) as error:  # each of them from some of timm's models
        return str(error).partition("\n")[0] or error.__class__.__name__
    finally:
        model.train(was_training)
    return None


def create_model(model: str, num_classes: int, channels: int, options: dict[str, object]) -> nn.Module:
    """A timm model with random weights.

    Raises PlanError naming the option that the model's class does not take.
    """
    import timm

    try:
        return timm.create_model(model, num_classes=num_classes, in_chans=channels, **options)
    except TypeError as error:
        if options.get("zero_init_last") is False and "zero_init_last" in str(error):
            rest = {name: value for name, value in options.items() if name != "zero_init_last"}
            return create_model(model, num_classes, channels, rest)  # it has no last gamma that could start at zero
        page_words = {theirs: f"model.{ours}" for ours, theirs in _OPTIONS.items()} | {"drop_path_rate": "drop_path"}
        for theirs, ours in page_words.items():
            if theirs in options and theirs in str(error):
                raise PlanError(f'{ours}: {model} has no such option; set="{ours}=null" would do') from None
        raise


def _model_options(plan: Plan) -> dict[str, object]:
    section = plan.recipe.model
    options = {"drop_path_rate": plan.recipe.drop_path} if plan.recipe.drop_path else {}
    for ours, theirs in _OPTIONS.items():
        value = getattr(section, ours) if section else None
        if value is not None:
            options[theirs] = value
    return options


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(model: nn.Module, channels: int, image_px: int) -> float:
    """Billions of multiply-adds of one forward pass on one image: convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    first = next(model.parameters())
    image = torch.zeros(1, channels, image_px, image_px, device=first.device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops() / 2e9
