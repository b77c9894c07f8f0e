"""Every committed recipe: complete, sourced, and as strict as the loader."""

import csv
import functools
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath

from support.mutations import mutated, renamed
from trainer.base.errors import ConfigError, UserError
from trainer.models.build import assemble
from trainer.models.trained import given_weights
from trainer.recipe import check
from trainer.recipe.explain import diff_rows
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


def test_each_model_of_torchvisions_second_recipe_is_trained_as_its_weights_say():
    page = load_recipe(find_recipe("torchvision-v2"))
    links = {
        "issues/3995#new-recipe": (224, None, 1252),
        "issues/3995#new-recipe-with-fixres": (176, None, 1252),
        "issues/3995#issuecomment-1013906621": (176, 4, 1251),
        "pull/5935": (176, 4, 1251),
    }
    for score in page.published:
        weights = list(torchvision.models.get_model_weights(score.model))[-1]
        link = weights.meta["recipe"].removeprefix("https://github.com/pytorch/vision/")
        plan = plan_of(Job("torchvision-v2", score.model, "imagenet-1k"))
        found = plan.recipe.image.train_px, plan.recipe.repeats, plan.steps_per_epoch
        assert found == links[link], score.model
        assert score.train_px == found[0]


def test_torchvisions_second_weights_were_made_with_the_shears_of_their_time():
    """Until 0.11.3 the strength was an angle, since 0.12 it is a slope; all but one are older."""
    page = load_recipe(find_recipe("torchvision-v2"))
    for score in page.published:
        augment = {part.name: part for part in page.for_model(score.model).augment}
        assert augment["trivial_augment"].centered_shear == (score.model != "resnext101_64x4d")
        assert list(augment) == [part.name for part in page.augment]


@pytest.mark.parametrize("number", [1, 2])
def test_torchvisions_scores_are_those_of_its_weights(number):
    page = load_recipe(find_recipe(f"torchvision-v{number}"))
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
    page = load_recipe(find_recipe("torchvision-v2"))
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
    assert rates == {
        "convnext_base": 0.5,
        "convnext_large": 0.5,
        "convnext_small": 0.4,
        "convnext_tiny": 0.1,
    }


@pytest.mark.parametrize("name", ["convnext", "convnext-isotropic"])
def test_convnexts_mix_the_images_of_a_gpu(name):
    """--batch_size of the source's commands, TRAINING.md: 128 images a GPU, and 64 for Large."""
    page = load_recipe(find_recipe(name))
    units = {model: page.for_model(model).mix.images for model in page.per_model}
    assert units == {model: 64 if model == "convnext_large" else 128 for model in page.per_model}


FFCV = [
    (network, epochs, *ramp)
    for network in ("rn18", "rn50")
    for epochs, ramp in {
        16: (11, 13),
        24: (17, 20),
        32: (23, 27),
        40: (29, 34),
        56: (41, 48),
        88: (65, 76),
    }.items()
]


@pytest.mark.parametrize(("network", "epochs", "start", "end"), FFCV)
def test_ffcvs_rates_and_sizes_are_those_of_its_script(network, epochs, start, end):
    page = load_recipe(find_recipe(f"ffcv-{network}-{epochs}"))
    peak, images, decay = {"rn18": (0.5, 1024, 5e-5), "rn50": (1.7, 4096, 1e-4)}[network]
    assert (page.epochs, page.batch.images, page.optimizer.weight_decay) == (epochs, images, decay)
    steps = 1_281_167 // images
    for step in (
        0,
        1,
        steps,
        2 * steps - 1,
        2 * steps,
        2 * steps + 1,
        epochs * steps // 2,
        epochs * steps - 1,
    ):
        rate = np.interp(step / steps, [0, 2, epochs], [1e-4 * peak, peak, 0])
        assert page.lr.at(step, steps, epochs) == pytest.approx(rate, rel=1e-9, abs=1e-12)
    for epoch in range(epochs):
        side = 32 * int(np.round(np.interp(epoch, [start, end], [160, 192]) / 32))
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert page.image.growth.px_at(step, steps, page.image.train_px) == side
    assert math.floor(page.image.test_px / page.image.test_crop_share) == 292


