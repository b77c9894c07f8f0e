"""Models come from timm, their first weights from the seed."""

import pytest
import timm
import torch

from plans import small_plan
from trainer import streams
from trainer.models import build_model, check_model_name, gmacs, num_parameters
from trainer.plan import PlanError


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


def test_an_option_that_a_model_lacks_is_refused_by_the_pages_name():
    plan = small_plan("convnext", model="test_resnet", overrides="model.head_init_scale=0.5")
    with pytest.raises(PlanError, match="model.head_init_scale: test_resnet has no such option"):
        build_model(plan)


@pytest.mark.parametrize(
    ("train_px", "test_px", "place"),
    [(24, 32, "image.train_px"), (32, 24, "image.test_px"), (24, 24, "image.train_px")],
)
def test_images_that_a_model_cannot_take_are_refused_with_a_size_that_it_can(train_px, test_px, place):
    sizes = f"image.train_px={train_px} image.test_px={test_px}"
    with pytest.raises(PlanError, match="cannot take such images") as caught:
        build_model(small_plan("convnext", model="convnext_atto", overrides=sizes))
    assert f"{place}=24: convnext_atto" in str(caught.value) and f'set="{place}=32" would do' in str(caught.value)
    build_model(small_plan("convnext", model="convnext_atto", overrides="image.train_px=32 image.test_px=32"))


def test_the_size_that_images_grow_from_is_tried_too():
    growth = "{from_px: 16, from_epoch: 0, to_epoch: 1, multiple_px: 8, updated: per_epoch}"
    plan = small_plan("convnext", model="convnext_atto", overrides=f"'image.growth={growth}'")
    with pytest.raises(PlanError, match="image.growth.from_px=16: convnext_atto cannot take such images"):
        build_model(plan)


def test_trying_the_sizes_changes_no_weight_and_leaves_the_model_in_training():
    plan = small_plan("torchvision-v1", model="resnet18", seed=3)
    model = build_model(plan)
    torch.manual_seed(streams.torch_seed(3, "weights"))
    assert torch.equal(weights(model), weights(timm.create_model("resnet18", num_classes=10, zero_init_last=False)))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("recipe", "is_zero"), [("torchvision-v1", False), ("A2", True)])
def test_the_last_gamma_follows_the_page(recipe, is_zero):
    model = build_model(small_plan(recipe, model="resnet18"))
    assert (model.layer1[0].bn2.weight.abs().sum().item() == 0) is is_zero


def test_stochastic_depth_grows_linearly_with_depth():
    model = build_model(small_plan("A2", model="resnet18", overrides="drop_path=0.1"))
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * place / 7 for place in range(8)])


def test_counts_are_timms_and_the_papers():
    model = timm.create_model("resnet50")
    assert num_parameters(model) == 25_557_032
    # 4.089 G: convolutions and the last matrix product at 224 px, He et al.'s "3.8 billion" before v1.5 moved a stride
    assert gmacs(model, 3, 224) == pytest.approx(4.089, abs=0.001)
    assert model.training
