"""Every committed recipe: complete, sourced, and as strict as the loader."""

import csv
import functools
import math
import random
import re
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.mutations import mutated, renamed
from trainer.base.errors import ConfigError, UserError
from trainer.models.build import assemble
from trainer.models.trained import given_weights
from trainer.recipe import check
from trainer.recipe.load import parse, parse_recipe
from trainer.recipe.schema import ABOUT, Recipe
from trainer.recipe.schema import load_recipe as read_recipe
from trainer.recipe.shipped import find_recipe, recipe_paths
from trainer.runs.job import Job, plan_of
from trainer.tasks.teacher import open_teacher

load_recipe = functools.cache(read_recipe)

PATHS = recipe_paths()
NAMES = [path.stem for path in PATHS]
# A recipe that a stored row cites never changes: a better one is a new version.
DIGESTS = {
    "A1.v1": "f1c6e9d659b1",
    "A1.v2": "92928ae3a4d3",
    "A2.v1": "1016b29acb8c",
    "A2.v2": "245722643911",
    "A2-mmpretrain.v3": "e8a5faa48a00",
    "A3.v1": "319f97206679",
    "A3.v2": "5d733a96107e",
    "aff.v1": "d850da9c32cc",
    "airbench94.v1": "9da32044a3a4",
    "airbench96.v1": "33c599af61ec",
    "algoperf-resnet.v1": "437ff361055a",
    "bcn.v1": "16f2d81ee39b",
    "bit-i1k.v2": "57aa5b1e0712",
    "camvid-small.v1": "ea16fbdd3900",
    "cb-focal.v1": "1e23c872258d",
    "cct.v1": "e3c848ca5409",
    "cct-cifar.v1": "591470b77b7a",
    "cct-cifar100.v1": "2802e127a704",
    "condensenetv2.v1": "36bc17e62dba",
    "convnext.v2": "bbb269742046",
    "convnext-isotropic.v2": "95564d57ffa3",
    "convnextv2-ft.v1": "8ae4e185c586",
    "cvt.v1": "7a4c38cf113e",
    "deeplabv3-r50.v1": "76e00d47905d",
    "deit.v1": "5ab053c51589",
    "deit-distilled.v1": "f0608e6c8e2a",
    "deit3.v1": "e6e930a1537e",
    "deta-r50.v1": "bfa21aac0f83",
    "efficientnet-ra.v1": "90b0f63c7351",
    "ffcv-rn18-16.v1": "803c1dd224b0",
    "ffcv-rn18-24.v1": "4b4f81268dc4",
    "ffcv-rn18-32.v1": "66cff5460892",
    "ffcv-rn18-40.v1": "1b59617059a9",
    "ffcv-rn18-56.v1": "daf92505f8e4",
    "ffcv-rn18-88.v1": "1184623a1f70",
    "ffcv-rn50-16.v1": "0f716ff4c446",
    "ffcv-rn50-24.v1": "d0f3886a03a5",
    "ffcv-rn50-32.v1": "0ab7d2dfd814",
    "ffcv-rn50-40.v1": "c821a6a0a941",
    "ffcv-rn50-56.v1": "e910927485f1",
    "ffcv-rn50-88.v1": "fd1f9af3eebe",
    "finetune-adamw.v1": "2ff133425db2",
    "finetune-adamw.v2": "70d04e17da8b",
    "finetune-sgd.v1": "2845301fad44",
    "ghostnetv2.v1": "59562b2f7a21",
    "gn-ws.v1": "9b2c62d82c63",
    "iaff.v1": "6699d67e777a",
    "levit.v1": "5ab276c03bff",
    "linear-probe.v1": "c6c04051c30c",
    "mae-vit-base.v1": "729fcb61d646",
    "mae-vit-base-finetune.v1": "101d95898817",
    "mlperf-lars.v1": "3db8123b0258",
    "mobilenetv2.v1": "4d8d4102ae77",
    "mosaic-mild.v2": "3c68e56b89ac",
    "nvidia-v15-250.v2": "eade4ff3e229",
    "nvidia-v15-50.v2": "0a599ea620ed",
    "nvidia-v15-90.v2": "7851cdca30a5",
    "psp-r50.v1": "6a3acfff5fd0",
    "pvt.v1": "fe889468886b",
    "pvt-v2.v1": "35279ef23518",
    "pycls-dds.v3": "c8ce84bb3081",
    "refinenet-r101.v1": "00652ea8a928",
    "retinanet-r50-1x.v1": "8bede13dd9f2",
    "roadmap-01-recipe.v1": "a9130d4b8a14",
    "roadmap-02-stage-ratio.v1": "5723455b0ee6",
    "roadmap-03-patchify.v1": "d7faf450193e",
    "roadmap-04-depthwise.v1": "b8a4308cf7b1",
    "roadmap-05-width.v1": "d23e708a3fc1",
    "roadmap-06-inverted.v1": "7931aebc3e1b",
    "roadmap-07-moved-up.v1": "07ead7253dd9",
    "roadmap-08a-kernel-5.v1": "6f95cf063a53",
    "roadmap-08b-kernel-7.v1": "7e2ff3767aad",
    "roadmap-08c-kernel-9.v1": "f931169da76b",
    "roadmap-08d-kernel-11.v1": "39ac32f3ab77",
    "roadmap-09-gelu.v1": "e53c67831553",
    "roadmap-10-fewer-activations.v1": "f6b0a079a4e4",
    "roadmap-11-fewer-norms.v1": "910b0e765754",
    "roadmap-12-layer-norm.v1": "7aa3ffa5ed71",
    "roadmap-13-downsampling.v1": "5e69875452c3",
    "segformer-b0.v1": "34c27b253223",
    "shufflenet.v1": "bb393c3cf776",
    "swin.v1": "525dc4990826",
    "t2t.v1": "e5d4cc319183",
    "tnt.v1": "95e24006b09f",
    "torchvision-convnext.v1": "7cd0ffc28eda",
    "torchvision-regnet.v1": "b042efe7f2ad",
    "torchvision-swin.v1": "9dfce954147b",
    "torchvision-v1.v1": "e735c9a97b12",
    "torchvision-v2.v3": "4385a5902f91",
    "torchvision-vit.v1": "a566ec809b02",
    "vgg.v1": "39beb334520c",
    "vit-s16-plain.v1": "458854f88e99",
}
EACH_PAGE = pytest.mark.parametrize("path", PATHS, ids=NAMES)