@pytest.mark.parametrize(("epochs", "num_warmup"), [(50, 16), (90, 8), (250, 8)])
def test_nvidias_rates_are_those_of_its_code(epochs, num_warmup):
    page = load_recipe(find_recipe(f"nvidia-v15-{epochs}"))
    peak = 0.256 * page.batch.images / 256
    assert page.lr.peak == pytest.approx(peak) and page.optimizer.weight_decay == 2**-15
    assert (page.mix is not None) == (epochs == 250)
    for epoch in range(epochs):
        rise, fall = (epoch + 1) / num_warmup, (epoch - num_warmup) / (epochs - num_warmup)
        rate = peak * rise if epoch < num_warmup else 0.5 * peak * (1 + math.cos(math.pi * fall))
        assert (
            page.lr.at(10 * epoch, 10, epochs)
            == page.lr.at(10 * epoch + 9, 10, epochs)
            == pytest.approx(rate)
        )


@pytest.mark.parametrize(("epochs", "num_steps"), [(50, 313), (90, 626), (250, 626)])
def test_nvidias_epochs_end_in_a_smaller_step(epochs, num_steps):
    plan = plan_of(Job(f"nvidia-v15-{epochs}", "resnet50", "imagenet-1k"))
    assert plan.steps_per_epoch == num_steps
    assert plan.window_images(num_steps - 1) == 1_281_167 % plan.recipe.batch.images


def test_pyclss_norms_are_as_in_the_code_of_its_scores():
    """At 4acac2b0, which has the scores: BN.USE_PRECISE_STATS False, and refused beyond one GPU."""
    assert load_recipe(find_recipe("pycls-dds")).precise_norm is None


def test_pyclss_rates_are_those_of_its_code():
    page = load_recipe(find_recipe("pycls-dds"))
    assert page.lr.peak == pytest.approx(0.1 * page.batch.images / 128)
    for epoch in range(100):
        rate = 0.5 * 0.2 * (1 + math.cos(math.pi * epoch / 100))
        if epoch < 5:
            rate *= 0.1 * (1 - epoch / 5) + epoch / 5
        assert page.lr.at(epoch, 1, 100) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "epochs", "drops"), [("resnet50", 90, (30, 60)), ("resnet101", 100, (30, 60, 90))]
)
def test_gn_ws_drops_its_rate_where_the_commands_say(model, epochs, drops):
    page = load_recipe(find_recipe("gn-ws")).for_model(model)
    assert page.epochs == epochs
    for epoch in range(epochs):
        assert page.lr.at(epoch, 1, epochs) == pytest.approx(
            0.1 * 0.1 ** sum(epoch >= drop for drop in drops)
        )


def test_the_three_published_forms_of_weight_standardization_differ():
    parts = [
        load_recipe(find_recipe(name)).model.weight_standardization
        for name in ("gn-ws", "bcn", "bit-i1k")
    ]
    forms = [(part.variance, part.eps, part.eps_place) for part in parts]
    assert forms == [
        ("unbiased", 1e-5, "outside"),
        ("unbiased", 1e-5, "inside"),
        ("biased", 1e-5, "outside"),
    ]


def test_big_visions_rates_are_those_of_its_settings():
    page = load_recipe(find_recipe("bit-i1k"))
    assert page.lr.peak == pytest.approx(0.1 / 256 * page.batch.images)
    assert page.optimizer.weight_decay == pytest.approx(1e-4 / 256 * page.batch.images)
    steps = 1_281_167 // 4096
    for step in (0, 1, 500, 999, 1000, 1001, 14_000, 90 * steps - 1):
        share = (step - 1000) / (90 * steps - 1000)
        rate = 1.6 * min(1, step / 1000) * 0.5 * (1 + math.cos(math.pi * max(0, share)))
        assert page.lr.at(step, steps, 90) == pytest.approx(rate, rel=1e-9)


def test_big_visions_transfer_is_that_of_its_settings():
    page = load_recipe(find_recipe("finetune-sgd"))
    steps = 1_281_167 // 512
    assert page.epochs == int(20_000 * 512 / (0.99 * 1_281_167))
    for step in (0, 1, 250, 499, 500, 501, 10_000, 8 * steps - 1):
        share = (step - 500) / (8 * steps - 500)
        rate = 0.03 * min(1, step / 500) * 0.5 * (1 + math.cos(math.pi * max(0, share)))
        assert page.lr.at(step, steps, 8) == pytest.approx(rate, rel=1e-9)
    assert math.floor(page.image.test_px / page.image.test_crop_share) == 448
    assert page.optimizer.clip_global_norm == 1.0 and not page.optimizer.weight_decay


