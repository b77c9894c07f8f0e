"""An ablation's file: what it makes, what is refused and where."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.loss_ablation import PAGE, written
from support.loss_ablation import results as results
from trainer.ablation import spec as ablation
from trainer.ablation.budget import Budget, budget_lines
from trainer.ablation.cells import overrides_text, plan_of_cell
from trainer.ablation.questions import question_of
from trainer.ablation.spec import AblationError, AblationPage, find_ablation, load_ablation
from trainer.base.errors import UserError
from trainer.recipe import tree
from trainer.recipe.adapt import adaptation
from trainer.recipe.load import ConfigError, parse_recipe
from trainer.recipe.profiles import PROFILES
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.report.rows import by_cell, find_rows
from trainer.runs.job import Job, plan_of


def test_a_page_becomes_planned_cells(tmp_path):
    path = written(tmp_path, PAGE)
    found = load_ablation(path)
    assert (found.name, found.title, found.question, found.seeds) == (
        "loss",
        "BCE or CE",
        "Which loss?",
        (0, 1),
    )
    assert found.path == path and found.page.recipe == "A2"
    base, ce, _ = found.cells
    assert [cell.name for cell in found.cells] == ["BCE", "CE", "soft BCE"]
    assert [cell.is_base for cell in found.cells] == [True, False, False]
    assert {cell.group for cell in found.cells} == {"test_resnet on digits"}
    assert (base.published, base.published_source, ce.published) == (79.8, "Table 1", None)
    assert ce.overrides == "epochs=2 batch.images=64 loss.name=ce"
    assert ce.levels == (("loss", "CE"),)
    for cell in found.cells:  # the text alone makes the run
        asked = plan_of(Job("A2", "test_resnet", "digits", overrides=cell.overrides, seed=1))
        assert plan_of_cell(cell, 1) == asked


def test_every_model_on_every_data_set_is_a_group_with_its_own_base(tmp_path):
    text = PAGE.replace("[test_resnet]", "[test_resnet, test_convnext]").replace(
        "[digits]", "[digits, digits-grey]"
    )
    text = text.replace("{cell: BCE, ", "{cell: BCE, model: test_convnext, ").replace(
        "batch.images: 64", "batch.drop_last: false"
    )
    cells = load_ablation(written(tmp_path, text)).cells
    groups = [
        "test_resnet on digits",
        "test_convnext on digits",
        "test_resnet on digits-grey",
        "test_convnext on digits-grey",
    ]
    assert list(dict.fromkeys(cell.group for cell in cells)) == groups
    assert [cell.is_base for cell in cells] == [True, False, False] * 4
    assert (
        len({cell.name for cell in cells}) == 12 and cells[4].name == "CE (test_convnext, digits)"
    )
    assert [cell.published for cell in cells] == [None] * 3 + [79.8] + [None] * 5 + [79.8] + [
        None
    ] * 2


@pytest.mark.parametrize(
    ("old", "new", "at", "sentence"),
    [
        (
            "question:",
            "qestion:",
            "qestion:",
            "'qestion' is no key of this ablation (did you mean question?)",
        ),
        ('question: "Which loss?"\n', "", "name: loss", "this ablation has no question"),
        (
            "name: one_at_a_time",
            "name: one_at_a_tim",
            "name: one_at_a_tim",
            "(did you mean one_at_a_time?)",
        ),
        ("  base: BCE\n", "", "design:", "design has no base"),
        (
            "name: loss\n",
            "name: other\n",
            "name: other",
            "name is other, but the file is loss.yaml",
        ),
        ("recipe: A2", "recipe: A9", "recipe: A9", "recipe=A9: there is no such recipe"),
        ("recipe: A2", "recipe: A9.yaml", "recipe: A9.yaml", "'A9.yaml': no such file"),
        (
            "[test_resnet]",
            "[resnet5O]",
            "models:",
            "model=resnet5O: timm has no such model (did you mean resnet50?)",
        ),
        ("[test_resnet]", "[test_resnet, test_resnet]", "models:", "test_resnet is listed twice"),
        ("[digits]", "[digit]", "data:", "data=digit: unknown (did you mean digits"),
        ("[digits]", "[digit.yaml]", "data:", "'digit.yaml': no such file"),
        ("[0, 1]", "[0, 1, 0]", "seeds:", "0 is listed twice"),
        ("[0, 1]", "[-1]", "seeds:", "it must be at least 0"),
        ("[0, 1]", "[]", "seeds:", "write at least one"),
        ("seeds:", "smallest_points: 0\nseeds:", "smallest_points:", "it must be above 0"),
        ("{epochs: 2}", "{epochs: 2, share: 0.5}", "budget:", "write either epochs or share"),
        ("{epochs: 2}", "{share: 1.5}", "budget:", "it must be at most 1"),
        (
            "batch.images: 64",
            "epochs: 3",
            "  epochs: 3",
            "the budget sets the number of epochs already",
        ),
        ("loss.name: ce", "epochs: 3", "{name: CE", "the budget sets the number of epochs already"),
        (
            "batch.images: 64",
            "batch.imags: 64",
            "batch.imags",
            "'imags' is no key of batch (did you mean images?)",
        ),
        (
            "batch.images: 64",
            "batch.images: 63",
            "batch.images: 63",
            "no multiple of batch.norm_images",
        ),
        (
            "batch.images: 64",
            "batch.images: 2048",
            "batch.images: 2048",
            "is more than the 1437 training images",
        ),
        (
            "batch.images: 64",
            "batch: {images: 2048, norm_images: 64, drop_last: true}",
            "  batch: {",
            "is more than the 1437 training images",
        ),
        ("batch.images: 64", "lr.peak: 0", "  lr.peak", "it must be above 0"),
        ("batch.images: 64", "name: B2", "  name: B2", "this is what the recipe says about itself"),
        (
            "batch.images: 64",
            "mix: null\n  mix.alpha: 1.0",
            "  mix.alpha",
            "mix.alpha is within mix",
        ),
        (
            "loss.name: ce",
            "loss.name: cee",
            "{name: CE",
            "'cee' is not known here (did you mean ce?)",
        ),
        ("loss.name: ce", "loss: {name: ce, eps: 1}", "{name: CE", "'eps' is no key of loss"),
        ("loss.name: ce", "loss.name: bce", "{name: CE", "the cell CE is the same as the base BCE"),
        (
            "loss.name: ce",
            "smoothing: 0.1",
            "{name: CE",
            "smoothing 0.1 is erased by loss.threshold 0.2",
        ),
        (
            "loss.threshold: null",
            "loss: {name: ce}",
            "{name: soft",
            "the cell soft BCE is the same run as CE",
        ),
        ("{name: soft BCE,", "{name: CE,", "{name: CE, set: {loss.threshold", "CE is listed twice"),
        (
            "{name: soft BCE,",
            "{name: soft BCE, recipe: A4,",
            "{name: soft",
            "recipe=A4: there is no such recipe",
        ),
        (', source: "Table 1"', "", "  - {cell", "published.0 has no source"),
        (
            "{cell: BCE,",
            "{cell: BEC,",
            "  - {cell",
            "'BEC' is no cell of this ablation (did you mean BCE?)",
        ),
        ("{cell: BCE,", "{cell: BCE, model: x,", "  - {cell", "'x' is no model of this ablation"),
        ("79.8", "180.0", "  - {cell", "it must be at most 100"),
        (
            "published:",
            "published:\n  - {cell: BCE, top1_pct: 1.0, source: x}",
            "Table 1",
            "BCE has a score already",
        ),
    ],
)
def test_an_error_has_its_line(tmp_path, old, new, at, sentence):
    assert old in PAGE
    text = PAGE.replace(old, new, 1)
    line = 1 + next(number for number, row in enumerate(text.split("\n")) if at in row)
    with pytest.raises(ConfigError) as error:
        load_ablation(written(tmp_path, text))
    assert error.value.line == line and sentence in str(error.value), error.value
    assert error.value.place.endswith("loss.yaml")
    assert str(error.value).isprintable()


def test_a_key_within_a_value_is_refused_at_its_own_line(tmp_path):
    text = PAGE.replace(
        "        - {name: CE, set: {loss.name: ce}}",
        "        - name: CE\n          set:\n"
        "            loss:\n              name: ce\n              epz: 1",
    )
    with pytest.raises(ConfigError, match=r":22: .*'epz' is no key of loss"):
        load_ablation(written(tmp_path, text))


def test_names_mean_the_pages_that_come_with_the_package(tmp_path, monkeypatch):
    assert find_ablation("some/where.yaml").as_posix() == "some/where.yaml"
    monkeypatch.setattr(ablation, "ablations_folder", lambda: tmp_path)
    path = written(tmp_path, PAGE)
    assert find_ablation("loss") == path
    assert load_ablation("loss").path == path
    for name in ("los", "../loss", "", "loss\n\x1b[2J"):
        with pytest.raises(
            AblationError, match=r"^ablation=[^\n\x1b]*unknown ablation.*valid: loss$"
        ):
            find_ablation(name)


@pytest.mark.parametrize("data", ["digits", "imagenet-1k"])
@pytest.mark.parametrize(
    "recipe", ["A2", "torchvision-v1", "torchvision-v2", "mosaic-mild", "bit-i1k", "ffcv-rn18-16"]
)
def test_a_budget_makes_the_run_that_a_shorter_profile_makes(recipe, data):
    """Against the code path of a profile with that many epochs, for several recipes."""
    profile = PROFILES[data]
    adapt = {**(profile.adapt.model_dump() if profile.adapt else {}), "epochs": 5}
    shorter = type(profile).model_validate({**profile.model_dump(), "adapt": adapt})
    page = load_recipe(find_recipe(recipe)).for_model("resnet18")
    wanted, _ = apply_overrides(page, adaptation(page, shorter), "profile")
    whole, _ = apply_overrides(page, adaptation(page, profile), "profile")
    lines = budget_lines(Budget(epochs=5), page, whole, profile)
    assert lines["epochs"] == 5
    assert apply_overrides(whole, lines)[0].digest == wanted.digest
    assert apply_overrides(whole, overrides_text(lines))[0].digest == wanted.digest


def shortened(budget, recipe, data):
    page = load_recipe(find_recipe(recipe)).for_model("resnet18")
    adapted, _ = apply_overrides(page, adaptation(page, PROFILES[data]), "profile")
    return budget_lines(budget, page, adapted, PROFILES[data])


def test_a_share_is_of_the_epochs_that_the_recipe_has_on_its_data():
    assert shortened(Budget(share=0.5), "A2", "digits")["epochs"] == 4  # of 9
    assert shortened(Budget(share=0.5), "A2", "imagenet-1k")["epochs"] == 150
    assert shortened(Budget(share=1.0), "A2", "digits") == {}
    assert shortened(None, "A2", "digits") == {}
    assert shortened(Budget(share=0.01), "torchvision-v1", "digits")["epochs"] == 1


def test_what_the_ablation_sets_stays_under_its_budget(tmp_path):
    text = PAGE.replace("recipe: A2", "recipe: torchvision-v1").replace(
        "loss.name: ce", "loss: {name: bce}"
    )
    text = text.replace("loss.threshold: null", "smoothing: 0.1").replace(
        "batch.images: 64", "lr.schedule: {name: step, every_epochs: 2, factor: 0.5}"
    )
    cell = load_ablation(written(tmp_path, text)).cells[0]
    assert cell.plan.recipe.lr.schedule.every_epochs == 2 and cell.plan.recipe.epochs == 2
    text = text.replace(
        "lr.schedule: {name: step, every_epochs: 2, factor: 0.5}", "batch.drop_last: true"
    )
    assert (
        load_ablation(written(tmp_path, text)).cells[0].plan.recipe.lr.schedule.every_epochs == 1
    )  # 3 of 9


WORDS = st.sampled_from(
    [
        "name",
        "title",
        "question",
        "recipe",
        "models",
        "data",
        "seeds",
        "budget",
        "set",
        "design",
        "published",
        "factors",
        "levels",
        "cells",
        "steps",
        "parts",
        "base",
        "epochs",
        "share",
        "cell",
        "source",
        "loss.name",
        "mix",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(
        [
            "full",
            "listed",
            "cumulative",
            "leave_one_out",
            "one_at_a_time",
            "ce",
            "A2",
            "digits",
            "loss",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=120)
@given(st.dictionaries(WORDS, VALUES, max_size=12), st.booleans())
def test_made_up_pages_never_end_in_a_traceback(data, over_a_sound_one):
    sound = tree.plain(parse_recipe(PAGE, "page", AblationPage)[0]) if over_a_sound_one else {}
    refused_or_sound(tree.to_yaml({**sound, **data}))


@settings(max_examples=40)
@given(st.data())
def test_a_page_with_a_part_of_it_changed_never_ends_in_a_traceback(tmp_path_factory, data):
    start = data.draw(st.integers(0, len(PAGE) - 1))
    end = min(len(PAGE), start + data.draw(st.integers(0, 12)))
    put = data.draw(st.text(st.sampled_from("{}[]:,-'\"#&*!|> \n\tabc019.null"), max_size=5))
    path = written(tmp_path_factory.mktemp("page"), PAGE[:start] + put + PAGE[end:])
    try:
        load_ablation(path)
    except UserError as error:
        assert str(error).isprintable()


def refused_or_sound(text: str) -> None:
    try:
        parse_recipe(text, "page", AblationPage)
    except UserError as error:
        assert re.match(r"page:\d+: ", str(error)) and str(error).isprintable(), error


def test_the_keys_of_a_stored_row_are_those_of_its_cell(results, tmp_path):
    found = load_ablation(tmp_path / "loss.yaml")
    question = question_of(found)
    rows = by_cell(question, find_rows(results, [question]))
    assert {key for key, row in rows.items() if row} == {("BCE", 0), ("CE", 0), ("CE", 1)}
    assert (
        len({plan_of_cell(cell, seed).identity.key for cell in found.cells for seed in found.seeds})
        == 6
    )


def test_all_faults_of_an_ablation_are_said_at_once(tmp_path):
    page = PAGE.replace("{loss.name: ce}", "{loss.name: cee}").replace("loss.threshold", "los")
    with pytest.raises(ConfigError) as refused:
        load_ablation(written(tmp_path, page))
    assert "cee" in str(refused.value) and "'los'" in str(refused.value)
    page = PAGE.replace("[test_resnet]", "[test_resne, resnet18]").replace("A2", "A22")
    with pytest.raises(ConfigError) as refused:
        load_ablation(written(tmp_path, page))
    assert "A22" in str(refused.value) and "test_resne" in str(refused.value)
    page = PAGE.replace("seeds: [0, 1]", "seeds: [a]").replace("models:", "model:")
    with pytest.raises(ConfigError) as refused:
        load_ablation(written(tmp_path, page))
    text = str(refused.value)
    assert "seeds" in text and "model" in text and text.count("loss.yaml:") == 1


def test_a_name_and_a_source_may_be_left_out(tmp_path):
    page = PAGE.replace("name: loss\n", "", 1).replace('source: "nobody"\n', "")
    found = load_ablation(written(tmp_path, page))
    assert (found.name, found.page.name, found.page.source) == ("loss", "loss", "")
    bad = tmp_path / "my loss.yaml"
    bad.write_text(page)
    with pytest.raises(ConfigError, match="rename it"):
        load_ablation(bad)
