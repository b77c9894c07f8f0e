"""Which weights decay, and at which rate each moves: timm's groups, torchvision's and ffcv's."""

import re

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, RmsNorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from trainer.base.errors import PlanError
from trainer.components.optimizers import Sgd
from trainer.components.param_groups import param_groups


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