def test_mocos_probe_trains_a_new_classifier_alone_in_three_steps():
    page = load_recipe(find_recipe("linear-probe"))
    rates = [page.lr.at(epoch * 5005, 5005, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    plan = plan_of(Job("linear-probe", "resnet18", "digits", overrides="model.pretrained=null"))
    model, _ = assemble(plan)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"fc.weight", "fc.bias"} and not model.fc.bias.any()
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


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


def test_mosaics_numbers_follow_from_its_own():
    page = load_recipe(find_recipe("mosaic-mild"))
    assert page.epochs == int(0.32 * 90)
    assert page.average.decay ** (100 / page.average.every_steps) == pytest.approx(0.5)
    assert page.model.start.head_bias == pytest.approx(-math.log(1000))
    assert math.floor(page.image.test_px / page.image.test_crop_share) == 232
    steps, epochs = 1_281_167 // 2048, page.epochs
    # A ResNet-50's classifier by Kaiming's normal distribution: variance 2 / 2048.
    assert page.model.start.head_std**2 == pytest.approx(2 / 2048)
    for step in range(0, epochs * steps, 97):
        # composer asks how many of the epochs have elapsed: whole ones, as the length is in epochs.
        elapsed = (step // steps) / epochs
        share = (elapsed - 0.4) / (1 - 0.2 - 0.4) if elapsed >= 0.4 else 0.0
        scale = 0.5 + 0.5 * min(share, 1)
        assert page.image.growth.px_at(step, steps, 176) == round(176 * scale / 4) * 4
        fall = (step - 8 * steps) / (epochs * steps - 8 * steps)
        rate = 2.048 * (step / (8 * steps) if fall < 0 else 0.5 * (1 + math.cos(math.pi * fall)))
        assert page.lr.at(step, steps, epochs) == pytest.approx(rate, abs=1e-12)


def test_mmpretrains_a2_differs_from_a2_where_its_page_says():
    ours, theirs = (load_recipe(find_recipe(name)) for name in ("A2.v1", "A2-mmpretrain"))
    rows = {row.path: (row.a, row.b) for row in diff_rows(ours, theirs)}
    assert rows == {
        "batch.norm_images": (512, 2048),
        "batch.drop_last": (True, None),
        "lr.warmup_from": (1e-4, 5e-7),
        "lr.warmup_multiplies": (None, True),
        "lr.warmup_updated": (None, "per_step"),
        "optimizer.no_decay": (("vectors", "biases"), ("norms", "biases")),
        "loss.threshold": (0.2, None),
        "loss.sum_classes": (None, True),
        "mix.images": (None, 256),
        "model": (
            None,
            {
                "stochastic_depth": {"over_depth": "constant", "per": "sample"},
                "start": {"head_std": 0.01, "head_bias": 0.0},
            },
        ),
        "augment.random_resized_crop.interpolation": ("random", "bilinear_no_antialias"),
        "augment.rand_augment.interpolation": ("random", "bicubic"),
        "image.test_crop_share": (0.95, 0.949),
        "image.test_interpolation": ("bicubic", "bilinear_no_antialias"),
    }
    assert math.floor(224 / theirs.image.test_crop_share) == 236
    assert find_recipe("A2-mmpretrain").read_text().lower().count("not as a2") >= 9


def test_mmpretrains_rates_are_those_of_mmcvs_hooks():
    """The hook sets a cosine at each epoch's start; its warm-up takes, at every iteration, a share
    of that rate which falls in a straight line from 1 - 1e-4 to 0.
    """
    plan = plan_of(Job("A2-mmpretrain", "resnet50", "imagenet-1k"))
    assert plan.steps_per_epoch == 626
    for step in (0, 1, 625, 626, 627, 3129, 3130, 3131, 90_000, 90_001, 300 * 626 - 1):
        epoch = step // 626
        regular = 1e-6 + 0.5 * (5e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 300))
        taken = (1 - step / (5 * 626)) * (1 - 1e-4) if step < 5 * 626 else 0.0
        assert plan.lr_at(step) == pytest.approx(regular * (1 - taken), rel=1e-9)


def test_mmpretrains_network_starts_and_drops_as_its_code_of_that_commit():
    """LinearClsHead draws with a deviation of 0.01; the ResNet hands one rate to every block."""
    model, _ = assemble(plan_of(Job("A2-mmpretrain", "resnet50", "imagenet-1k")))
    drops = [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]
    assert drops == [0.05] * 16
    assert (
        float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
        and not model.fc.bias.any()
    )


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
