"""Groups, clipping and the optimizers that torch provides."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.layers import BatchNormAct2d, LayerNorm2d, RmsNorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from trainer.base.component import registered
from trainer.base.errors import PlanError
from trainer.components import lamb
from trainer.components.optimizers import (
    AdamW,
    Lamb,
    Optimizer,
    RmspropTf,
    Sgd,
    clip_gradients,
    param_groups,
)


def sgd(*no_decay, **fields):
    return Sgd(**{"momentum": 0.9, "weight_decay": 0.02, "no_decay": no_decay, **fields})


def names_by_decay(model, groups):
    """The names of the weights in the groups, by their decay."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        group["weight_decay"]: {names[id(weight)] for weight in group["params"]} for group in groups
    }


@pytest.fixture(scope="module", params=["resnet50", "convnext_atto"])
def model(request):
    return timm.create_model(request.param)


def test_vectors_and_biases_are_timms_groups(model):
    timms = names_by_decay(model, param_groups_weight_decay(model, 0.02))
    assert names_by_decay(model, param_groups(model, sgd("vectors", "biases"))) == timms


def test_norms_are_torchvisions_groups(model):
    """torchvision's rule: all weights of its list of norm classes, by a walk over the modules."""
    classes = (
        nn.modules.batchnorm._BatchNorm,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
    )
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, classes)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups = names_by_decay(model, param_groups(model, sgd("norms")))
    assert groups[0.0] == norms and len(norms) > 20
    assert any(name.endswith(".bias") for name in groups[0.02])  # of the head: still decayed


def test_names_with_bn_are_ffcvs_groups():
    """Its script: `"bn" in name`. So the norms of the shortcuts decay, and so does the bias of the
    head.
    """
    model = timm.create_model("resnet50")
    named = {name for name, _ in model.named_parameters() if "bn" in name}
    groups = names_by_decay(model, param_groups(model, sgd("bn_in_name")))
    assert (
        groups[0.0] == named and len(named) == 98
    )  # gamma and beta of bn1 and of three norms in each of 16 blocks
    assert {"layer1.0.downsample.1.weight", "layer1.0.downsample.1.bias", "fc.bias"} <= groups[0.02]


def test_without_exclusions_there_is_one_group(model):
    (group,) = param_groups(model, sgd())
    assert group["weight_decay"] == 0.02 and len(group["params"]) == len(list(model.parameters()))


def test_each_kind_names_what_it_says():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4))
            self.bias = nn.Parameter(torch.ones(2, 4))
            self.norm = nn.Sequential(
                LayerNorm2d(4), RmsNorm(4), BatchNormAct2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
            )
            self.bnlike = nn.Linear(4, 4)

    norms = {"norm.0.weight", "norm.0.bias", "norm.1.weight", "norm.4.weight"}
    norms |= {f"norm.{place}.{name}" for place in (2, 3) for name in ("weight", "bias")}
    biases = {"bias", "bnlike.bias", "norm.0.bias", "norm.2.bias", "norm.3.bias"}
    vectors = norms | {"gamma", "bnlike.bias"}
    model = Block()
    for kinds, expected in [
        (("norms",), norms),
        (("biases",), biases),
        (("vectors",), vectors),
        (("norms", "biases"), norms | biases),
    ]:
        assert names_by_decay(model, param_groups(model, sgd(*kinds)))[0.0] == expected


def test_frozen_weights_are_left_out_and_shared_ones_stand_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    groups = names_by_decay(model, param_groups(model, sgd("biases")))
    assert groups == {0.02: {"0.weight"}, 0.0: {"0.bias", "1.bias", "2.bias"}}
    assert sum(len(group["params"]) for group in param_groups(model, sgd("biases"))) == 4


FAMILIES = [
    "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
    "pvt_v2_b0", "tnt_s_patch16_224", "levit_128s", "mobilenetv2_100", "efficientnet_b0",
    "ghostnet_100", "vgg11_bn", "resnet18", "convnext_atto", "xcit_nano_12_p16_224",
    "cait_xxs24_224", "coat_tiny", "beit_base_patch16_224", "mvitv2_tiny",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_lists_and_what_a_layer_is_are_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    listed = getattr(model, "no_weight_decay", set)()
    ours = param_groups(model, sgd("vectors", "biases", "no_weight_decay"))
    theirs = param_groups_weight_decay(model, 0.02, no_weight_decay_list=listed)
    assert by_weight(model, ours) == by_weight(model, theirs)
    layered = sgd("vectors", "no_weight_decay", layer_decay=0.75)
    theirs = param_groups_layer_decay(model, 0.02, no_weight_decay_list=listed, layer_decay=0.75)
    assert by_weight(model, param_groups(model, layered)) == by_weight(model, theirs)


@pytest.mark.parametrize("name", ["convnext_small", "convnext_base"])
def test_layers_of_three_blocks_are_those_of_convnexts_fine_tuning(name):
    """Its 14 layers: the stem, stages 1 and 2 whole, nine times three blocks of stage 3, stage 4,
    and what is left, norm and head; a downsampling belongs to what it leads to.
    """

    def layer(weight: str) -> int:
        place = re.match(r"stages\.(\d)\.(?:downsample|blocks\.(\d+))", weight)
        if not place:
            return 0 if weight.startswith("stem") else 13
        stage, block = int(place[1]), int(place[2] or 0)
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]

    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups(model, sgd("vectors", layer_decay=0.8, layer_decay_blocks=3))
    found = {weight: scale for weight, (_, scale) in by_weight(model, groups).items()}
    assert found == {weight: pytest.approx(0.8 ** (13 - layer(weight))) for weight in found}


