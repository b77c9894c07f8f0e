"""What a recipe counts in epochs keeps its share of a run, and is refused where the run has no room
for it.
"""

import pytest

from trainer.base.errors import OverrideError
from trainer.recipe.adapt import adaptation
from trainer.recipe.overrides import overrides_of
from trainer.recipe.plan import make_plan
from trainer.recipe.profiles import PROFILES, Adapt
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe

A2 = load_recipe(find_recipe("A2.v1")).for_model("resnet50")
ERASING = {
    "name": "random_erasing",
    "share": 0.25,
    "area": (0.02, 0.33),
    "aspect": (0.3, 3.3),
    "fill": "noise",
    "until_epochs": 200,
}
ENDING = apply_overrides(
    A2,
    {
        "lr.cooldown_epochs": 30,
        "mix.until_epochs": 280,
        "augment": (*A2.augment, ERASING),
    },
)[0]


def adapted(epochs):
    profile = PROFILES["imagenet-1k"].model_copy(
        update={"adapt": Adapt(epochs=epochs, warmup_epochs=1)}
    )
    return apply_overrides(ENDING, adaptation(ENDING, profile), "profile")[0]


def ends_of(recipe):
    return recipe.lr.cooldown_epochs, recipe.mix.until_epochs, recipe.augment[-1].until_epochs


@pytest.mark.parametrize(
    ("epochs", "ends"),
    [(300, (30, 280, 200)), (30, (3, 28, 20)), (3, (None, 2, 2)), (2, (None, 1, 1))],
)
def test_ends_keep_their_share_of_a_run(epochs, ends):
    assert ends_of(adapted(epochs)) == ends


def test_a_plan_cools_down():
    plan = make_plan(ENDING, "resnet50", PROFILES["imagenet-1k"])
    first = 270 * plan.steps_per_epoch
    assert plan.lr_at(first) == plan.lr_at(plan.num_steps - 1) == 1e-6 < plan.lr_at(first - 1)


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        ("lr.cooldown_epochs=300", {"lr.cooldown_epochs": None}),
        ("mix.until_epochs=300", {"mix.until_epochs": 299}),
        ("augment.random_erasing.until_epochs=301", {"augment.random_erasing.until_epochs": 299}),
        (
            "epochs=20",
            {
                "lr.cooldown_epochs": None,
                "mix.until_epochs": 19,
                "augment.random_erasing.until_epochs": 19,
            },
        ),
        ("lr.cooldown_epochs=296", {"lr.warmup_epochs": 2}),
    ],
)
def test_an_end_outside_the_run_is_refused_with_one_inside(overrides, fix):
    with pytest.raises(OverrideError) as refusal:
        apply_overrides(ENDING, overrides)
    assert refusal.value.fix == fix and "\n" not in str(refusal.value)
    apply_overrides(ENDING, {**overrides_of(overrides), **fix})
