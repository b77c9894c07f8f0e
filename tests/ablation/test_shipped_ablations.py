"""The ablations that come with the package: each valid, sourced, and as strict as the loader."""

import functools
import random
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.committed import committed_root
from support.mutations import mutated, renamed
from trainer.ablation.cells import command, plan_of_cell
from trainer.ablation.questions import question_of
from trainer.ablation.spec import AblationPage, ablation_paths, load_ablation
from trainer.base.errors import ConfigError
from trainer.recipe import check
from trainer.recipe.load import parse
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of
from trainer.runs.results import read_row_file

ROOT = Path(__file__).parents[2]
PATHS = ablation_paths()
EACH_PAGE = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
NUM_CELLS = {
    "activations": 4,
    "attention": 7,
    "camvid-weights": 2,
    "decay-of-embeddings": 4,
    "families": 14,
    "finetune": 3,
    "hard-vs-soft": 4,
    "mae": 2,
    "muon-vs-lamb": 4,
    "norm-micro-batch": 12,
    "recipes": 12,
    "repeated-augmentation": 4,
    "retinanet-focal": 4,
    "retinanet-focal-short": 2,
    "retinanet-norms": 12,
    "roadmap": 17,
    "rsb-ingredients": 12,
    "rsb-loss": 8,
    "rsb-mixing": 7,
    "rsb-optimizer": 3,
    "smoothing": 6,
    "stochastic-depth": 4,
    "tv2-cumulative": 13,
}

loaded = functools.cache(load_ablation)


def test_the_shipped_questions_are_these():
    assert {path.stem: len(loaded(path).cells) for path in PATHS} == NUM_CELLS


@EACH_PAGE
def test_every_page_has_a_question_a_source_and_three_seeds(path):
    page = loaded(path).page
    assert page.question.endswith("?") and page.source and page.title
    assert page.seeds == (0, 1, 2)
    assert path.read_text().startswith(f"# {page.name}: ")
    groups = {cell.group for cell in loaded(path).cells}
    assert len(groups) == len(page.models) * len(page.data)
    assert [cell.group for cell in loaded(path).cells if cell.is_base] == list(
        dict.fromkeys(c.group for c in loaded(path).cells)
    )


@EACH_PAGE
def test_a_cells_text_makes_its_run(path):
    """The road of a single run, with the text alone, ends in the plan that the page made."""
    cell = loaded(path).cells[-1]
    assert plan_of(
        Job(cell.recipe, cell.model, cell.data, overrides=cell.overrides, seed=2)
    ) == plan_of_cell(cell, 2)
    for cell in loaded(path).cells:
        assert not cell.overrides or f"set={cell.overrides}" in shlex.split(command(cell, 0))


@EACH_PAGE
def test_published_scores_of_whole_recipes_are_those_of_the_recipes_pages(path):
    """A base without overrides of its own, and a cell that is a recipe, have their recipe's score
    where it has one.
    """
    for cell in loaded(path).cells:
        if cell.published is None or cell.overrides:
            continue
        scores = {score.top1_pct for score in load_recipe(find_recipe(cell.recipe)).published}
        assert cell.published in scores, cell.name


def test_the_blogs_steps_are_in_its_order():
    scores = [
        cell.published
        for cell in loaded(next(path for path in PATHS if path.stem == "tv2-cumulative")).cells
    ]
    first, last = (
        load_recipe(find_recipe("torchvision-v1")),
        load_recipe(find_recipe("torchvision-v2")),
    )
    assert scores == sorted(scores) and None not in scores
    assert scores[0] in [score.top1_pct for score in first.published if score.model == "resnet50"]
    assert scores[-1] in [score.top1_pct for score in last.published if score.model == "resnet50"]


