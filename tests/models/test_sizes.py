"""Models of one image size, as most transformers are, are built for the recipe's images."""

import pytest
import timm
import torch

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import train
from trainer.models.build import build_model
from trainer.models.sizes import size_options
from trainer.recipe.plan import PlanError
from trainer.runs.export import timm_facts
from trainer.runs.job import Job, plan_of


def planned(model, overrides="", recipe="A2"):
    return plan_of(Job(recipe, model, "digits", overrides=overrides))


@pytest.mark.parametrize(
    ("model", "num_positions"),
    [("deit_tiny_patch16_224", 5), ("vit_tiny_patch16_224", 5), ("tnt_s_legacy_patch16_224", 5)],
)
def test_position_embeddings_are_those_of_the_recipes_images(model, num_positions):
    built = build_model(planned(model))  # 32 px: 2 x 2 patches and the class token
    named = dict(built.named_parameters())
    positions = named.get("pos_embed", named.get("patch_pos"))
    assert positions.shape[1] == num_positions
    assert torch.isfinite(built(torch.zeros(2, 3, 32, 32))).all()


@pytest.mark.parametrize(
    "model",
    ["swin_tiny_patch4_window7_224", "levit_128s", "pvt_v2_b0", "mobilenetv2_100", "ghostnet_100"],
)
def test_families_take_the_bundled_images_or_say_in_one_line_what_does(model):
    overrides = "drop_path=null" if model == "ghostnet_100" else ""
    try:
        built = build_model(planned(model, overrides))
    except PlanError as error:
        assert "\n" not in str(error) and "use set=" in str(error)
    else:
        assert torch.isfinite(built.eval()(torch.zeros(2, 3, 32, 32))).all()


def test_at_its_own_size_nothing_is_passed_to_a_model():
    plan = planned("deit_tiny_patch16_224", "image.train_px=224 image.test_px=224")
    assert timm_facts(plan, ())["model_args"] == {}


@pytest.mark.parametrize(("model", "px"), [("crossvit_9_240", 32), ("maxvit_tiny_tf_224", 448)])
def test_a_model_that_takes_the_images_as_timm_builds_it_stays_so(model, px):
    plan = planned(model, f"image.train_px={px} image.test_px={px}")
    assert size_options(plan) == {}


def test_sizes_that_grow_interpolate_position_embeddings():
    growth = "from_px: 32, from_epoch: 0, to_epoch: 5, multiple_px: 16, updated: per_epoch"
    overrides = f"image.train_px=64 image.test_px=64 'image.growth={{{growth}}}'"
    plan = planned("deit_tiny_patch16_224", overrides)
    assert size_options(plan) == {"img_size": 64, "dynamic_img_size": True}


def test_another_test_size_interpolates_position_embeddings_as_timm_does():
    plan = planned("deit_tiny_patch16_224", "image.train_px=32 image.test_px=64")
    built = build_model(plan).eval()
    theirs = timm.create_model(
        "deit_tiny_patch16_224", num_classes=10, img_size=64, dynamic_img_size=False
    ).eval()
    module = timm.models.deit
    tensors = module.checkpoint_filter_fn(dict(built.state_dict()), theirs)
    theirs.load_state_dict(tensors)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(built(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_tested_at_another_size_names_the_size_that_it_can():
    with pytest.raises(PlanError, match=r"image\.test_px=64.*image\.test_px=32"):
        build_model(planned("levit_128s", "image.train_px=32 image.test_px=64"))


def test_a_transformer_learns_on_the_bundled_data():
    plan = planned("deit_tiny_patch16_224", "epochs=2 lr.warmup_epochs=null lr.warmup_from=null")
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    assert train(state, open_data(plan.profile, None)) == "finished"
    assert state.progress.scores["model"]["num_top1"] > 0.2 * plan.profile.num_val


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
