"""Models come from timm, their first weights from the seed."""

import pytest
import timm
import torch
from torch import nn

from support.plans import small_plan
from trainer.base import streams
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import (
    assemble,
    build_model,
    check_model_name,
    check_precise_norm,
    gmacs,
    num_parameters,
)  # fmt: skip
from trainer.models.edit.replacement import is_norm
from trainer.recipe.plan import PlanError
from trainer.runs.job import Job, plan_of


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def test_first_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = weights(build_model(small_plan(seed=5)))
    torch.manual_seed(2)
    assert torch.equal(first, weights(build_model(small_plan(seed=5))))
    assert not torch.equal(first, weights(build_model(small_plan(seed=6))))


def test_building_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_model(small_plan())
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(PlanError, match="did you mean resnet50"):
        check_model_name("resnet5O")


def test_weights_that_timm_does_not_have_are_refused_in_one_line():
    with pytest.raises(
        PlanError,
        match=r"model=resnet50.typo: .*'typo'.*; use model=resnet50",
    ):
        check_model_name("resnet50.typo")
    check_model_name("resnet50.a1_in1k")


def test_an_option_that_a_model_lacks_is_refused_by_the_pages_name():
    plan = small_plan("A2", model="test_efficientnet", overrides="model.zero_init_last=true")
    with pytest.raises(PlanError, match=r"model.zero_init_last: test_efficientnet has no such"):
        build_model(plan)


@pytest.mark.parametrize(
    "model",
    ["test_resnet", "test_convnext", "test_efficientnet", "deit_tiny_distilled_patch16_224"],
)
def test_a_new_classifier_is_scaled_in_any_model_and_nothing_else_is(model):
    """With timm's own option and without; of a distilled model both."""
    sizes = " image.train_px=224 image.test_px=224" * model.startswith("deit")
    plain, scaled = (
        build_model(small_plan("torchvision-v1", model, given + sizes)).state_dict()
        for given in ("model=null", "'model={head_init_scale: 0.5}'")
    )
    heads = {"fc", "head", "head_dist", "classifier"}
    for name, weight in plain.items():
        is_head = name.split(".")[0] in heads and "norm" not in name
        assert torch.equal(scaled[name], weight * 0.5 if is_head else weight), name


@pytest.mark.parametrize(
    ("train_px", "test_px", "place"),
    [(24, 32, "image.train_px"), (32, 24, "image.test_px"), (24, 24, "image.train_px")],
)
def test_images_that_a_model_cannot_take_are_refused_with_a_size_that_it_can(
    train_px, test_px, place
):
    sizes = f"image.train_px={train_px} image.test_px={test_px}"
    with pytest.raises(PlanError, match=r"image.test_px|image.train_px") as caught:
        build_model(small_plan("convnext", model="convnext_atto", overrides=sizes))
    assert f"{place}=24: convnext_atto" in str(caught.value) and f'set="{place}=32"' in str(
        caught.value
    )
    build_model(
        small_plan(
            "convnext", model="convnext_atto", overrides="image.train_px=32 image.test_px=32"
        )
    )


def test_the_size_that_images_grow_from_is_tried_too():
    growth = "{from_px: 16, from_epoch: 0, to_epoch: 1, multiple_px: 8, updated: per_epoch}"
    plan = small_plan("convnext", model="convnext_atto", overrides=f"'image.growth={growth}'")
    with pytest.raises(PlanError, match=r"image.growth.from_px=16: convnext_atto"):
        build_model(plan)


def test_trying_the_sizes_changes_no_weight_and_leaves_the_model_in_training():
    plan = small_plan("torchvision-v1", model="resnet18", seed=3)
    model = build_model(plan)
    torch.manual_seed(streams.torch_seed(3, "weights"))
    assert torch.equal(
        weights(model), weights(timm.create_model("resnet18", num_classes=10, zero_init_last=False))
    )
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("recipe", "is_zero"), [("torchvision-v1", False), ("A2", True)])
def test_the_last_gamma_follows_the_page(recipe, is_zero):
    model = build_model(small_plan(recipe, model="resnet18"))
    assert (model.layer1[0].bn2.weight.abs().sum().item() == 0) is is_zero


def test_stochastic_depth_grows_linearly_with_depth():
    model = build_model(small_plan("A2", model="resnet18", overrides="drop_path=0.1"))
    blocks = [
        block
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4)
        for block in layer
    ]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * place / 7 for place in range(8)])


def test_counts_are_timms_and_the_papers():
    model = timm.create_model("resnet50")
    assert num_parameters(model) == 25_557_032
    # 4.089 G: convolutions and the last matrix product at 224 px, He et al.'s "3.8 billion" before
    # v1.5 moved a stride
    assert gmacs(model, 3, 224) == pytest.approx(4.089, abs=0.001)
    assert model.training


PRECISE = "precise_norm='{images: 24}' "