def test_norm_micro_batch_has_the_runs_that_were_made_before_it():
    """The study's rows are older than its page: the page's cells must be exactly these runs."""
    found = loaded(next(path for path in PATHS if path.stem == "norm-micro-batch"))
    paths = sorted(
        (committed_root() / "results/rows").glob("gn-ws.v1-resnet18-digits-s[01]-*.json")
    )
    older = (
        "41e225",
        "8efb59",
        "ec5ecb",
        "ce4f4e",
        "aa03c0",
        "a8e4b7",
        "da0256",
        "1cefc1",
        "efe11c",
        "5f9d1b",
        "9b9a47",
        "4c6385",
    )
    rows = [read_row_file(path) for path in paths if path.stem.endswith(older)]
    assert len(rows) == 12
    question = question_of(found)
    cells = {
        place: next(filter(run.is_of, rows), None) for place, run in question.identities.items()
    }
    assert {row.run for row in cells.values() if row} == {row.run for row in rows}
    sizes = {"64 images": 64, "8 images": 8, "2 images": 2}
    for (name, seed), row in cells.items():
        if row is not None:
            norm, _, images = name.partition(", ")
            changes = {change.path: change.after for change in row.deviations}
            assert (row.seed, row.norm_images) == (seed, sizes[images])
            assert (changes.get("model.weight_standardization") != "off") == norm.endswith("WS")
            assert (changes.get("model.norm") == "off") == (norm == "batch_norm")
    there = {(name, seed) for (name, seed), row in cells.items() if row}
    names = [
        "batch_norm, 64 images",
        "batch_norm, 2 images",
        "group_norm, 64 images",
        "group_norm + WS, 64 images",
        "group_norm + WS, 2 images",
        "batch_channel_norm + WS, 64 images",
    ]
    assert there == {(name, seed) for name in names for seed in (0, 1)}


def test_no_run_is_in_one_ablation_twice_and_shared_ones_are_the_same_run():
    """A2 on resnet18 is the base of many: one key, so it is run once."""
    keys = [
        (plan_of_cell(cell, 0).identity.key, cell.model)
        for path in PATHS
        for cell in loaded(path).cells
        if (cell.recipe, cell.overrides) == ("A2", "")
    ]
    assert len(keys) >= 5 and len({key for key in keys if key[1] == "resnet18"}) == 1


def test_the_readme_lists_every_page():
    text = (ROOT / "ablations/README.md").read_text()
    for path in PATHS:
        found = loaded(path)
        line = next(
            line for line in text.splitlines() if line.startswith(f"| [{path.stem}]({path.name})")
        )
        assert found.page.question in line and f"| {len(found.cells)} |" in line


# ---- strict as recipes are


@functools.cache
def parsed(path: Path) -> tuple:
    return parse(path.read_text(), path.name)


def is_override(place: check.Path) -> bool:
    """Is a key of a page one of a `set`: a path into a recipe, or a key within its value?"""
    return "set" in place[:-1]


def keys_of(path: Path, overrides: bool) -> list[check.Path]:
    _, positions = parsed(path)
    return [
        place
        for place in positions.lines
        if place and isinstance(place[-1], str) and is_override(place) == overrides
    ]


@EACH_PAGE
def test_each_key_of_the_page_mutated_by_a_letter_is_refused_at_its_place(path):
    data, _ = parsed(path)
    draw = random.Random(path.stem)
    for place in keys_of(path, overrides=False):
        new = mutated(place[-1], draw)
        if new in check.value_at(data, place[:-1]):
            continue
        with pytest.raises(ConfigError) as error:
            check.check(AblationPage, renamed(data, place, new))
        assert error.value.path[: len(place)] == (*place[:-1], new), f"{place} as {new}"


SAMPLED = [
    (path, place)
    for path in PATHS
    for overrides in (True, False)
    for place in keys_of(path, overrides)
]


@settings(max_examples=60)
@given(st.sampled_from(SAMPLED), st.randoms(use_true_random=False))
def test_a_mutated_key_is_refused_at_its_line(tmp_path_factory, sample, draw):
    path, place = sample
    data, positions = parsed(path)
    lines, line = path.read_text().split("\n"), positions.line(place)
    new = mutated(place[-1], draw)
    if new in check.value_at(data, place[:-1]):
        return
    lines[line - 1] = re.sub(
        rf"(?<![\w.]){re.escape(place[-1])}:", f"{new}:", lines[line - 1], count=1
    )
    copy = tmp_path_factory.mktemp("page") / path.name
    copy.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        load_ablation(copy)
    assert re.search(rf"{re.escape(path.name)}:{line}: ", str(error.value)), error.value
