"""The numbers of recipes against those of their sources' code, commands and weights."""

import math

import numpy as np
import pytest
import torchvision
from timm.layers import DropPath

from trainer.models.build import assemble
from trainer.recipe.explain import diff_rows
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of


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
