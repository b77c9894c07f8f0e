"""Compatibility matrix: one optimizer step of every recipe on models of every family, on random
images, or the reason why not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.models import model_entrypoint

from trainer.base.errors import ConfigError, UserError, did_you_mean
from trainer.base.settings import make_settings
from trainer.data.dataset import OpenedData
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import num_parameters
from trainer.models.zoo import timm_name
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.profiles import IMAGENET_MEAN, IMAGENET_STD, PROFILES, Adapt, Profile
from trainer.recipe.schema import from_random_weights, load_recipe
from trainer.recipe.shipped import find_recipe, newest_recipe_paths
from trainer.runs.job import Job, resolve

MODELS = (
    "resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "resnet101", "convnext_atto",
    "convnext_tiny", "mobilenetv2_100", "efficientnet_b0", "ghostnet_100", "vgg11_bn",
    "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "levit_128s",
    "tnt_s_legacy_patch16_224", "cct_7_3x1_32", "cvt_13", "pvt_tiny", "t2t_vit_7",
    "shufflenet_v1_g3_100", "condensenetv2_a", "ea_resnet50", "torchvision:mobilenet_v3_small",
)  # fmt: skip

# Small enough for these models per recipe; two micro-batches, so that their gradients and BatchNorm
# statistics are accumulated.
_ADAPTED = Adapt(train_px=64, test_px=64, batch_images=4, norm_images=2)
NOISE = Profile(
    name="noise",
    num_classes=1000,
    num_train=PROFILES["imagenet-1k"].num_train,
    num_val=50_000,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    adapt=_ADAPTED,
)


@dataclass(frozen=True)
class MatrixCell:
    """One recipe on one model. num_params: of the model after its step; None where it is refused
    for `reason`.
    """

    recipe: str
    model: str
    num_params: int | None
    reason: str = ""


def chosen_recipes(names: str) -> list[str]:
    """The recipes that a text such as `A1 A2.v1` names, with their versions; for an empty one
    the newest of all that are for classification, as the matrix's noise is.

    Raises RecipeError for an unknown name.
    """
    if not names:
        return [path.stem for path in newest_recipe_paths() if load_recipe(path).task is None]
    return [find_recipe(name).stem for name in names.replace(",", " ").split()]


def chosen_models(names: str) -> Sequence[str]:
    """The models that a text such as `resnet18 convnext_atto` names; MODELS for an empty one.

    Raises UserError for a name that is not in MODELS.
    """
    wanted = names.replace(",", " ").split()
    for name in wanted:
        if name not in MODELS:
            hint = did_you_mean(name, MODELS)
            raise UserError(f"models={name}: not in the matrix{hint}; valid: {', '.join(MODELS)}")
    return wanted or MODELS


def untested_family(model: str) -> str:
    """The module in timm that a model comes from, where MODELS has none of it; else empty."""
    entries = (model_entrypoint(timm_name(name)) for name in (model, *MODELS))
    family, *tested = (entry.__module__ for entry in entries)
    return "" if family in tested else family.rpartition(".")[2]


def noise_plan(recipe: str, model: str) -> Plan:
    """The plan of a recipe on random images, adapted as to any data profile; from random weights
    where a run names them. Raises UserError where recipe and model do not fit.
    """
    _, _, resolved, deviations = resolve(Job(recipe, model), NOISE)
    resolved = from_random_weights(resolved)
    return make_plan(resolved, model=model, profile=NOISE, deviations=deviations)


class NoiseSet:
    """As many random images of 80 px as ImageNet has, 64 of them distinct; the same in every
    process.
    """

    num_images = NOISE.num_train
    classes = tuple(map(str, range(NOISE.num_classes)))
    fingerprint = "noise"
    num_channels = NOISE.channels
    is_in_memory = True

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (64, 80, 80, 3), dtype=np.uint8)
        self.labels = generator.integers(0, NOISE.num_classes, self.num_images)

    def read(self, i: int) -> Image.Image:
        """Image i, of few that repeat."""
        return Image.fromarray(self.images[i % len(self.images)])


def try_cell(recipe: str, model: str) -> MatrixCell:
    """Plan a recipe for a model and make the first step after its warm-up, as a run does; a
    UserError becomes the reason.

    Raises ConfigError for a recipe file that does not load, AssertionError where the step leaves a
    weight that is not finite, or changes none.
    """
    try:
        return MatrixCell(recipe, model, num_parameters(stepped(noise_plan(recipe, model))))
    except ConfigError:
        raise  # an error in a recipe file is no incompatibility
    except UserError as error:
        return MatrixCell(recipe, model, None, str(error))
    except Exception as error:
        error.add_note(f"in {recipe} on {model}")
        raise


def stepped(plan: Plan) -> torch.nn.Module:
    """The model of a plan after one step of its own at full rate, on the CPU."""
    settings = make_settings("cpu", workers="0")
    step = plan.num_warmup_steps
    state = TrainingState(plan, settings)
    before = [weight.detach().clone() for weight in state.model.parameters()]
    stream = OpenedData(NoiseSet(), NoiseSet()).train_stream(plan, settings, step)
    loss = optimizer_step(state, stream, step)
    after = list(state.model.parameters())
    is_finite = loss.isfinite() and all(weight.isfinite().all() for weight in after)
    assert is_finite, "the loss or a weight is not finite"
    is_same = all(map(torch.equal, before, after))
    assert not is_same, "the step changed no weight"
    return state.model


def fill(
    recipes: Iterable[str], models: Sequence[str], each: Callable[[], None] = lambda: None
) -> Iterator[MatrixCell]:
    """The cells of recipes x models, row by row; `each` is called after every one."""
    for recipe in recipes:
        for model in models:
            cell = try_cell(recipe, model)
            # modules are reference cycles: without this, memory grows from cell to cell
            gc.collect()
            each()
            yield cell


def matrix_markdown(cells: Sequence[MatrixCell]) -> str:
    """The matrix: recipes down, models across, a refusal as the number of its reason below."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    reasons = list(dict.fromkeys(cell.reason for cell in cells if cell.reason))
    lines = [f"| recipe | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        row = [_cell_text(cell, reasons) for cell in cells if cell.recipe == recipe]
        lines.append(f"| {recipe} | {' | '.join(row)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*_HEAD, *lines, *([""] if notes else []), *notes, ""])


_HEAD = (
    "# Compatibility matrix: every recipe on every model family",
    "",
    "Written by `make matrix`: each recipe was planned for each model and made one optimizer step",
    "on random images, by the code path of a training run without decoding (module replacement,",
    "augmentation, mixing, loss, clipping, optimizer, weight averaging).",
    "A number is the model's parameters in millions, with 1000 classes; a number in brackets is a",
    "reason below.",
    f"Adapted for speed only: {_ADAPTED.train_px} px, {_ADAPTED.batch_images} images per step in",
    f"micro-batches of {_ADAPTED.norm_images}.",
    "",
)


def _cell_text(cell: MatrixCell, reasons: Sequence[str]) -> str:
    if cell.num_params is None:
        return f"[{reasons.index(cell.reason) + 1}]"
    return f"ok {cell.num_params / 1e6:.3f}"
