"""The recipes of transformers, efficient networks and torchvision's zoo: rates, decay and scores as
their sources have them, and two steps of each on the digits.
"""

import functools
import math

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, StepLRScheduler

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.components.param_groups import param_groups
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import assemble, assembled
from trainer.recipe.schema import load_recipe as read_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of


@functools.cache
def recipe_of(name, model=None):
    recipe = read_recipe(find_recipe(name))
    return recipe if model is None else recipe.for_model(model)


FAMILIES = [
    ("A1", "deit_tiny_patch16_224"),
    ("A2", "swin_tiny_patch4_window7_224"),
    ("deit", "deit_tiny_patch16_224"),
    ("deit3", "deit3_small_patch16_224"),
    ("swin", "swin_tiny_patch4_window7_224"),
    ("pvt-v2", "pvt_v2_b0"),
    ("pvt", "pvt_tiny"),
    ("tnt", "tnt_s_legacy_patch16_224"),
    ("levit", "levit_128s"),
    ("cvt", "cvt_13"),
    ("cct-cifar", "cct_7_3x1_32"),
    ("cct", "cct_14_7x2_224"),
    ("t2t", "t2t_vit_7"),
    ("vit-s16-plain", "vit_tiny_patch16_plain_224"),
    ("efficientnet-ra", "efficientnet_b0"),
    ("ghostnetv2", "ghostnetv2_100"),
    ("convnextv2-ft", "convnextv2_atto"),
]


@pytest.mark.parametrize(("name", "model"), FAMILIES)
def test_what_decays_is_what_timm_decays(name, model):
    with torch.device("meta"):
        built = timm.create_model(model)
    optimizer = recipe_of(name, model if name == "convnextv2-ft" else None).optimizer
    listed = getattr(built, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(built, 1.0, no_weight_decay_list=listed)
    names = {id(weight): name for name, weight in built.named_parameters()}

    def spared(groups):
        return {names[id(w)] for g in groups if not g["weight_decay"] for w in g["params"]}

    ours = param_groups(built, optimizer.model_copy(update={"weight_decay": 1.0}))
    assert spared(ours) == spared(theirs)
    assert {id(w) for g in ours for w in g["params"]} == {
        id(w) for g in theirs for w in g["params"]
    }


def cosine(peak, epochs, end, warmup, start, **options):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=end, warmup_t=warmup, warmup_lr_init=start, **options
    )
    return lambda update: scheduler._get_lr(update)[0]


@pytest.mark.parametrize(
    ("name", "peak", "warmup", "start", "cooldown"),
    [
        ("deit", 1e-3, 5, 1e-6, 0),
        ("deit3", 4e-3, 5, 1e-6, 0),
        ("pvt-v2", 1e-3, 5, 1e-6, 0),
        ("pvt", 1e-3, 5, 1e-6, 0),
        ("levit", 2e-3, 5, 1e-6, 0),
        ("cvt", 2e-3, 5, 1e-6, 0),
        ("tnt", 1e-3, 5, 1e-6, 10),
        ("t2t", 5e-4, 10, 1e-6, 10),
        ("cct", 5e-4, 10, 1e-6, 10),
        ("cct-cifar", 5.5e-4, 10, 1e-5, 10),
        ("cct-cifar100", 6e-4, 10, 1e-6, 10),
    ],
)
def test_cosines_are_timms(name, peak, warmup, start, cooldown):
    recipe = recipe_of(name)
    theirs = cosine(peak, recipe.epochs - cooldown, 1e-5, warmup, start)
    assert (recipe.lr.cooldown_epochs or 0) == cooldown
    for epoch in range(recipe.epochs):
        for step in (3 * epoch, 3 * epoch + 2):
            assert recipe.lr.at(step, 3, recipe.epochs) == pytest.approx(theirs(epoch), rel=1e-6)