def test_pages_are_frozen():
    assert {path.stem: load_recipe(path).digest for path in PATHS} == DIGESTS


@EACH_PAGE
def test_every_page_reads_back_and_folds(path):
    page = load_recipe(path)
    assert parse_recipe(page.to_yaml(), "page", Recipe)[0] == page
    for model in page.per_model:
        folded = page.for_model(model)
        assert folded.digest != page.digest and not folded.per_model


@EACH_PAGE
def test_every_page_says_where_it_is_from(path):
    page = load_recipe(path)
    assert page.source and page.title and page.assumed
    assert all(why for why in page.assumed.values())
    assert page.unconfirmed and all(page.unconfirmed)
    assert path.read_text().startswith(f"# {page.name}: ")


@EACH_PAGE
def test_the_score_is_told_in_the_first_lines_or_that_there_is_none(path):
    page, head = load_recipe(path), path.read_text().partition("\nname: ")[0]
    told = re.search(r"Published: (\w+) ([\d.]+)", head)
    if told is None:
        assert re.search(r"Published: .*but no accuracies", head) and not page.published
    else:
        assert float(told[2]) in [
            score.top1_pct for score in page.published if score.model == told[1]
        ]


@pytest.mark.parametrize("name", ["gn-ws", "pycls-dds"])
def test_scores_are_a_hundred_minus_the_errors_of_the_source(name):
    path = find_recipe(name)
    errors = re.search(r"# Errors ([\d., and]+)\.", path.read_text())[1]
    scores = [100 - float(error) for error in re.findall(r"\d+\.\d+", errors)]
    assert [score.top1_pct for score in load_recipe(path).published] == pytest.approx(
        scores, abs=1e-9
    )


@EACH_PAGE
def test_published_models_are_timms(path):
    assert {score.model for score in load_recipe(path).published} <= set(timm.list_models())


def test_every_score_is_the_one_that_its_source_published():
    """results/published.csv holds what was read in the sources, apart from any recipe."""
    text = Path(__file__).parents[2] / "results" / "published.csv"
    keys = ("top1_pct", "std_pct", "num_seeds", "train_px", "test_px")

    def numbers(values) -> tuple:
        return tuple(None if value in ("", None) else float(value) for value in values)

    with text.open(newline="") as file:
        read = [
            (row["recipe"], row["model"], row["dataset"], *numbers(row[key] for key in keys))
            for row in csv.DictReader(file)
            if not row["measured_by"]  # again, by others than the source
        ]
    # of several versions of a recipe each may have the same score
    shown = {
        (
            page.name,
            score.model,
            score.data or "imagenet-1k",
            *numbers(getattr(score, key) for key in keys),
        )
        for page in map(load_recipe, PATHS)
        for score in page.published
    }
    assert len(read) > 130 and sorted(map(str, shown)) == sorted(map(str, read))


