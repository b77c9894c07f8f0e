"""Cells: the text that makes them, and the keys by which they meet their rows."""

import dataclasses
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import small_plan
from support.rows import row_of
from trainer.ablation.cells import Cell, command, plan_key, plan_of_cell, row_key, text_of
from trainer.recipe.overrides import OverrideError, overrides_of
from trainer.recipe.plan import PlanError
from trainer.runs.results import RowDeviation

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


def test_a_plan_and_its_row_have_one_key():
    for overrides in (
        "",
        "loss.name=bce",
        "epochs=9 augment.flip=null",
        "batch.images=1437 batch.norm_images=1437",
    ):
        plan = small_plan(V1, overrides=overrides, seed=7)
        assert plan_key(plan) == row_key(row_of(plan))
        assert len(plan_key(plan)) == 16 and int(plan_key(plan), 16) >= 0


def test_the_key_is_over_what_may_change_the_score_and_not_over_where_the_data_lies():
    plan = small_plan(V1)
    row = row_of(plan)
    others = [
        small_plan("pycls-dds"),
        small_plan(V1, "test_convnext"),
        small_plan(V1, overrides="loss.name=bce"),
        small_plan(V1, seed=1),
    ]
    assert len({plan_key(other) for other in [plan, *others]}) == 5
    for change in ({"digest": "1" * 12}, {"version": 2}, {"data": "mnist"}, {"recipe": "A4"}):
        assert row_key(row.model_copy(update=change)) != row_key(row)
    for change in (
        {"data_fingerprint": "1" * 64},
        {"run": "another"},
        {"top1_pct": 1.0},
        {"ablation": "x", "cell": "y"},
    ):
        assert row_key(row.model_copy(update=change)) == row_key(row)


def test_two_spellings_of_one_run_have_one_key():
    spellings = [
        "loss.name=bce",
        "'loss={name: bce}'",
        "smoothing=null loss.name=bce",
        "'loss={name: bce}' epochs=2",
    ]
    assert len({plan_key(small_plan(V1, overrides=text)) for text in spellings}) == 1


def test_what_was_changed_and_changed_back_is_no_deviation():
    profile, back = (
        RowDeviation(path="image.train_px", before=a, after=b, origin="set")
        for a, b in (("224", "32"), ("32", "224"))
    )
    other = RowDeviation(path="epochs", before="90", after="9", origin="profile")
    row = row_of(small_plan(V1))
    keys = {
        row_key(row.model_copy(update={"deviations": changes}))
        for changes in ((other,), (profile, other, back))
    }
    assert (
        len(keys) == 1
        and row_key(row.model_copy(update={"deviations": (profile, other)})) not in keys
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
    made = text_of(overrides)
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
        text = text_of(overrides)
    except OverrideError as error:
        assert str(error).isprintable()
    else:
        assert overrides_of(text) == overrides


@pytest.mark.parametrize(
    "value",
    ["plain", "off", "1e3", "a b", "{", "it's", 'say "no"', "1:30", "$HOME `ls`", "~", "#1", "no"],
)
def test_every_text_can_be_said(value):
    assert overrides_of(text_of({"model.pretrained.file": value, "epochs": 5})) == {
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
    cell = dataclasses.replace(CELL, overrides=text_of(overrides))
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