def test_swins_cosine_is_timms_after_the_warmup_at_every_step():
    recipe, steps = recipe_of("swin"), 1251
    theirs = cosine(
        1e-3, 280 * steps, 1e-5, 20 * steps, 1e-6, warmup_prefix=True, t_in_epochs=False
    )
    for step in (0, 1, 20 * steps - 1, 20 * steps, 20 * steps + 1, 150 * steps, 300 * steps - 1):
        assert recipe.lr.at(step, steps, 300) == pytest.approx(theirs(step), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "model", "peak", "factor"),
    [
        ("efficientnet-ra", "efficientnet_b0", 0.048, 0.97),
        ("efficientnet-ra", "efficientnet_b2", 0.016, 0.97),
        ("ghostnetv2", "ghostnetv2_100", 0.064, 0.973),
    ],
)
def test_steps_of_a_fraction_of_epochs_are_timms(name, model, peak, factor):
    recipe = recipe_of(name, model)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = StepLRScheduler(  # that of 2020 counted from the first epoch, with the warm-up
        optimizer, 2.4, factor, warmup_t=3, warmup_lr_init=1e-6, warmup_prefix=False
    )
    smooth = recipe.lr.model_copy(update={"noise": None})
    for epoch in range(450):
        rate = theirs._get_lr(epoch)[0]
        assert smooth.at(epoch, 1, 450) == pytest.approx(rate, rel=1e-6)
        if name == "ghostnetv2":  # timm's noise: within 67 %, from 42 to 90 % of the run
            noisy = recipe.lr.at(epoch, 1, 450, seed=1)
            assert (noisy != smooth.at(epoch, 1, 450)) == (189 <= epoch < 405)
            assert abs(noisy / rate - 1) < 0.67
    assert (recipe.lr.noise is not None) == (name == "ghostnetv2")


@pytest.mark.parametrize(
    ("name", "peak", "epochs", "warmup", "share", "end"),
    [
        ("torchvision-regnet", 0.8, 100, 5, 0.1, 0.0),
        ("torchvision-swin", 1e-3, 300, 20, 0.01, 1e-5),
        ("torchvision-convnext", 1e-3, 600, 5, 0.01, 0.0),
        ("torchvision-vit", 3e-3, 300, 30, 0.033, 0.0),
    ],
)
def test_torchvisions_cosines_are_its_scripts(name, peak, epochs, warmup, share, end):
    recipe = recipe_of(name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedulers = torch.optim.lr_scheduler
    parts = [
        schedulers.LinearLR(optimizer, start_factor=share, total_iters=warmup),
        schedulers.CosineAnnealingLR(optimizer, T_max=epochs - warmup, eta_min=end),
    ]
    theirs = schedulers.SequentialLR(optimizer, parts, milestones=[warmup])
    for epoch in range(epochs):
        assert recipe.lr.at(epoch, 1, epochs) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5)
        optimizer.step()
        theirs.step()


def test_torchvisions_steps_are_its_scripts():
    for epoch in range(300):
        mobile = recipe_of("mobilenetv2").lr.at(epoch, 1, 300)
        assert mobile == pytest.approx(0.045 * 0.98**epoch)
    for model, peak in (("vgg11", 0.01), ("vgg11_bn", 0.1)):
        lr = recipe_of("vgg", model).lr
        rates = [lr.at(epoch, 1, 90) for epoch in (0, 29, 30, 60, 89)]
        assert rates == pytest.approx([peak, peak, peak / 10, peak / 100, peak / 100])


def straight(step, warmup, peak):
    return peak * step / warmup if step < warmup else None