def test_every_score_says_in_what_precision_it_was_trained():
    for path in PATHS:
        assert all(score.precision for score in load_recipe(path).published), path.name


@pytest.mark.parametrize("name", ["finetune-adamw", "finetune-sgd", "linear-probe"])
def test_a_recipe_that_starts_from_weights_wants_them(name, tmp_path):
    """Refused in one line without them; with them, also of as many classes, the classifier is as
    the source has it.
    """
    plan = plan_of(Job(name, "resnet18", "digits"))
    with pytest.raises(UserError) as refused:
        assemble(plan)
    assert "weights=" in refused.value.hint
    source = timm.create_model("resnet18", num_classes=10)
    path = tmp_path / "resnet18.pth"
    torch.save(source.state_dict(), path)
    given = given_weights(str(path), "resnet18", tmp_path)
    model, replacements = assemble(plan_of(Job(name, "resnet18", "digits", weights=given)))
    assert "pretrained" in {one.part for one in replacements}
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    is_kept = torch.equal(model.fc.weight, source.fc.weight)
    assert is_kept == (name == "finetune-adamw")


@pytest.mark.parametrize("model", ["resnet18", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("name", ["finetune-adamw", "finetune-sgd", "linear-probe"])
def test_fine_tuning_starts_from_answers_at_nearly_equal_odds(name, model, tmp_path):
    """Whatever timm makes of a new classifier: a rate for fine-tuning is too small to undo it."""
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(model, num_classes=3).state_dict(), path)
    given = given_weights(str(path), model, tmp_path)
    made, _ = assemble(plan_of(Job(name, model, "digits", weights=given)))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(made.eval()(images), torch.arange(8))
    assert float(loss) == pytest.approx(math.log(10), abs=0.15)


@functools.cache
def parsed(path: Path) -> tuple:
    return parse(path.read_text(), path.name)


def keys_of(path: Path) -> list[check.Path]:
    _, positions = parsed(path)
    return [place for place in positions.lines if place and isinstance(place[-1], str)]


@EACH_PAGE
def test_each_key_mutated_by_a_letter_is_refused_at_its_place(path):
    data, _ = parsed(path)
    draw = random.Random(path.stem)
    for place in keys_of(path):
        new = mutated(place[-1], draw)
        if new in check.value_at(
            data, place[:-1]
        ):  # the same word, or a key written twice: see the test below
            continue
        with pytest.raises(ConfigError) as error:
            check.check(Recipe, renamed(data, place, new))
        assert error.value.path[: len(place)] == (*place[:-1], new), f"{place} as {new}"


SAMPLED = [(path, place) for path in PATHS for place in keys_of(path)]


@settings(max_examples=80)
@given(st.sampled_from(SAMPLED), st.randoms(use_true_random=False))
def test_a_mutated_key_is_refused_at_its_line(sample, draw):
    path, place = sample
    text = path.read_text()
    data, positions = parsed(path)
    lines, line = text.split("\n"), positions.line(place)
    new = mutated(place[-1], draw)
    if new in check.value_at(data, place[:-1]):
        return
    lines[line - 1] = re.sub(
        rf"(?<!\w){re.escape(place[-1])}:", f"{new}:", lines[line - 1], count=1
    )
    with pytest.raises(ConfigError) as error:
        parse_recipe("\n".join(lines), "page", Recipe)
    assert str(error.value).startswith(f"page:{line}: ")


def test_nothing_assumed_is_about_the_page_itself():
    for path in PATHS:
        assert not [
            label for label in load_recipe(path).assumed if label.partition(".")[0] in ABOUT
        ]


def test_deits_recipe_with_a_teacher_wants_one_and_then_trains_both_heads(tmp_path):
    """As the source's commands: main.py's defaults and --distillation-type hard."""
    page, model = load_recipe(find_recipe("deit-distilled")), "deit_tiny_distilled_patch16_224"
    assert (page.distill.name, page.distill.share) == ("hard", 0.5)
    assert page.distill.teacher == "regnety_160"
    assert page.lr.peak == pytest.approx(5e-4 * page.batch.images / 512)
    with pytest.raises(UserError) as refused:
        open_teacher(plan_of(Job("deit-distilled", model, "digits")))
    assert "distill.weights=timm:regnety_160." in refused.value.hint
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    given = f"distill.teacher=test_resnet distill.weights={path}"
    plan = plan_of(Job("deit-distilled", model, "digits", overrides=given))
    built = assemble(plan)[0].train()
    of_labels, of_teacher = built(torch.zeros(2, 3, 32, 32))
    assert of_labels.shape == of_teacher.shape == (2, 10)
    assert open_teacher(plan)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
