"""Finding, folding, overriding and writing recipes."""

import re
import shutil

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.base import provenance
from trainer.base.component import registered, tag_of
from trainer.base.errors import ConfigError, OverrideError, UserError
from trainer.components.distillation import Distillation
from trainer.components.losses import Loss
from trainer.components.mixing import Mixing
from trainer.components.optimizers import Optimizer
from trainer.components.schedules import Schedule
from trainer.recipe import check, shipped, tree
from trainer.recipe.check import kinds_in
from trainer.recipe.load import parse_recipe
from trainer.recipe.outline import Outline
from trainer.recipe.overrides import check_keys
from trainer.recipe.schema import Deviation, Recipe, apply_overrides, load_recipe, open_recipe
from trainer.recipe.shipped import RecipeError, find_recipe

A1 = load_recipe(find_recipe("A1.v1"))
A2 = load_recipe(find_recipe("A2.v1"))
CONVNEXT = load_recipe(find_recipe("convnext.v2"))
A1_TEXT = find_recipe("A1.v1").read_text()


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder of recipes in the place of the committed ones."""
    monkeypatch.setattr(shipped, "recipes_folder", lambda: tmp_path)
    return tmp_path


def written(folder, text: str, name: str = "A1.v1"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_a_name_means_its_newest_version(pages):
    for version in (1, 2, 10):
        written(pages, "", f"A1.v{version}")
    written(pages, "", "A1.vx")
    assert find_recipe("A1").stem == "A1.v10"
    assert find_recipe("A1.v2").stem == "A1.v2"
    assert find_recipe("some/where/A1.v1.yaml").as_posix() == "some/where/A1.v1.yaml"


def test_an_unknown_name_lists_what_there_is(pages):
    written(pages, "", "convnext.v2")
    with pytest.raises(RecipeError) as error:
        find_recipe("convnex")
    assert str(error.value).endswith(
        "there is no such recipe (did you mean convnext?); there are convnext.v2"
    )
    with pytest.raises(RecipeError, match="^[^\n]*$"):
        find_recipe("../\n\x1b[2J")


def test_a_name_that_several_begin_with_is_answered_with_all_of_them():
    with pytest.raises(RecipeError) as refused:
        find_recipe("finetune")
    assert "(did you mean finetune-adamw or finetune-sgd?)" in str(refused.value)


def test_a_wheel_carries_its_pages_inside(tmp_path, monkeypatch):
    package = tmp_path / "site" / "trainer"
    shutil.copytree(shipped.recipes_folder(), package / "recipes")
    monkeypatch.setattr(provenance, "__file__", str(package / "base" / "provenance.py"))
    assert find_recipe("A1").is_relative_to(package / "recipes")
    (
        package.parent / "recipes"
    ).mkdir()  # another distribution's folder beside the package is not ours
    assert find_recipe("A1").is_relative_to(package / "recipes")
    assert load_recipe(find_recipe("A1.v1")) == A1


def test_a_page_is_named_after_its_file(tmp_path):
    with pytest.raises(
        ConfigError, match=r"B1.v1.yaml:4: this recipe is A1.v1; name its file A1.v1.yaml"
    ):
        load_recipe(written(tmp_path, A1_TEXT, "B1.v1"))
    assert load_recipe(written(tmp_path, A1_TEXT, "recipe")) == A1  # a run's own recipe


def test_positions_are_those_of_the_page():
    found, positions = open_recipe(find_recipe("A1.v1"))
    lines = A1_TEXT.split("\n")
    assert found == A1
    assert lines[positions.line(("lr", "warmup_from")) - 1].startswith("  warmup_from: 1.0e-4")
    assert "name: rand_augment" in lines[positions.line(("augment", 2)) - 1]


@pytest.mark.parametrize(
    ("old", "new", "at", "sentence"),
    [
        (
            "images: 2048",
            "images: 2000",
            "images: 2000",
            "batch.images 2000 is no multiple .* write 1536 or 2048",
        ),
        ("norm_images: 512", "norm_images: 1", "mix:", "mix needs two images"),
        (
            "{name: bce}",
            "{name: bce, threshold: 0.2}",
            "smoothing:",
            "smoothing 0.1 is erased by loss.threshold 0.2",
        ),
        (
            "- {name: flip}",
            "- {name: flip}\n  - {name: flip}  # again",
            "# again",
            "flip is there twice",
        ),
        (
            "  - {name: flip}\n",
            (
                "  - {name: random_erasing, share: 0.1, area: [0.1, 0.2], aspect: [0.5, 2.0], fill:"
                " mean}\n"
            ),
            "- name: rand_augment",
            r"rand_augment \(pixels\) comes after random_erasing \(normalized\); move it before",
        ),
        (
            "warmup_epochs: 5",
            "warmup_epochs: 601",
            "warmup_epochs",
            "lr.warmup_epochs 601 does not fit .* 600; write 600 at most",
        ),
        ("warmup_epochs: 5", "warmup_epochs: -5", "warmup_epochs", "must be at least 1"),
        (
            "drop_path: 0.05",
            "drop_path: 0",
            "drop_path: 0",
            "above 0, or leave the key out to turn it off",
        ),
        ("drop_path: 0.05", "drop_path: 1.5", "drop_path: 1.5", "must be below 1"),
        ("epochs: 600 ", "epochs: 600000 ", "epochs: 600000", "must be at most 10000"),
        ("repeats: 3", "repeats: 1", "repeats: 1", "must be at least 2"),
        (
            "drop_path: 0.05",
            "average: {decay: 0.9, every_steps: 1}",
            "average:",
            "average has no name; add name: one of ema, lookahead",
        ),
        (
            "  lr.warmup_from:",
            "  lr.warmup_frm:",
            "  lr.warmup_frm:",
            "'warmup_frm' is no key of lr .did you mean",
        ),
        ("  lr.warmup_from:", "  published:", "  published:", "published is not assumable"),
        (
            "  lr.warmup_from:",
            "  augment.0.name:",
            "  augment.0.name:",
            "augment.random_resized_crop.name or lr.peak",
        ),
        (
            "  efficientnet_b1:",
            "  efficientnet_b0:",
            "  efficientnet_b0:",
            "b0 was scored at train_px 224",
        ),
        (
            "  efficientnet_b1:",
            "  efficientnet_b9:",
            "  efficientnet_b9:",
            "is not among this recipe's published models",
        ),
        (
            "b1: {image: {train_px: 240",
            "b1: {image: {train_p: 240",
            "  efficientnet_b1:",
            "no key of image",
        ),
        (
            "b1: {image: {",
            "b1: {name: B1, image: {",
            "  efficientnet_b1:",
            "name belongs to the whole recipe",
        ),
        (
            "  efficientnet_b1: {image: {train_px: 240, test_px: 240}}\n",
            "",
            "  - {model: efficientnet_b1",
            "efficientnet_b1 was scored at train_px 240, its recipe says 224",
        ),
    ],
)
def test_what_cannot_be_together_is_refused_at_its_line(tmp_path, old, new, at, sentence):
    assert A1_TEXT.count(old) >= 1
    text = A1_TEXT.replace(old, new, 1)
    line = 1 + next(number for number, row in enumerate(text.split("\n")) if at in row)
    with pytest.raises(ConfigError, match=rf":{line}: .*{sentence}"):
        load_recipe(written(tmp_path, text))


def test_lines_for_one_model_are_folded_in():
    folded = CONVNEXT.for_model("convnext_base")
    assert folded.drop_path == 0.5 and CONVNEXT.drop_path == 0.1
    assert folded.lr == CONVNEXT.lr and not folded.per_model
    assert [score.model for score in folded.published] == ["convnext_base"]
    assert "drop_path" in CONVNEXT.assumed and "drop_path" not in folded.assumed
    b3 = A1.for_model("efficientnet_b3").image
    assert (b3.train_px, b3.test_px, b3.test_crop_share) == (300, 300, 0.95)  # mappings are merged
    assert CONVNEXT.for_model("convnext_atto").drop_path == 0.1


def test_merging_replaces_lists_and_other_ingredients():
    page = {"loss": {"name": "bce", "threshold": 0.2}, "betas": (1, 2), "lr": {"a": 1, "b": 2}}
    lines = {"loss": {"name": "ce"}, "betas": (3,), "lr": {"b": 4}}
    assert tree.merged(page, lines) == {
        "loss": {"name": "ce"},
        "betas": (3,),
        "lr": {"a": 1, "b": 4},
    }


def test_the_digest_is_over_what_is_on():
    assert re.fullmatch("[0-9a-f]{12}", A1.digest)
    same = [
        {"title": "x"},
        {"source": "x"},
        {"assumed": {}},
        {"average": None},
        {"model": {"dropout": None}},
    ]
    page = tree.plain(A1)
    assert {check.check(Recipe, {**page, **lines}).digest for lines in same} == {A1.digest}
    assert check.check(Recipe, {**page, "drop_path": 0.05 + 1e-9}).digest != A1.digest
    # A false that differs from an absent key is on.
    assert check.check(Recipe, {**page, "model": {"zero_init_last": False}}).digest != A1.digest


def test_overrides_are_recorded():
    made, deviations = apply_overrides(
        A1.for_model("resnet50"), "epochs=5 lr.peak=2e-3 augment.2.magnitude=6"
    )
    assert (made.epochs, made.lr.peak, made.augment[2].magnitude) == (5, 0.002, 6.0)
    assert set(deviations) == {
        Deviation("epochs", 600, 5, "set"),
        Deviation("lr.peak", 0.005, 0.002, "set"),
        Deviation("augment.rand_augment.magnitude", 7.0, 6.0, "set"),
    }
    assert made.digest != A1.digest
    assert not made.published and "epochs" not in made.assumed and "lr.warmup_from" in made.assumed


def test_what_changes_nothing_is_no_deviation():
    page = A1.for_model("resnet50")
    assert apply_overrides(page, "") == (page, ())
    assert apply_overrides(page, "epochs=600 drop_path=0.05 mix.partner=reversed average=null") == (
        page,
        (),
    )


def test_parts_are_turned_off_and_put_in_place():
    page = A2.for_model("resnet50")
    made, (deviation,) = apply_overrides(page, {"mix": None}, "profile")
    assert (
        made.mix is None
        and deviation.path == "mix"
        and deviation.after is None
        and deviation.origin == "profile"
    )
    assert not any(label.startswith("mix") for label in made.assumed)
    made, (deviation,) = apply_overrides(page, "augment.flip=null")
    assert [part.name for part in made.augment] == ["random_resized_crop", "rand_augment"]
    assert deviation == Deviation("augment.flip", {"name": "flip"}, None, "set")
    made, _ = apply_overrides(
        page, "mix={name: mixup, alpha: 0.3, partner: reversed} smoothing=null"
    )
    assert made.mix.alpha == 0.3
    made, _ = apply_overrides(
        page, {"optimizer.betas": [0.9, 0.95], "augment.random_resized_crop.area": (0.3, 1)}
    )
    assert made.optimizer.betas == (0.9, 0.95) and made.augment[0].area == (0.3, 1.0)


def test_another_ingredient_keeps_the_keys_that_both_have():
    made, deviations = apply_overrides(A2.for_model("resnet50"), "loss.name=ce")
    assert made.loss.name == "ce"
    assert {(change.path, change.before, change.after) for change in deviations} == {
        ("loss.name", "bce", "ce"),
        ("loss.threshold", 0.2, None),
    }
    made, deviations = apply_overrides(
        A2.for_model("resnet50"), "optimizer.momentum=0.9 optimizer.name=sgd"
    )
    assert (made.optimizer.momentum, made.optimizer.weight_decay) == (0.9, 0.02)
    assert {change.path for change in deviations} == {
        "optimizer.name", "optimizer.momentum", "optimizer.betas", "optimizer.eps",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "off"),
    [
        ("lr.warmup_epochs=0", "lr.warmup_epochs=null lr.warmup_from=null"),
        ("drop_path=0", "drop_path=null"),
        ("epochs=0", None),
        ("lr.peak=0", None),
    ],
)
def test_a_zero_that_means_off_is_answered_with_all_that_turns_it_off(given, off):
    page = A1.for_model("resnet50")
    with pytest.raises(OverrideError) as refused:
        apply_overrides(page, given)
    assert ("null" in str(refused.value)) == (off is not None)
    if off:
        assert f"write {off} to turn it off" in str(refused.value)
        apply_overrides(page, off)


@pytest.mark.parametrize("name", ["A1", "finetune-adamw", "linear-probe"])
@pytest.mark.parametrize("given", ["lr.warmup_epochs=3", "lr.warmup_epochs=null"])
def test_half_a_warm_up_is_refused_with_the_other_half(name, given):
    """Or accepted, where the recipe has the other half, or neither."""
    page = load_recipe(find_recipe(name)).for_model("resnet50")
    try:
        apply_overrides(page, given)
    except OverrideError as error:
        assert given in error.hint and given.partition("=")[0] in error.place
        [printed] = re.findall(r'set="([^"]*)"', str(error))
        apply_overrides(page, printed)
    else:
        assert (name == "A1") == given.endswith("3")


def test_the_outline_has_the_keys_of_a_recipe():
    """What is refused before torch is imported is what would be refused after it."""
    ours, theirs = Outline.model_fields, Recipe.model_fields
    assert list(ours) == list(theirs)
    sections = {key for key, field in ours.items() if kinds_in(field.annotation)}
    assert sections == {"batch", "lr", "image", "precise_norm", "early_stopping"}
    assert all(ours[key].annotation == theirs[key].annotation for key in sections)
    for path in shipped.recipe_paths():
        plain = tree.plain(load_recipe(path).for_model("resnet50"))
        check_keys(Outline, plain, dict.fromkeys(tree.leaves(plain)))


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("train_px", "image.train_px"),
        ("weight_decay", "optimizer.weight_decay"),
        ("magnitude_std", "augment.rand_augment.magnitude_std"),
        ("from_px", "image.growth.from_px"),
        ("image.peak", "lr.peak"),
        ("model.smoothing", "smoothing"),
    ],
)
def test_a_key_without_its_section_is_answered_with_its_whole_place(key, place):
    with pytest.raises(OverrideError) as refused:
        apply_overrides(A1.for_model("resnet50"), f"{key}=64")
    assert refused.value.kind == "unknown_key" and refused.value.hint == f"use {place}"


@pytest.mark.parametrize(
    ("text", "labels", "kind", "words"),
    [
        ("epohcs=5", ["epohcs"], "unknown_key", "did you mean epochs?"),
        ("lr.peek=1", ["lr.peek"], "unknown_key", "did you mean peak?"),
        ("epochs=0", ["epochs"], "greater_than_equal", "0; it must be at least 1"),
        (
            "lr.peak=0",
            ["lr.peak"],
            "greater_than",
            "it must be above 0",
        ),
        (
            "drop_path=0",
            ["drop_path"],
            "greater_than",
            "it must be above 0, or write drop_path=null to turn it off",
        ),
        ("mix=~", ["mix"], "misleading", "write mix=null to turn it off"),
        ("epochs=no", ["epochs"], "misleading", "write false"),
        ("epochs=", ["epochs"], "", "no value; write epochs=null to turn it off"),
        ("mix=off", ["mix"], "", "write mix=null"),
        ("epochs", ["epochs"], "", "no path=value"),
        ("epochs=5 epochs=6", ["epochs"], "", "epochs is set twice"),
        ("epochs.x=5", ["epochs.x"], "single_value", "epochs is a single value"),
        ("title='x", [], "", "a quotation mark is not closed"),
        (
            "optimizer.nesterov=true",
            ["optimizer.nesterov"],
            "unknown_key",
            "of sgd and decoupled_sgd and muon_sgd, not of lamb",
        ),
        ("optimizer.name=lmab", ["optimizer.name"], "unknown_name", "did you mean lamb?"),
        ("lr.schedule.name=step", ["lr.schedule.name"], "missing", "every_epochs, factor"),
        ("average.decay=0.9", ["average.decay"], "off", "set it whole: average={name: ...}"),
        ("augment.7.name=flip", ["augment.7.name"], "unknown_name", "known: flip, rand_augment"),
        ("augment.flp=null", ["augment.flp"], "unknown_name", "did you mean flip?"),
        (
            "epochs=9 loss.threshold=0.2",
            ["loss.threshold"],
            "conflict",
            "smoothing 0.1 is erased",
        ),
        (
            "epochs=9 batch.norm_images=300",
            ["batch.norm_images"],
            "conflict",
            "batch.images 2048 is no multiple",
        ),
        ("name=B1", ["name"], "locked", "a recipe of your own"),
        ("assumed.epochs=x", ["assumed.epochs"], "locked", "a recipe of your own"),
    ],
)
def test_overrides_that_do_not_fit_name_their_item(text, labels, kind, words):
    with pytest.raises(OverrideError) as error:
        apply_overrides(A1.for_model("resnet50"), text)
    found = error.value
    assert (list(found.labels), found.kind) == (labels, kind)
    item = {"epochs=5 epochs=6": "epochs=6"}.get(text, text)
    assert found.place.split(" ") == [
        f"set={one}" for one in item.split(" ") if not labels or one.partition("=")[0] in labels
    ]
    assert (
        str(found).startswith(f"{found.place}: ")
        and words in str(found)
        and "leave the key out" not in str(found)
    )


LABELS = sorted(tree.leaves(tree.plain(A2.for_model("resnet50"))))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["sgd", "ce"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.sampled_from(LABELS) | st.text(max_size=8), VALUES)
def test_made_up_overrides_never_end_in_a_traceback(label, value):
    for overrides in ({label: value}, f"{label}={value}"):
        try:
            made, deviations = apply_overrides(A2.for_model("resnet50"), overrides)
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert (made.digest == A2.for_model("resnet50").digest) == (not deviations)


def test_a_written_recipe_reads_back(tmp_path):
    made, _ = apply_overrides(
        CONVNEXT.for_model("convnext_tiny"), "lr.schedule.end=1e-20 average.decay=0.99999999"
    )
    for one in (A1, A2.for_model("resnet50"), CONVNEXT, made):
        again = load_recipe(written(tmp_path, one.to_yaml(), "recipe"))
        assert again == one and again.digest == one.digest


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=20))
def test_any_text_is_written_so_that_it_reads_back(text):
    page = check.check(Recipe, {**tree.plain(A2), "title": text})
    assert parse_recipe(page.to_yaml(), "page", Recipe)[0].title == text


SINGLE = {
    "loss": Loss,
    "optimizer": Optimizer,
    "lr.schedule": Schedule,
    "mix": Mixing,
    "distill": Distillation,
}
NAMED = [(label, tag_of(one)) for label, kind in SINGLE.items() for one in registered(kind)]


@pytest.mark.parametrize(
    ("label", "name"), [*NAMED, ("average", "ema"), ("model.norm", "group_norm")]
)
def test_an_example_of_what_is_missing_can_be_copied(label, name):
    """Whoever names a component gets the rest of it in one piece that is accepted as printed."""
    recipe = load_recipe(find_recipe("A3.v1")).for_model("resnet50")
    try:
        apply_overrides(recipe, f"{label}.name={name}")
    except OverrideError as error:
        if error.kind not in ("missing", "off"):
            return
        [printed] = re.findall(r'set="([^"]*)"', str(error))
        try:
            found, _ = apply_overrides(recipe, printed)
        except OverrideError as later:  # one that needs something elsewhere in the recipe
            assert later.kind in ("conflict", "value_error"), later
        else:
            assert check.value_at(tree.plain(found), tuple(label.split(".")))["name"] == name


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("model.pretrained=true", ("file", "sha256")),
        ("average=true", ("name", "decay")),
        ("loss=ce", ("name",)),
    ],
)
def test_a_section_given_as_a_switch_shows_an_example_to_be_copied(given, keys):
    with pytest.raises(UserError) as refused:
        apply_overrides(load_recipe(find_recipe("A3")).for_model("resnet18"), given, "set")
    example = yaml.safe_load(re.search(r"such as (\{.*\})", refused.value.hint)[1])
    assert set(keys) <= set(example)