@pytest.mark.parametrize(
    ("name", "model", "steps", "rule"),
    [
        ("shufflenet", None, 1252, lambda t: 0.5 * (1 - t / (240 * 1252))),
        (
            "mlperf-lars",
            None,
            626,
            lambda t: (
                straight(t, 5 * 626, 8.5)
                or 1e-4 + (8.5 - 1e-4) * (1 - (t - 5 * 626) / (36 * 626)) ** 2
            ),
        ),
        (
            "aff",
            None,
            2502,
            lambda t: (
                straight(t, 5 * 2502, 0.075)
                or 0.0375 * (1 + math.cos(math.pi * (t - 5 * 2502) / (235 * 2502)))
            ),
        ),
        (
            "algoperf-resnet",
            None,
            1251,
            lambda t: (
                straight(t, 6999, 4.131896390902391)
                or 4.131896390902391 * (1 - 0.999 * min((t - 6999) / (135 * 1251 - 6999), 1))
            ),
        ),
        (
            "vit-s16-plain",
            None,
            1251,
            lambda t: (
                straight(t, 10_000, 1e-3)
                or 5e-4 * (1 + math.cos(math.pi * (t - 10_000) / (90 * 1251 - 10_000)))
            ),
        ),
        (
            "convnextv2-ft",
            "convnextv2_tiny",
            1251,
            lambda t: (
                straight(t, 40 * 1251, 3.2e-3)
                or 1e-6
                + (3.2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (t - 40 * 1251) / (260 * 1251)))
            ),
        ),
    ],
)
def test_rates_that_move_at_every_step_follow_the_sources_formula(name, model, steps, rule):
    recipe = recipe_of(name, model)
    total = recipe.epochs * steps
    for step in (1, 7, total // 50, total // 3, total // 2, total - 1):
        assert recipe.lr.at(step, steps, recipe.epochs) == pytest.approx(rule(step), rel=1e-9)


TORCHVISIONS = {
    "mobilenetv2": {"mobilenetv2_100": "mobilenet_v2"},
    "vgg": {f"vgg{n}{bn}": f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")},
    "torchvision-swin": {
        f"swin_{size}_patch4_window7_224": f"swin_{size[0]}" for size in ("tiny", "small", "base")
    },
    "torchvision-convnext": {
        f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")
    },
    "torchvision-vit": {
        "vit_base_patch16_224": "vit_b_16",
        "vit_base_patch32_224": "vit_b_32",
    },
    "torchvision-regnet": {
        "regnety_004": "regnet_y_400mf",
        "regnety_008_tv": "regnet_y_800mf",
        "regnety_016": "regnet_y_1_6gf",
        "regnety_032": "regnet_y_3_2gf",
        "regnety_080_tv": "regnet_y_8gf",
        "regnety_160": "regnet_y_16gf",
        "regnety_320": "regnet_y_32gf",
        "regnetx_004_tv": "regnet_x_400mf",
        "regnetx_008": "regnet_x_800mf",
        "regnetx_016": "regnet_x_1_6gf",
        "regnetx_032": "regnet_x_3_2gf",
        "regnetx_080": "regnet_x_8gf",
        "regnetx_160": "regnet_x_16gf",
        "regnetx_320": "regnet_x_32gf",
    },
}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_torchvisions_scores_and_tests_are_those_of_its_weights(name):
    scores = {score.model: score for score in recipe_of(name).published}
    assert scores.keys() == TORCHVISIONS[name].keys()
    for model, theirs in TORCHVISIONS[name].items():
        weights = next(iter(torchvision.models.get_model_weights(theirs)))
        preset, image = weights.transforms(), recipe_of(name, model).image
        assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == scores[model].top1_pct
        assert preset.crop_size == [image.test_px]
        assert preset.resize_size == [math.floor(image.test_px / image.test_crop_share)]
        assert preset.interpolation.value == image.test_interpolation
        with torch.device("meta"):
            built = timm.create_model(model)
        number = sum(weight.numel() for weight in built.parameters())
        assert number == weights.meta["num_params"], model


def test_torchvisions_stochastic_depths_are_those_of_its_models():
    for name, theirs in (("torchvision-swin", "swin"), ("torchvision-convnext", "convnext")):
        for model, builder in TORCHVISIONS[name].items():
            with torch.device("meta"):
                built = getattr(torchvision.models, builder)()
            drops = [m.p for m in built.modules() if type(m).__name__ == "StochasticDepth"]
            assert recipe_of(name, model).drop_path == pytest.approx(max(drops)), theirs


def test_torchvisions_average_of_its_vits_is_adjusted():
    recipe = recipe_of("torchvision-vit")
    weight = recipe.average.weight_at(312 * 100 + 32, 0, 4096, 300, 312)
    assert weight == pytest.approx((1 - 0.99998) * 4096 * 32 / 300)


@pytest.mark.parametrize("name", ["shufflenet", "aff", "iaff"])
def test_scores_are_a_hundred_minus_the_errors(name):
    path = find_recipe(name)
    line = next(it for it in path.read_text().splitlines() if it.startswith("# Error"))
    errors = [float(word.strip(".,:")) for word in line.split() if word[0].isdigit()]
    scores = [score.top1_pct for score in recipe_of(name).published]
    assert scores == pytest.approx([100 - error for error in errors], abs=1e-9)


def test_deit3_drops_every_branch_alike_and_scales_it_as_its_code():
    plan = plan_of(Job("deit3", "deit3_small_patch16_224", "digits"))
    model, _ = assemble(plan)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.05] * 24)
    for block in model.blocks:
        assert block.ls1.gamma.detach().unique().tolist() == pytest.approx([1e-4])
        assert block.ls2.gamma.detach().unique().tolist() == pytest.approx([1e-4])


