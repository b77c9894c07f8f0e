"""Every page on models of every family: one optimizer step on random images, or the reason why
there is none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from trainer.base.errors import PageError, UserError, did_you_mean
from trainer.base.settings import make_settings
from trainer.data.dataset import OpenedData
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import num_parameters
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.profiles import IMAGENET_MEAN, IMAGENET_STD, PROFILES, Adapt, Profile
from trainer.recipe.schema import find_recipe, recipe_paths
from trainer.runs.job import Job, resolve

MODELS = (
    "resnet18",
    "resnet50",
    "resnet50d",
    "resnext50_32x4d",
    "resnet101",
    "convnext_atto",
    "convnext_tiny",
)

# Small enough for seven models a page; two micro-batches, so that their statistics and gradients
# are put together.
NOISE = Profile(
    name="noise",
    num_classes=1000,
    num_train=PROFILES["imagenet-1k"].num_train,
    num_val=50_000,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    adapt=Adapt(train_px=64, test_px=64, batch_images=4, norm_images=2),
)


@dataclass(frozen=True)
class Cell:
    """One page on one model. num_params: of the model after its step; None where it is refused, and
    `reason` says why.
    """

    recipe: str
    model: str
    num_params: int | None
    reason: str = ""


def chosen_pages(names: str) -> list[str]:
    """Identities of the pages that a text such as `A1 A2.v1` names; all pages for an empty one.

    Raises RecipeError for a name that no page has.
    """
    if not names:
        return [path.stem for path in recipe_paths()]
    return [find_recipe(name).stem for name in names.replace(",", " ").split()]


def chosen_models(names: str) -> Sequence[str]:
    """The models that a text such as `resnet18 convnext_atto` names; those of the table for an
    empty one.

    Raises UserError for a name that is not one of the table's.
    """
    wanted = names.replace(",", " ").split()
    for name in wanted:
        if name not in MODELS:
            there_are = ", ".join(MODELS)
            raise UserError(
                f"models={name}: not in the table{did_you_mean(name, MODELS)}; there are {there_are}"
            )
    return wanted or MODELS


def noise_plan(recipe: str, model: str) -> Plan:
    """The plan of a page on random images, adapted as any profile adapts it. Raises UserError where
    it cannot be.
    """
    _, _, made, deviations = resolve(Job(recipe, model), NOISE)
    return make_plan(made, model=model, profile=NOISE, deviations=deviations)


class NoiseSet:
    """As many images as ImageNet has, random and of 80 px; few are different. The same in every
    process.
    """

    num_images = NOISE.num_train
    classes = tuple(map(str, range(NOISE.num_classes)))
    fingerprint = "noise"
    num_channels = NOISE.channels
    is_in_memory = True

    def __init__(self) -> None:
        draws = np.random.default_rng(0)
        self.images = draws.integers(0, 256, (64, 80, 80, 3), dtype=np.uint8)
        self.labels = draws.integers(0, NOISE.num_classes, self.num_images)

    def read(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i % len(self.images)])


def try_cell(recipe: str, model: str) -> Cell:
    """Plan a page for a model and make the first step after its warm-up, as a run does; a refusal
    becomes the reason.

    Raises PageError for a page that does not load, AssertionError where the step leaves a weight
    that is no number, or moves none.
    """
    try:
        return Cell(recipe, model, num_parameters(stepped(noise_plan(recipe, model))))
    except PageError:
        raise  # a mistake in a page is no reason that a reader agrees with
    except UserError as error:
        return Cell(recipe, model, None, str(error))
    except Exception as error:
        error.add_note(f"in {recipe} on {model}")
        raise


def stepped(plan: Plan) -> torch.nn.Module:
    """The model of a plan after one step of its own at full rate, on the CPU."""
    settings = make_settings("cpu", workers="0")
    step = plan.num_warmup_steps
    state = TrainingState(plan, settings)
    before = [weight.detach().clone() for weight in state.model.parameters()]
    loss = optimizer_step(
        state, OpenedData(NoiseSet(), NoiseSet()).train_stream(plan, settings, step), step
    )
    after = list(state.model.parameters())
    assert loss.isfinite() and all(weight.isfinite().all() for weight in after), (
        "the step ended in no number"
    )
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), (
        "the step moved nothing"
    )
    return state.model


def fill(
    pages: Iterable[str], models: Sequence[str], each: Callable[[], None] = lambda: None
) -> Iterator[Cell]:
    """The cells of pages x models, row by row; `each` is called after every one."""
    for recipe in pages:
        for model in models:
            cell = try_cell(recipe, model)
            # a model's modules refer to each other: without this, memory grows from cell to cell
            gc.collect()
            each()
            yield cell


def as_markdown(cells: Sequence[Cell]) -> str:
    """The table: pages down, models across, a refusal as the number of its reason below."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    reasons = list(dict.fromkeys(cell.reason for cell in cells if cell.reason))
    lines = [f"| recipe | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        row = [_shown(cell, reasons) for cell in cells if cell.recipe == recipe]
        lines.append(f"| {recipe} | {' | '.join(row)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*_HEAD, *lines, *([""] if notes else []), *notes, ""])


_ADAPTED = NOISE.adapt
_HEAD = (
    "# Every page on every family",
    "",
    "What `make matrix` found: each page was planned for each model, and made one real optimizer step on random images",
    "(decoding aside, the road of a training run: surgery, augmentation, mixing, loss, clipping, optimizer, average).",
    "A number is the model's parameters in millions, with 1000 classes; a number in brackets is a reason below.",
    f"Adapted for speed and nothing else: {_ADAPTED.train_px} px, {_ADAPTED.batch_images} images a step in micro-batches of "
    f"{_ADAPTED.norm_images}.",
    "",
)


def _shown(cell: Cell, reasons: Sequence[str]) -> str:
    if cell.num_params is None:
        return f"[{reasons.index(cell.reason) + 1}]"
    return f"ok {cell.num_params / 1e6:.3f}"
