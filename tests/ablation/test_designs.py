"""Designs: the variants of an ablation's factors, parts, steps and cells, and merged overrides."""

import functools

import pytest

from trainer.ablation.designs import (
    MAX_DESIGN_CELLS,
    Cumulative,
    Full,
    LeaveOneOut,
    Listed,
    OneAtATime,
    put_over,
)
from trainer.base.errors import ConfigError
from trainer.recipe import check
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe

A2 = load_recipe(find_recipe("A2.v1")).for_model("resnet50")
LOSS = {"name": "loss", "levels": ({"name": "BCE"}, {"name": "CE", "set": {"loss.name": "ce"}})}
MIX = {"name": "mix", "levels": ({"name": "both"}, {"name": "none", "set": {"mix": None}})}


def variants(kind, **data):
    name = check.tag_of(kind)
    return list(check.check(kind, {"name": name, **data}).variants())


def test_one_at_a_time_is_the_base_and_each_level_by_itself():
    found = variants(OneAtATime, base="A2", factors=(LOSS, MIX))
    assert [one.name for one in found] == ["A2", "loss: BCE", "loss: CE", "mix: both", "mix: none"]
    assert [one.over({}) for one in found] == [{}, {}, {"loss.name": "ce"}, {}, {"mix": None}]
    assert found[0].levels == (("loss", "A2"), ("mix", "A2"))
    assert found[4].levels == (("loss", "A2"), ("mix", "none"))
    assert found[4].place == ("design", "factors", 1, "levels", 1)


def test_one_factor_needs_no_name_before_its_levels():
    assert [one.name for one in variants(OneAtATime, base="A2", factors=(LOSS,))] == [
        "A2",
        "BCE",
        "CE",
    ]


def test_full_is_every_combination_and_its_base_has_the_first_levels():
    found = variants(Full, factors=(LOSS, MIX))
    assert [one.name for one in found] == ["BCE, both", "BCE, none", "CE, both", "CE, none"]
    assert found[0].over({"epochs": 3}) == {"epochs": 3}
    assert found[3].over({"epochs": 3}) == {"epochs": 3, "loss.name": "ce", "mix": None}
    assert found[2].levels == (("loss", "CE"), ("mix", "both"))


def test_factors_of_a_grid_do_not_undo_each_other():
    """A new optimizer drops what was set of the old one, but not what another factor sets of it."""
    decay = {"name": "decay", "levels": ({"name": "0.1", "set": {"optimizer.weight_decay": 0.1}},)}
    kind = {
        "name": "kind",
        "levels": ({"name": "SGD", "set": {"optimizer.name": "sgd", "optimizer.momentum": 0.9}},),
    }
    for factors in ((decay, kind), (kind, decay)):
        (found,) = variants(Full, factors=factors)
        made, _ = apply_overrides(A2, found.over({"optimizer.eps": 1e-3}))
        assert (made.optimizer.name, made.optimizer.momentum, made.optimizer.weight_decay) == (
            "sgd",
            0.9,
            0.1,
        )


def test_leave_one_out_is_the_base_without_each_part():
    found = variants(
        LeaveOneOut, base="all", parts=({"name": "repeats", "set": {"repeats": None}},)
    )
    assert [(one.name, one.over({})) for one in found] == [
        ("all", {}),
        ("without repeats", {"repeats": None}),
    ]


def test_cumulative_puts_each_step_on_top_of_the_last_and_a_recipe_starts_anew():
    steps = (
        {"name": "+ epochs", "set": {"epochs": 9}},
        {"name": "+ ema", "set": {"average": {"name": "ema", "decay": 0.9, "every_steps": 1}}},
        {"name": "slower ema", "set": {"average.decay": 0.99}},
        {"name": "A3", "recipe": "A3", "set": {"smoothing": 0.1}},
        {"name": "+ repeats", "set": {"repeats": 3}},
    )
    found = variants(Cumulative, base="A2", steps=steps)
    assert [one.recipe and one.recipe[0] for one in found] == [None, None, None, None, "A3", "A3"]
    assert found[3].over({}) == {
        "epochs": 9,
        "average": {"name": "ema", "decay": 0.99, "every_steps": 1},
    }
    assert found[5].over({"epochs": 2}) == {"epochs": 2, "smoothing": 0.1, "repeats": 3}
    assert found[5].recipe == ("A3", ("design", "steps", 3, "recipe"))


def test_listed_cells_stand_as_they_are():
    found = variants(
        Listed, cells=({"name": "A2"}, {"name": "A3", "recipe": "A3", "set": {"epochs": 3}})
    )
    assert [(one.name, one.recipe and one.recipe[0], one.over({})) for one in found] == [
        ("A2", None, {}),
        ("A3", "A3", {"epochs": 3}),
    ]