def test_precise_norm_is_refused_where_it_cannot_be_followed():
    plan = small_plan(overrides=PRECISE)
    with pytest.raises(
        PlanError,
        match=r"precise_norm: .*test_resnet.*leave precise_norm out",
    ):
        check_precise_norm(plan, nn.GroupNorm(1, 4))
    norm = nn.BatchNorm2d(3)
    with pytest.raises(
        PlanError,
        match=r"precise_norm.images 20 .*batch.norm_images 8; use 16 or 24",
    ):
        check_precise_norm(small_plan(overrides="precise_norm='{images: 20}'"), norm)
    with pytest.raises(
        PlanError,
        match=r'1408 images.*; use set="precise_norm.images=1408"',
    ):
        check_precise_norm(small_plan(overrides="precise_norm='{images: 1416}'"), norm)
    check_precise_norm(plan, norm)


def test_a_model_is_refused_with_its_plan_where_precise_norm_cannot_be_followed():
    plan = plan_of(
        Job("A3", "convnext_atto", data="digits", overrides=PRECISE + "model.zero_init_last=null")
    )
    with pytest.raises(
        PlanError,
        match=r"precise_norm: .*convnext_atto",
    ):
        assemble(plan)


def test_a_start_at_zero_is_refused_where_no_norm_ends_a_branch_and_one_without_it_is_followed():
    with pytest.raises(
        PlanError,
        match=r'test_convnext.*; use set="model.zero_init_last=null"',
    ):
        build_model(
            small_plan(
                "torchvision-v1", model="test_convnext", overrides="model.zero_init_last=true"
            )
        )
    model = build_model(small_plan("torchvision-v1", model="test_convnext"))
    assert all(module.weight.all() for module in model.modules() if is_norm(module))
    with pytest.raises(
        PlanError, match="legacy_seresnet18 has no such option"
    ):  # its branches do end in norms
        build_model(
            small_plan(
                "torchvision-v1", model="legacy_seresnet18", overrides="model.zero_init_last=true"
            )
        )


ONE = "batch.images=8 batch.norm_images=1 image.train_px={px} image.test_px=64 drop_path=null "
GROUPED = "'model.norm={name: group_norm, groups: 8, eps: 1.0e-5}' "
GATE = GROUPED + "'model.attention={name: bam, reduction: 16, dilation: 4, num_convolutions: 2}' "
PAIRED = "{name: batch_channel_norm, groups: 8, eps: 1.0e-5, momentum: 0.1, statistics: batch}"


@pytest.mark.parametrize(
    ("px", "parts", "place", "is_cured_by_size"),
    [
        (32, "", r"layer4\.0\.bn1 ", True),
        (32, f"'model.norm={PAIRED}' ", r"layer4\.0\.bn1\.batch ", True),
        (64, GATE, r"layer\d\S* ", False),  # the gate's norm is behind a pooling
        (
            64,
            "'image.growth={from_px: 32, from_epoch: 0, to_epoch: 1, multiple_px: 32, "
            "updated: per_epoch}' ",
            "growth.from_px",
            True,
        ),
    ],
)
def test_statistics_of_one_value_are_refused_with_the_model_and_torch_agrees(
    px, parts, place, is_cured_by_size
):
    plan = small_plan("torchvision-v1", model="resnet18", overrides=ONE.format(px=px) + parts)
    with pytest.raises(PlanError, match=f"batch.norm_images 1: .*{place}") as caught:
        assemble(plan)
    assert "batch.norm_images of 2 or more" in str(caught.value) and "\n" not in str(caught.value)
    assert ("or larger images" in str(caught.value)) is is_cured_by_size
    pair = assemble(
        small_plan(
            "torchvision-v1",
            model="resnet18",
            overrides=ONE.format(px=px).replace("norm_images=1", "norm_images=2") + parts,
        )
    )[0]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pair(torch.zeros(1, 3, plan.train_px_at(0), plan.train_px_at(0)))
    pair(torch.zeros(2, 3, plan.train_px_at(0), plan.train_px_at(0)))


ONE_LEFT = "batch.images=4 batch.norm_images=4 batch.drop_last=false"  # 1437 = 359 x 4 + 1


def test_a_last_step_of_one_image_is_refused_where_norms_sample_the_batch():
    with pytest.raises(PlanError, match="one image") as refused:
        build_model(small_plan(overrides=ONE_LEFT))
    assert refused.value.path == ("batch", "images")


def test_a_last_step_of_one_image_is_trained_where_no_norm_samples_the_batch():
    plan = small_plan(model="test_vit", overrides=ONE_LEFT)
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    stream = open_data(plan.profile, None).train_stream(plan, state.settings, last := 359)
    assert plan.window_images(last) == 1
    assert optimizer_step(state, stream, last).isfinite()


@pytest.mark.parametrize(
    ("px", "parts"),
    [(64, ""), (32, GROUPED), (32, f"'model.norm={PAIRED.replace(': batch}', ': estimated}')}' ")],
)
def test_one_image_is_a_sample_where_every_statistic_has_two_values(px, parts):
    model, _ = assemble(
        small_plan("torchvision-v1", model="resnet18", overrides=ONE.format(px=px) + parts)
    )
    model(torch.zeros(1, 3, px, px))
