"""Cells: the text that makes them, and the keys by which they meet their rows."""

import dataclasses
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import small_plan
from support.rows import row_of
from trainer.ablation.cells import Cell, command, overrides_text, plan_of_cell
from trainer.recipe.overrides import OverrideError, overrides_of
from trainer.recipe.plan import PlanError

V1 = "torchvision-v1"
CELL = Cell(
    "BCE",
    "torchvision-v1",
    "test_resnet",
    "digits",
    "epochs=2 loss.name=bce",
    (("loss", "BCE"),),
    False,
    "test_resnet on digits",
)


def test_a_cell_is_asked_for_as_a_user_would():
    job = CELL.job(3)
    assert (job.recipe, job.model, job.data, job.seed, job.overrides) == (
        "torchvision-v1",
        "test_resnet",
        "digits",
        3,
        CELL.overrides,
    )
    plan = plan_of_cell(CELL, 3)
    assert (plan.seed, plan.recipe.loss.name, plan.recipe.epochs) == (3, "bce", 2)


def test_a_planned_cell_gives_the_plan_of_every_seed():
    planned = dataclasses.replace(CELL, plan=plan_of_cell(CELL, 0))
    assert plan_of_cell(planned, 5) == plan_of_cell(CELL, 5)
    assert planned == CELL
    with pytest.raises(PlanError, match="seed=-1"):
        plan_of_cell(planned, -1)


def test_a_run_is_known_by_its_row_and_no_other_run_is():
    rows = {}
    for overrides in (
        "",
        "loss.name=bce",
        "epochs=9 augment.flip=null",
        "batch.images=1437 batch.norm_images=1437",
    ):
        plan = small_plan(V1, overrides=overrides, seed=7)
        rows[overrides] = row_of(plan)
        assert len(plan.identity.key) == 16 and int(plan.identity.key, 16) >= 0
    for overrides in rows:
        identity = small_plan(V1, overrides=overrides, seed=7).identity
        assert [text for text, row in rows.items() if identity.is_of(row)] == [overrides]


def test_the_key_is_over_what_may_change_the_score_and_not_over_where_the_data_lies():
    plan = small_plan(V1)
    others = [
        small_plan("pycls-dds"), small_plan(V1, "test_convnext"),
        small_plan(V1, overrides="loss.name=bce"), small_plan(V1, seed=1),
        small_plan(V1, bad_images="skip"),
        dataclasses.replace(plan, plugins={"my_losses.py": "a" * 64}),
        dataclasses.replace(plan, plugins={"my_losses.py": "b" * 64}),
    ]  # fmt: skip
    assert (
        len({other.identity.key for other in [plan, *others]})
        == len({other.run_name("f") for other in [plan, *others]})
        == 8
    )
    assert (
        dataclasses.replace(others[-1], plugins={"elsewhere/my_losses.py": "b" * 64}).identity
        == others[-1].identity
    )
    row = row_of(plan)
    for change in (
        {"run": f"{row.run}-2"},
        {"top1_pct": 1.0},
        {"ablation": "x", "cell": "y"},
        {"deviations": ()},
    ):
        assert plan.identity.is_of(row.model_copy(update=change))
    for change in ({"run": "another"}, {"data_fingerprint": "1" * 64}):
        assert not plan.identity.is_of(row.model_copy(update=change))


def test_two_spellings_of_one_run_have_one_key():
    spellings = [
        "loss.name=bce",
        "'loss={name: bce}'",
        "smoothing=null loss.name=bce",
        "'loss={name: bce}' epochs=2",
    ]
    assert len({small_plan(V1, overrides=text).identity.key for text in spellings}) == 1


def test_values_that_are_equal_to_six_digits_are_two_runs():
    plans = [
        small_plan(V1, overrides=f"lr.peak={value}")
        for value in ("0.00123456", "0.0012345649", "0.0012345600000000002")
    ]
    assert (
        len({plan.identity.key for plan in plans})
        == len({plan.run_name("f") for plan in plans})
        == 3
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"epochs": 3, "lr.peak": 0.002, "mix": None}, "epochs=3 lr.peak=0.002 mix=null"),
        (
            {"optimizer": {"name": "adamw", "betas": (0.9, 0.999)}},
            "optimizer={name: adamw, betas: [0.9, 0.999]}",
        ),
        (
            {"optimizer.eps": 1e-8, "model.zero_init_last": False},
            "optimizer.eps=1e-08 model.zero_init_last=false",
        ),
        ({"loss.name": "off"}, "'loss.name=\"off\"'"),
        ({"model.pretrained.file": "a b/it's.safetensors"}, None),
        ({"augment": ({"name": "flip"},), "repeats": 2}, "augment=[{name: flip}] repeats=2"),
    ],
)
def test_overrides_become_the_text_that_gives_them_back(overrides, text):
    made = overrides_text(overrides)
    assert text in (None, made)
    assert overrides_of(made) == overrides


LABELS = st.sampled_from(["epochs", "lr.peak", "loss", "optimizer.betas"]) | st.text(max_size=6)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES
    | st.text(max_size=8)
    | st.sampled_from(["off", "no", "1e3", "2", "a b", "{", "]", "it's", '"', "1:30", "~", "#"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.dictionaries(LABELS, VALUES, max_size=4))
def test_any_overrides_are_given_back_exactly_or_refused(overrides):
    try:
        text = overrides_text(overrides)
    except OverrideError as error:
        assert str(error).isprintable()
    else:
        assert overrides_of(text) == overrides


@pytest.mark.parametrize(
    "value",
    ["plain", "off", "1e3", "a b", "{", "it's", 'say "no"', "1:30", "$HOME `ls`", "~", "#1", "no"],
)
def test_every_text_can_be_said(value):
    assert overrides_of(overrides_text({"model.pretrained.file": value, "epochs": 5})) == {
        "model.pretrained.file": value,
        "epochs": 5,
    }


@pytest.mark.parametrize("value", ["ce", "a b", "it's", '$HOME "x" `ls`', "c:\\d!"])
def test_the_command_says_to_a_shell_what_the_cell_is(value):
    overrides = {
        "epochs": 2,
        "lr.schedule": {"name": "cosine", "end": 0.0},
        "model.pretrained.file": value,
    }
    cell = dataclasses.replace(CELL, overrides=overrides_text(overrides))
    make, *words = shlex.split(command(cell, 4))
    given = dict(word.split("=", 1) for word in words)
    assert make == "make"
    assert given == {
        "recipe": V1,
        "model": "test_resnet",
        "data": "digits",
        "seed": "4",
        "set": cell.overrides,
    }
    assert overrides_of(given["set"]) == overrides


def test_a_command_is_easy_to_read():
    cell = dataclasses.replace(CELL, overrides="epochs=3 lr.schedule={name: cosine, end: 0.0}")
    assert command(cell, 0).endswith('seed=0 set="epochs=3 lr.schedule={name: cosine, end: 0.0}"')
    assert command(dataclasses.replace(CELL, overrides=""), 0).endswith("data=digits seed=0")
