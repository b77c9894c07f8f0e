"""What every registered component can do, whichever kind it is of: also those that a plugin brings
(RSB_PLUGINS).
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from trainer.base.component import ComponentError, is_kind, kinds, parts_of, registered, tag_of
from trainer.base.plugins import VARIABLE, load_plugins
from trainer.components.augmentation import Augmentation
from trainer.components.learning_rate import LearningRate
from trainer.components.losses import BinaryCrossEntropy, ImageLoss, Loss
from trainer.components.mixing import Mixing
from trainer.components.optimizers import Optimizer
from trainer.components.schedules import Schedule
from trainer.components.task import TaskSection
from trainer.models.spec import Model
from trainer.recipe import check, tree
from trainer.recipe.adapt import adaptation
from trainer.recipe.load import parse
from trainer.recipe.plan import make_plan
from trainer.recipe.profiles import PROFILES, Adapt
from trainer.recipe.schema import Recipe, apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe

EXTRAS = Path(__file__).parents[1] / "support" / "extras.py"
SEED, IDS = 3, np.array([[epoch, sample, 0] for epoch in range(2) for sample in range(20)])

load_plugins()


def name_of(kind):
    return f"{kind.kind}-{tag_of(kind)}"


def every(kind):
    return pytest.mark.parametrize("kind", registered(kind), ids=name_of)


ALL = pytest.mark.parametrize(
    "kind", dict.fromkeys(one for kind in kinds() for one in registered(kind)), ids=name_of
)


def made(kind):
    return check.check(kind, {"name": tag_of(kind), **tree.plain(kind.example)})


TASKS = {tag_of(task): task for task in registered(TaskSection)}
# what a recipe of whole images has beside a task whose targets have places
OF_PLACES = {"mix": None, "repeats": None, "image.test_crop_share": 1.0}


def place_of(kind) -> str:
    """Where a recipe has a component of this kind; within a task, task.<its name>.<field>."""
    sections = {"": Recipe, "lr.": LearningRate, "model.": Model, "loss.": BinaryCrossEntropy}
    sections |= {f"task.{name}.": task for name, task in TASKS.items()}
    fields = (
        (prefix + key, field)
        for prefix, page in sections.items()
        for key, field in page.model_fields.items()
    )
    return next(key for key, field in fields if kind in check.kinds_in(field.annotation))


def page_with(kind) -> Recipe:
    """A2 with a component in its place, and without what that cannot stand beside."""
    page = load_recipe(find_recipe("A2.v1")).for_model("resnet50")
    part, place = tree.plain(made(kind)), place_of(kind)
    if place == "augment":
        value = sorted((part, CROP), key=lambda one: one is part)
        if made(kind).crops:
            value = (part,)
    else:
        value = part
    others = {}
    if place.startswith("task"):
        place, *within = place.split(".")
        if within:
            value = {"name": within[0], **tree.plain(TASKS[within[0]].example), within[1]: part}
        others = OF_PLACES | {"augment": (CROP,)}
        if value["name"] == "masked_autoencoder":
            others["loss"] = {"name": "mse"}
    if tag_of(kind) == "letterbox":  # reaches out of an image
        others = OF_PLACES | {"task": {"name": "detection", **TASKS["detection"].example}}
    if place == "loss" and kind.compares_splits:
        others = {"augment_splits": 3, "mix": None}
    if tag_of(kind) == "split_batch_norm":
        others = {
            "augment_splits": 2,
            "mix": None,
            "loss": {"name": "jensen_shannon", "weight": 12, "loss": {"name": "ce"}},
        }
    if place == "lr.schedule" and kind.has_own_warmup:
        others = {"lr.warmup_epochs": None, "lr.warmup_from": None}
    return apply_overrides(page, {place: value, **others})[0]


CROP = {
    "name": "random_resized_crop",
    "area": (0.35, 1.0),
    "aspect": (0.75, 1.3333),
    "interpolation": "random",
}


@ALL
def test_a_component_is_the_same_after_yaml(kind):
    part = made(kind)
    text = tree.to_yaml(tree.plain(part))
    base = next(base for base in kind.__mro__ if is_kind(base))
    again = TypeAdapter(base).validate_python(parse(text, "test")[0])
    assert type(again) is kind and again == part
    if (
        "fields" not in kind.model_fields
    ):  # a mapping of anything: JSON cannot say which of its lists are tuples
        assert TypeAdapter(base).validate_json(TypeAdapter(base).dump_json(part)) == part


@ALL
def test_a_page_with_a_component_reads_back_plans_and_adapts(kind):
    page = page_with(kind)
    assert any(type(part) is kind for part in parts_of(page))
    again = check.check(Recipe, parse(page.to_yaml(), "test")[0])
    assert again == page and again.digest == page.digest
    profile = PROFILES["imagenet-1k"].model_copy(
        update={
            "adapt": Adapt(epochs=30, warmup_epochs=2, batch_images=256),
            "task": page.of_task.name,
        }
    )
    adapted, _ = apply_overrides(page, adaptation(page, profile), "profile")
    assert any(
        type(part) is kind for part in parts_of(make_plan(adapted, "resnet50", profile).recipe)
    )
    unadapted = profile.model_copy(update={"adapt": None})
    assert make_plan(page, "resnet50", unadapted).recipe == page


@every(Schedule)
def test_a_schedule_keeps_its_shape_in_a_run_of_half_the_epochs(kind):
    schedule, shorter = made(kind), made(kind).scaled_to(50, 100)
    rates = [schedule.at(1.0, update, 0, 2000, 20) for update in range(2000)]
    assert [shorter.at(1.0, update, 0, 2000, 40) for update in range(2000)] == pytest.approx(
        rates, abs=1e-9
    )
    assert made(kind).scaled_to(100, 100) == schedule
    for _, found, most in shorter.lengths(50, 0):
        assert found <= most


@every(Schedule)
def test_a_schedule_follows_its_peak(kind):
    values = {
        key: 1e-3 for key in kind.model_fields if key == "end"
    }  # an end at zero would hide one that does not follow
    schedule = made(kind).model_copy(update=values)
    higher = schedule.scaled_by(2.0)
    assert higher.end_rate() == 2 * schedule.end_rate()
    for update in range(0, 2000, 7):
        assert higher.at(2.0, update, 0, 2000, 20) == pytest.approx(
            2 * schedule.at(1.0, update, 0, 2000, 20), rel=1e-12
        )
    assert schedule.at(1.0, 1999, 0, 2000, 20) >= schedule.end_rate() - 1e-12


@every(Optimizer)
def test_an_optimizer_says_whether_its_decay_follows_the_rate(kind):
    """By what a weight loses in a step without a gradient, at a rate and at twice that rate."""
    page = made(kind).model_copy(update={"weight_decay": 0.01})

    def lost_share(lr: float, optimizer=page) -> float:
        weight = torch.nn.Parameter(torch.ones(4, 4))
        built = optimizer.build([{"params": [weight], "weight_decay": optimizer.weight_decay}], lr)
        weight.grad = torch.zeros_like(weight)
        built.step()
        return 1 - weight.detach().double().mean().item()

    assert lost_share(2e-3) / lost_share(1e-3) == pytest.approx(
        2 if page.decay_follows_rate else 1, rel=1e-2
    )
    assert lost_share(2e-3, page.scaled_by(2.0)) / lost_share(1e-3) == pytest.approx(2, rel=1e-2)


@every(ImageLoss)
def test_a_loss_says_whether_the_mean_target_tells_all(kind):
    loss, random = made(kind).without_threshold(), torch.Generator().manual_seed(1)
    logits = torch.randn(1, 5, generator=random, dtype=torch.float64)
    ends = torch.rand(2, 5, generator=random, dtype=torch.float64).softmax(1)
    between = loss(logits, ends.mean(0, keepdim=True)).item()
    mean = (loss(logits, ends[:1]) + loss(logits, ends[1:])).item() / 2
    assert math.isclose(between, mean, rel_tol=1e-9) == loss.is_linear


@every(Loss)
def test_a_loss_is_one_number_with_a_gradient(kind):
    loss, logits = (
        made(kind),
        torch.randn(6, 5, generator=torch.Generator().manual_seed(2), requires_grad=True),
    )
    found = loss(
        logits, torch.eye(5)[:3] if kind.compares_splits else torch.eye(5)[[0, 1, 2, 3, 4, 0]]
    )
    found.backward()
    assert found.shape == () and logits.grad.isfinite().all() and logits.grad.any()


def test_no_two_augmentations_share_a_random_stream():
    purposes = [kind.purpose for kind in registered(Augmentation)]
    assert len(set(purposes)) == len(purposes)


@every(Augmentation)
def test_an_augmentation_is_a_function_of_its_draws(kind):
    part, sides = made(kind), np.full(len(IDS), 40)
    given = {
        "decode": (sides, sides) if part.crops else (),
        "pixels": (16, 3),
        "normalized": (16, 3),
    }[part.stage]
    whole, one = (
        part.draw(SEED, IDS, *given),
        part.draw(SEED, IDS[7:8], *[one[7:8] if one is sides else one for one in given]),
    )
    whole, one = (
        {"drawn": found} if isinstance(found, np.ndarray) else found for found in (whole, one)
    )
    if isinstance(whole, tuple):
        whole, one = dict(enumerate(whole)), dict(enumerate(one))
    for name, values in whole.items():
        assert len(values) == len(IDS) and np.array_equal(values[7:8], one[name])
    if part.stage != "decode":
        images = torch.randint(
            0,
            256,
            (len(IDS), 3, 16, 16),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(1),
        )
        images = images if part.stage == "pixels" else images.float()
        drawn = {name: torch.from_numpy(values) for name, values in whole.items()}
        found = part.apply(images.clone(), drawn, (9, 9, 9))
        assert found.shape == images.shape and found.dtype == images.dtype
        assert torch.equal(found, part.apply(images.clone(), drawn, (9, 9, 9))) and not torch.equal(
            found, images
        )


@every(Mixing)
def test_mixing_keeps_the_sum_of_targets(kind):
    part, images = made(kind), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(8):
        mixed, targets = part.apply(images.clone(), torch.eye(4), part.draw(SEED, step, 0, 8))
        assert mixed.shape == images.shape and targets.sum(1) == pytest.approx(
            torch.ones(4), abs=1e-6
        )


def test_what_a_kind_needs_is_asked_for_where_the_class_is():
    with pytest.raises(ComponentError, match=r"Half: a schedule needs at, scaled_by, scaled_to"):

        class Half(Schedule):
            name: Literal["half"] = "half"

    with pytest.raises(ComponentError, match=r"the loss ce is trainer\.\S+\.CrossEntropy already"):

        class Other(ImageLoss):
            name: Literal["ce"] = "ce"
            is_linear: ClassVar[bool] = True

            def __call__(self, logits, targets): ...

    assert "half" not in {tag_of(kind) for kind in registered(Schedule)}


@pytest.mark.skipif(VARIABLE in os.environ, reason="runs itself")
def test_all_of_it_holds_for_components_from_elsewhere():
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        words, env=os.environ | {VARIABLE: str(EXTRAS)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
