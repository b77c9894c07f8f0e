"""Every committed page: complete, sourced, and as strict as the loader."""

import math
import random
from pathlib import Path

import pytest
import timm
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import check, tree
from trainer.load import PageError, parse, parse_page
from trainer.recipe import ABOUT, Recipe, find_recipe, load_recipe, recipe_paths

PATHS = recipe_paths()
NAMES = [path.stem for path in PATHS]
# A page that a stored row cites never changes: a better one is a new version.
DIGESTS = {
    "A1.v1": "f1c6e9d659b1",
    "A2.v1": "1016b29acb8c",
    "A3.v1": "319f97206679",
    "convnext.v1": "50a35320dc25",
    "torchvision-v1.v1": "e735c9a97b12",
    "torchvision-v2.v1": "d947166d597c",
}
EACH_PAGE = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def test_pages_are_frozen():
    assert {path.stem: load_recipe(path).digest for path in PATHS} == DIGESTS


@EACH_PAGE
def test_every_page_reads_back_and_folds(path):
    page = load_recipe(path)
    assert parse_page(page.to_yaml(), "page", Recipe)[0] == page
    for model in page.per_model:
        folded = page.for_model(model)
        assert folded.digest != page.digest and not folded.per_model


@EACH_PAGE
def test_every_page_says_where_it_is_from(path):
    page = load_recipe(path)
    assert page.source and page.title and page.assumed and page.published
    assert all(why for why in page.assumed.values())
    assert path.read_text().startswith(f"# {page.name}: ")


@EACH_PAGE
def test_published_models_are_timms(path):
    assert {score.model for score in load_recipe(path).published} <= set(timm.list_models())


@pytest.mark.parametrize("number", [1, 2])
def test_torchvisions_scores_are_those_of_its_weights(number):
    page = load_recipe(find_recipe(f"torchvision-v{number}.v1"))
    for score in page.published:
        # resnext101_64x4d has no weights of the first recipe, so its first are of the second.
        weights = list(torchvision.models.get_model_weights(score.model))[0 if number == 1 else -1]
        assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == score.top1_pct
        preset = weights.transforms()
        assert preset.crop_size == [page.image.test_px]
        assert preset.resize_size == [math.floor(page.image.test_px / page.image.test_crop_share)]
        assert preset.interpolation.value == page.image.test_interpolation


@pytest.mark.parametrize(("name", "num_steps"), [("A1", 375_000), ("A2", 187_500), ("A3", 62_500)])
def test_the_papers_step_counts_leave_no_cooldown(name, num_steps):
    page = load_recipe(find_recipe(f"{name}.v1"))
    assert page.epochs * (1_281_167 // page.batch.images) == num_steps
    assert page.batch.images == 4 * page.batch.norm_images


def test_torchvisions_average_is_adjusted():
    page = load_recipe(find_recipe("torchvision-v2.v1"))
    weight = page.average.weight_at(1251 * 300 + 32, 0, page.batch.images, page.epochs, 1251)
    assert weight == pytest.approx(1 - 0.99891, abs=2e-5)


def test_the_three_procedures_differ_as_the_papers_table_says():
    pages = [load_recipe(find_recipe(f"A{number}.v1")) for number in (1, 2, 3)]
    assert [page.lr.peak for page in pages] == [5e-3, 5e-3, 8e-3]
    assert [page.optimizer.weight_decay for page in pages] == [0.01, 0.02, 0.02]
    assert [page.mix.mixup_alpha for page in pages] == [0.2, 0.1, 0.1]
    assert [page.augment[2].magnitude for page in pages] == [7, 7, 6]
    assert [page.drop_path for page in pages] == [0.05, 0.05, None]
    assert [page.smoothing for page in pages] == [0.1, None, None]
    assert [page.image.train_px for page in pages] == [224, 224, 160]
    assert [page.repeats is not None for page in pages] == [True, True, False]


def test_every_variant_of_convnext_has_its_depth_rate():
    page = load_recipe(find_recipe("convnext"))
    rates = {model: page.for_model(model).drop_path for model in sorted(page.per_model)}
    assert rates == {"convnext_base": 0.5, "convnext_large": 0.5, "convnext_small": 0.4, "convnext_tiny": 0.1}


def keys_of(path: Path) -> list[check.Path]:
    _, positions = parse(path.read_text(), path.name)
    return [place for place in positions.lines if place and isinstance(place[-1], str)]


def mutated(word: str, draw: random.Random) -> str:
    """The word with one letter deleted, replaced, inserted, or swapped with the next one."""
    place, letter = draw.randrange(len(word)), draw.choice("abcdefghijklmnopqrstuvwxyz0123456789_")
    changes = [word[:place] + letter + word[place:], word[:place] + letter + word[place + 1 :]]
    if len(word) > 1:
        changes += [word[:place] + word[place + 1 :]]
        changes += [word[:place] + word[place : place + 2][::-1] + word[place + 2 :]]
    return draw.choice(changes)


def renamed(data, place: check.Path, new: str):
    """Plain data with the key at `place` called `new`, at the same position."""
    parent = check.value_at(data, place[:-1])
    return tree.replaced(data, place[:-1], {new if key == place[-1] else key: part for key, part in parent.items()})


@EACH_PAGE
def test_each_key_mutated_by_a_letter_is_refused_at_its_place(path):
    data, _ = parse(path.read_text(), path.name)
    draw = random.Random(path.stem)
    for place in keys_of(path):
        new = mutated(place[-1], draw)
        if new in check.value_at(data, place[:-1]):  # the same word, or a key written twice: see the test below
            continue
        with pytest.raises(check.Refusal) as refusal:
            check.check(Recipe, renamed(data, place, new))
        assert refusal.value.path[: len(place)] == (*place[:-1], new), f"{place} as {new}"


SAMPLED = [(path, place) for path in PATHS for place in keys_of(path)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(SAMPLED), st.randoms(use_true_random=False))
def test_a_mutated_key_is_refused_at_its_line(sample, draw):
    path, place = sample
    text = path.read_text()
    data, positions = parse(text, path.name)
    lines, line = text.split("\n"), positions.line(place)
    new = mutated(place[-1], draw)
    if new in check.value_at(data, place[:-1]):
        return
    lines[line - 1] = lines[line - 1].replace(f"{place[-1]}:", f"{new}:", 1)
    with pytest.raises(PageError) as error:
        parse_page("\n".join(lines), "page", Recipe)
    assert str(error.value).startswith(f"page:{line}: ")


def test_nothing_assumed_is_about_the_page_itself():
    for path in PATHS:
        assert not [label for label in load_recipe(path).assumed if label.partition(".")[0] in ABOUT]