def by_weight(model, groups):
    """(decay, share of the learning rate) of each weight, by name."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        names[id(weight)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
        for weight in group["params"]
    }


def test_a_head_has_a_learning_rate_of_its_own():
    model = timm.create_model("resnet18")
    found = by_weight(model, param_groups(model, sgd("biases", head_lr_scale=10)))
    assert {name for name, (_, scale) in found.items() if scale == 10} == {"fc.weight", "fc.bias"}
    assert {scale for _, scale in found.values()} == {1.0, 10.0}
    assert found["fc.weight"][0] == 0.02 and found["fc.bias"][0] == 0.0


def test_weights_are_spared_by_name():
    model = timm.create_model("resnet18")
    optimizer = sgd(no_decay_names=("layer1.*.conv1.weight", "fc.weight"))
    spared = {name for name, (decay, _) in by_weight(model, param_groups(model, optimizer)).items()
              if not decay}  # fmt: skip
    assert spared == {"layer1.0.conv1.weight", "layer1.1.conv1.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"no_decay_names": ("cls_token",)}, "no_decay_names"),
        ({"layer_decay": 0.7}, "layer_decay"),
        ({"head_lr_scale": 2}, "head_lr_scale"),
    ],
)
def test_what_a_model_does_not_have_is_refused(fields, place):
    with pytest.raises(PlanError) as error:
        param_groups(nn.Sequential(nn.Linear(2, 2)), sgd(**fields))
    assert error.value.path == ("optimizer", place) and error.value.hint


@pytest.mark.parametrize(("size", "is_active"), [(1e-3, False), (10.0, True)])
def test_clipping_divides_by_the_excess_only(size, is_active):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.zeros(shape, requires_grad=True) for shape in [(40, 30), (8, 4, 3, 3), (9,), (), (2,)]
    ]
    for weight in weights[:-1]:
        weight.grad = torch.randn(weight.shape, generator=generator) * size
    before = [weight.grad.double().numpy().copy() for weight in weights[:-1]]
    norm = clip_gradients(weights, 1.0)
    expected = np.sqrt(sum((gradient**2).sum() for gradient in before))
    assert norm.ndim == 0 and float(norm) == pytest.approx(expected, rel=1e-6)
    assert (expected > 1) == is_active
    for weight, gradient in zip(weights, before, strict=False):
        np.testing.assert_allclose(weight.grad.numpy(), gradient / max(1.0, expected), rtol=1e-6)
    assert weights[-1].grad is None


def test_a_gradient_that_is_not_a_number_shows_in_the_norm():
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert clip_gradients([weight], 1.0).isnan()


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        (
            Lamb(betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, no_decay=("biases",)),
            lamb.LambOptimizer,
        ),
        (
            AdamW(betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, no_decay=("biases",)),
            torch.optim.AdamW,
        ),
        (sgd("biases", nesterov=True, weight_decay=0.1), torch.optim.SGD),
    ],
)
def test_built_optimizers_carry_the_pages_numbers(page, cls):
    model = nn.Linear(3, 3)
    optimizer = page.build(param_groups(model, page), 0.25)
    assert type(optimizer) is cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 and group["fused"]
        for field in {"betas", "eps", "momentum", "nesterov"} & set(type(page).model_fields):
            assert group[field] == getattr(page, field)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_its_formula(momentum, nesterov):
    page = sgd(momentum=momentum, nesterov=nesterov)
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 0.1)
    expected, speed = model.weight.detach().double().numpy().copy(), 0.0
    for step in range(5):
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy() + 0.02 * expected
        speed = momentum * speed + gradient
        expected = expected - 0.1 * (gradient + momentum * speed if nesterov else speed)
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("decoupled_decay", [False, True])
def test_rmsprop_equals_its_formula(centered, decoupled_decay):
    """TensorFlow 1: the mean square starts at one, eps is inside the root, the rate enters the
    momentum.
    """
    page = RmspropTf(
        alpha=0.9,
        eps=1e-3,
        momentum=0.8,
        weight_decay=0.05,
        centered=centered,
        decoupled_decay=decoupled_decay,
    )
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 0.1)
    expected = model.weight.detach().double().numpy().copy()
    square, mean, speed = np.ones_like(expected), np.zeros_like(expected), np.zeros_like(expected)
    for step in range(5):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy()
        if decoupled_decay:
            expected = expected * (1 - rate * 0.05)
        else:
            gradient = gradient + 0.05 * expected
        square, mean = 0.9 * square + 0.1 * gradient**2, 0.9 * mean + 0.1 * gradient
        speed = 0.8 * speed + rate * gradient / np.sqrt(
            square - (mean**2 if centered else 0) + 1e-3
        )
        expected = expected - speed
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", registered(Optimizer), ids=lambda kind: kind.__name__)
def test_every_optimizers_example_moves_weights_downhill(kind):
    page = TypeAdapter(Optimizer).validate_python(
        {"name": kind.model_fields["name"].default, **kind.example}
    )
    model = nn.Linear(3, 1)
    optimizer = page.build(param_groups(model, page), 1e-3)
    before = model(torch.ones(1, 3)).item()
    model(torch.ones(1, 3)).backward()
    page.clip(model)
    optimizer.step()
    assert model(torch.ones(1, 3)).item() < before


def test_a_page_clips_as_it_says():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for page, is_cut in (
        (sgd(), False),
        (sgd(clip_global_norm=1e-3), True),
        (sgd(clip_adaptive=1e-3), True),
    ):
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        before = model[0].weight.grad.norm()
        page.clip(model)
        assert (model[0].weight.grad.norm() < before) == is_cut


def test_adamw_equals_its_formula():
    page = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    model = nn.Linear(5, 4)
    optimizer = page.build(param_groups(model, page), 1e-2)
    expected, mean, square = model.weight.detach().double().numpy().copy(), 0.0, 0.0
    for step in range(1, 6):
        model.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        gradient = model.weight.grad.double().numpy()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        expected = expected * (1 - 1e-2 * 0.05) - 1e-2 * update
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page", [AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05), sgd()])
def test_a_resume_may_change_the_memory_format(page):
    def steps(model, optimizer, numbers):
        for number in numbers:
            gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(number))
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
            optimizer.step()

    straight = nn.Conv2d(4, 8, 3, bias=False)
    halted = copy.deepcopy(straight)
    steps(straight, page.build(param_groups(straight, page), 0.01), range(6))
    saved = page.build(param_groups(halted, page), 0.01)
    steps(halted, saved, range(3))
    halted = halted.to(memory_format=torch.channels_last)
    resumed = page.build(param_groups(halted, page), 0.01)
    resumed.load_state_dict(saved.state_dict())
    steps(halted, resumed, range(3, 6))
    torch.testing.assert_close(halted.weight, straight.weight, rtol=1e-6, atol=1e-6)


ADAM = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02}


@pytest.mark.parametrize(
    "page",
    [
        {"name": "lamb", **ADAM, "betas": (0.9, 1.0)},
        {"name": "lamb", **ADAM, "betas": (-0.1, 0.9)},
        {"name": "lamb", **ADAM, "betas": (0.9,)},
        {"name": "lamb", **ADAM, "eps": 0.0},
        {"name": "adamw", **ADAM, "eps": 2.0},
        {"name": "adamw", **ADAM, "weight_decay": -0.01},
        {"name": "adamw", **ADAM, "weight_decay": 20.0},
        {"name": "adamw", **ADAM, "clip_global_norm": 0.0},
        {"name": "adamw", **ADAM, "no_decay": ("bn",)},
        {"name": "adamw", **ADAM, "no_decay": ("norms", "norms")},
        {"name": "adamw", **ADAM, "momentum": 0.9},
        {"name": "sgd", "momentum": 1.0, "weight_decay": 0.0},
        {"name": "sgd", "momentum": -0.9, "weight_decay": 0.0},
        {"name": "sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0.0},
        {"name": "sgd", "weight_decay": 0.0},
        {"name": "rmsprop", "weight_decay": 0.0},
        {"name": "rmsprop_tf", "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.0},
        {"name": "rmsprop_tf", "alpha": 1.0, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        {"name": "decoupled_sgd", "momentum": 0.0, "nesterov": True, "weight_decay": 0.0},
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip_adaptive": 0.0},
        {
            "name": "sgd",
            "momentum": 0.9,
            "weight_decay": 0.0,
            "clip_adaptive": 0.01,
            "clip_global_norm": 1.0,
        },
    ],
)
def test_absurd_pages_are_refused(page):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(Optimizer).validate_python(page)
    assert all("\n" not in error["msg"] for error in refusal.value.errors())
