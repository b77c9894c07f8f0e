"""Models come from timm, their first weights from the seed."""

import pytest
import timm
import torch

from support.plans import small_plan
from trainer.base import streams
from trainer.models.build import build_model, check_model_name, gmacs, num_parameters
from trainer.models.edit.replacement import is_norm
from trainer.recipe.plan import PlanError


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