LAYERS = [
    (
        {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4}},
        {"optimizer.momentum": 0.5},
    ),
    (
        {"optimizer.weight_decay": 0.5, "optimizer.eps": 1e-3},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.5},
    ),
    (
        {"optimizer.weight_decay": 0.5},
        {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4}},
    ),
    (
        {"lr.schedule.end": 1e-4},
        {"lr.schedule": {"name": "step", "every_epochs": 30, "factor": 0.1}},
    ),
    ({"mix.mixup_alpha": 0.5, "epochs": 5}, {"mix": None, "epochs": 6}),
    (
        {"augment.rand_augment.magnitude": 3},
        {"augment.rand_augment.magnitude": 5, "augment.flip": None},
    ),
    (
        {"average": {"name": "ema", "decay": 0.9, "every_steps": 1, "adjusted": True}},
        {"average.adjusted": False},
    ),
    ({"loss": {"name": "bce", "threshold": 0.5}}, {"loss.threshold": None}),
    (
        {"model.norm": {"name": "group_norm", "groups": 8, "eps": 1e-5}},
        {"model.norm.groups": 16, "repeats": None},
    ),
]


@pytest.mark.parametrize("layers", LAYERS)
def test_what_is_put_over_at_once_is_what_is_put_over_one_after_another(layers):
    """The recipe made by one text of overrides is the one made by each layer's overrides in turn.

    Where a section becomes another ingredient, what the older layer said of the old one is gone:
    here it had nothing that both ingredients have, or the page's own value is back.
    """
    at_once, _ = apply_overrides(A2, functools.reduce(put_over, layers, {}))
    in_turn = A2
    for layer in layers:
        in_turn, _ = apply_overrides(in_turn, layer)
    if "optimizer.name" in layers[1]:
        in_turn, _ = apply_overrides(in_turn, {"optimizer.weight_decay": A2.optimizer.weight_decay})
    assert at_once.digest == in_turn.digest


def level(name: str, **lines) -> dict:
    return {"name": name, "set": lines}


@pytest.mark.parametrize(
    ("kind", "data", "path", "sentence"),
    [
        (OneAtATime, {"factors": (LOSS,)}, (), "has no base"),
        (
            OneAtATime,
            {"base": "CE", "factors": (LOSS,)},
            ("factors", 0, "levels", 1, "name"),
            "is the name of the base",
        ),
        (
            OneAtATime,
            {"base": "A2", "factors": (LOSS, LOSS)},
            ("factors", 1, "name"),
            "loss is listed twice",
        ),
        (OneAtATime, {"base": "A2", "factors": ()}, ("factors",), "write at least one"),
        (OneAtATime, {"base": "a|b", "factors": (LOSS,)}, ("base",), "without | and `"),
        (OneAtATime, {"base": " A2", "factors": (LOSS,)}, ("base",), "without outer spaces"),
        (OneAtATime, {"bse": "A2", "factors": (LOSS,)}, ("bse",), "did you mean base"),
        (
            Full,
            {"factors": (MIX, {"name": "m", "levels": ({"name": "a"}, {"name": "a"})})},
            ("factors", 1, "levels", 1, "name"),
            "a is listed twice",
        ),
        (
            Full,
            {"factors": (MIX, {"name": "m", "levels": (level("a", **{"mix.partner": "rolled"}),)})},
            ("factors", 1, "levels", 0, "set", "mix.partner"),
            "is set by the factor mix too (mix)",
        ),
        (
            Full,
            {
                "factors": tuple(
                    {"name": n, "levels": ({"name": "x", "recipe": n},)} for n in ("A1", "A2")
                )
            },
            ("factors", 1, "levels", 0, "recipe"),
            "A1 sets the recipe already",
        ),
        (
            Full,
            {
                "factors": tuple(
                    {"name": n, "levels": tuple(level(str(k), **{n: k}) for k in range(11))}
                    for n in "abc"
                )
            },
            ("factors",),
            f"1331 combinations; the maximum is {MAX_DESIGN_CELLS}",
        ),
        (
            LeaveOneOut,
            {"base": "a", "parts": ({"name": "b", "set": {"mix": None, "mix.partner": "rolled"}},)},
            ("parts", 0, "set", "mix.partner"),
            "mix.partner is within mix",
        ),
        (
            Cumulative,
            {"base": "a", "steps": ({"name": "b", "sets": {}},)},
            ("steps", 0, "sets"),
            "did you mean set",
        ),
        (
            Listed,
            {"cells": ({"name": "a"}, {"name": "a"})},
            ("cells", 1, "name"),
            "a is listed twice",
        ),
    ],
)
def test_what_makes_no_design_is_refused_at_its_place(kind, data, path, sentence):
    with pytest.raises(ConfigError) as error:
        check.check(kind, {"name": check.tag_of(kind), **data})
    assert (error.value.path, sentence in str(error.value)) == (path, True), error.value