def test_a_vgg_drops_half_behind_each_hidden_layer_of_its_classifier():
    with torch.device("meta"):
        model, _ = assembled(plan_of(Job("vgg", "vgg11_bn", "digits")))
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert drops == [0.5, 0.5]


def test_the_plain_vits_decay_is_that_of_its_optimizer():
    """big_vision adds wd * weight to the update and then multiplies by the schedule alone, whose
    peak is 1: so a step at the peak takes 1e-4 of a weight.
    """
    recipe = recipe_of("vit-s16-plain")
    assert recipe.optimizer.weight_decay * recipe.lr.peak == pytest.approx(1e-4)


def test_cifars_recipes_stay_as_they_are_on_their_own_images():
    for name, data in (("cct-cifar", "cifar10"), ("cct-cifar100", "cifar100")):
        plan = plan_of(Job(name, "cct_7_3x1_32", data))
        assert (plan.recipe.epochs, plan.steps_per_epoch, plan.deviations) == (310, 390, ())
        assert plan.lr_at(310 * 390 - 1) == 1e-5
    assert recipe_of("cct-cifar").mix.until_epochs == 175


def test_fine_tuning_of_convnext_v2_has_a_layer_for_each_block_but_in_base():
    """Its rule by single blocks: depth 12 of Tiny, and 0.9 of the rate for each."""
    tiny = recipe_of("convnextv2-ft", "convnextv2_tiny")
    with torch.device("meta"):
        built = timm.create_model("convnextv2_tiny")
    scales = {round(group["lr_scale"], 9) for group in param_groups(built, tiny.optimizer)}
    depth = sum(len(stage.blocks) for stage in built.stages)
    # the stem is one step below the first block in timm
    assert scales == {round(0.9**n, 9) for n in range(depth + 2)}
    assert recipe_of("convnextv2-ft").optimizer.layer_decay_blocks == 3
    atto = recipe_of("convnextv2-ft", "convnextv2_atto")
    assert (atto.mix, atto.lr.warmup_epochs, atto.smoothing, atto.epochs) == (None, None, 0.2, 600)


SMALLEST = [
    ("deit", "deit_tiny_patch16_224"),
    ("deit3", "deit3_small_patch16_224"),
    ("swin", "swin_tiny_patch4_window7_224"),
    ("pvt-v2", "pvt_v2_b0"),
    ("pvt", "pvt_tiny"),
    ("tnt", "tnt_s_legacy_patch16_224"),
    ("levit", "levit_128s"),
    ("cvt", "cvt_13"),
    ("cct-cifar", "cct_7_3x1_32"),
    ("cct-cifar100", "cct_7_3x1_32"),
    ("cct", "cct_7_3x1_32"),
    ("t2t", "t2t_vit_7"),
    ("vit-s16-plain", "vit_tiny_patch16_plain_224"),
    ("efficientnet-ra", "efficientnet_b0"),
    ("ghostnetv2", "ghostnetv2_100"),
    ("mobilenetv2", "mobilenetv2_035"),
    ("vgg", "vgg11_bn"),
    ("shufflenet", "shufflenet_v1_g3_050"),
    ("aff", "resnet18"),
    ("iaff", "resnet18"),
    ("mlperf-lars", "resnet18"),
    ("algoperf-resnet", "resnet18"),
    ("torchvision-regnet", "regnety_002"),
    ("torchvision-swin", "swin_tiny_patch4_window7_224"),
    ("torchvision-convnext", "convnext_atto"),
    ("torchvision-vit", "vit_tiny_patch16_224"),
    ("convnextv2-ft", "convnextv2_atto"),
]


@pytest.mark.parametrize(("name", "model"), SMALLEST)
def test_two_steps_on_the_digits(name, model):
    recipe = recipe_of(name, model)
    overrides = ["batch.images=4", "batch.norm_images=2", "batch.drop_last=true"]
    overrides += ["mix.images=2"] if recipe.mix else []
    overrides += ["mix.until_epochs=1"] if recipe.mix and recipe.mix.until_epochs else []
    overrides += ["distill=null"] if recipe.distill else []
    overrides += ["model.pretrained=null"] if name == "convnextv2-ft" else []
    overrides += ["image.train_px=64", "image.test_px=64"] if name == "ghostnetv2" else []
    plan = small_plan(name, model, " ".join(overrides))
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    before = [weight.detach().clone() for weight in state.model.parameters()]
    stream = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(2):
        assert optimizer_step(state, stream, step).isfinite()
    after = list(state.model.parameters())
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
