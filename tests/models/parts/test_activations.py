"""Every nonlinearity of the body becomes the asked one, gates and attention keep theirs; in place
costs no gradient.
"""

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from trainer.models.edit.replacement import ReplacementError, is_activation
from trainer.models.parts import activations
from trainer.models.parts.activations import (
    Elu,
    Gelu,
    HardSwish,
    LeakyRelu,
    LearnedSwish,
    Mish,
    Prelu,
    Relu,
    Silu,
    Swish,
)

ALL = [
    Relu(), LeakyRelu(slope=0.1), Gelu(), Silu(), Swish(beta=1.5), Mish(), HardSwish(),
    Elu(alpha=0.7), Prelu(slope=0.3)
]  # fmt: skip
NAMES = [part.name for part in ALL]
FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.1 * x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-1.5 * x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "hard_swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "elu": lambda x: torch.where(x > 0, x, 0.7 * torch.expm1(x)),
    "prelu": lambda x: torch.where(x > 0, x, 0.3 * x),
}
# resnet18: 1 + 2 * 8; resnet50d: 3 of its stem + 3 * 16; resnetv2_50: inside its norms, 3 * 16 and
# the last one; seresnet18: as resnet18, but not what lies inside its attention; ConvNeXts: one a
# block.
COUNTS = {
    "resnet18": (17, "act1", "layer4.1.act2"),
    "resnet50d": (51, "conv1.2", "layer4.2.act3"),
    "seresnet50": (49, "act1", "layer4.2.act3"),
    "resnetv2_50": (49, "stages.0.blocks.0.norm1.act", "norm.act"),
    "regnetx_002": (40, "stem.bn.act", "s4.b7.act3"),
    "convnext_atto": (12, "stages.0.blocks.0.mlp.act", "stages.3.blocks.1.mlp.act"),
    "convnext_tiny": (18, "stages.0.blocks.0.mlp.act", "stages.3.blocks.2.mlp.act"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_activation_of_the_body_is_replaced(name):
    model = timm.create_model(name)
    replacement = Mish().apply(model, 64)
    assert (len(replacement.places), replacement.places[0], replacement.places[-1]) == COUNTS[name]
    assert (
        sum(count for _, count in replacement.before) == len(replacement.places)
        and replacement.after == "Mish"
    )
    assert all(type(model.get_submodule(place)) is nn.Mish for place in replacement.places)
    rest = {name for name, module in model.named_modules() if is_activation(module)} - set(
        replacement.places
    )
    assert all(".se." in name for name in rest)


@pytest.mark.parametrize("part", ALL, ids=NAMES)
def test_layers_follow_their_formulas(part):
    given = torch.linspace(-5, 5, 201, dtype=torch.float64)
    for in_place in (False, True):
        made = part.layer(in_place).double()(given.clone())
        torch.testing.assert_close(made, FORMULAS[part.name](given), rtol=1e-6, atol=1e-6)


def test_gelu_by_tanh_is_torchs():
    given = torch.randn(50)
    assert torch.equal(
        Gelu(approximate="tanh").layer(False)(given), functional.gelu(given, approximate="tanh")
    )


@pytest.mark.parametrize("part", ALL, ids=NAMES)
def test_gradients_are_those_of_finite_differences_also_in_place(part):
    layer = part.layer(in_place=True).double()
    given = torch.tensor(
        [-4.1, -2.2, -0.6, -0.1, 0.2, 0.9, 2.4, 4.3], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda x: layer(x * 1.0), (given,))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "resnetv2_50"])
@pytest.mark.parametrize(
    "part", [Relu(), LeakyRelu(slope=0.1), Elu(alpha=0.7)], ids=lambda part: part.name
)
def test_in_place_gives_the_same_outputs_and_gradients(part, name):
    """Whole models, with timm's own additions in place around the layers."""
    if name != "test_convnext" and part.name == "relu":
        return  # the model's own
    found = {}
    for in_place in (True, False):
        torch.manual_seed(0)
        small = (
            {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)} if name == "resnetv2_50" else {}
        )
        model = timm.create_model(name, num_classes=5, **small)
        replacement = part.apply(model, 64)
        assert all(model.get_submodule(place).inplace for place in replacement.places)
        for place in replacement.places:
            model.get_submodule(place).inplace = in_place
        model.double()(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
        found[in_place] = {key: weight.grad for key, weight in model.named_parameters()}
    for key, grad in found[True].items():
        torch.testing.assert_close(grad, found[False][key], msg=key)


@pytest.mark.parametrize("part", ALL, ids=NAMES)
def test_the_table_of_memory_is_what_torch_keeps(part):
    rows = re.findall(
        rf"^    {part.name} .* (\d+) +(\d+)$", activations.__doc__, flags=re.MULTILINE
    )
    assert [(int(keeps), int(beside)) for keeps, beside in rows] == [
        bytes_kept(part.layer(in_place=True))
    ]


def bytes_kept(layer):
    num_elements, kept = 1 << 10, {}
    given = torch.randn(num_elements, requires_grad=True)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    fresh = given * 2.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = layer(fresh)
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    large = {place: size for place, size in kept.items() if place not in weights}
    beside = sum(
        size for place, size in large.items() if place != made.untyped_storage().data_ptr()
    )
    return sum(large.values()) // num_elements, beside // num_elements


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize("part", ALL, ids=NAMES)
def test_models_learn_with_each_under_bf16_autocast(part, name):
    model = timm.create_model(name, num_classes=3)
    if (part.name, name) == ("relu", "test_resnet"):
        return  # the model's own
    part.apply(model, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 32)).float().square().mean()
    loss.backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters()
    )


@pytest.mark.parametrize(
    ("part", "name"), [(Relu(), "test_resnet"), (Gelu(approximate="tanh"), "test_convnext")]
)
def test_a_swap_that_would_change_nothing_is_refused(part, name):
    with pytest.raises(ReplacementError, match=r"model.activation: all \d+ .*\w+ already"):
        part.apply(timm.create_model(name), 32)


@pytest.mark.parametrize("part", [Swish(beta=1.0), Prelu(slope=0.25)], ids=lambda part: part.name)
def test_learned_ones_are_one_number_a_layer_and_go_round(part):
    model, other = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    before = sum(weight.numel() for weight in model.parameters())
    replacement = part.apply(model, 32)
    part.apply(other, 32)
    assert sum(weight.numel() for weight in model.parameters()) - before == len(replacement.places)
    torch.nn.init.constant_(next(model.get_submodule(replacement.places[0]).parameters()), 0.9)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_silu_is_not_yet_swish_with_learned_beta():
    model = timm.create_model("test_resnet")
    Silu().apply(model, 32)
    replacement = Swish(beta=1.0).apply(model, 32)
    assert replacement.before[0][0] == "SiLU" and replacement.after == "LearnedSwish"


def test_those_that_are_the_asked_one_already_are_counted_and_left():
    model = timm.create_model("test_resnet")
    model.act1 = nn.SiLU()
    replacement = Silu().apply(model, 32)
    assert "act1" not in replacement.places and replacement.note == "1 are SiLU already"


def test_swish_is_silu_where_beta_is_one():
    given = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(LearnedSwish(1.0)(given), functional.silu(given))


def test_swish_follows_its_formula_and_beta_is_learned():
    layer = LearnedSwish(1.7).double()
    given = torch.linspace(-6, 6, 11, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        layer(given), given / (1 + torch.exp(-1.7 * given)), rtol=1e-7, atol=1e-7
    )

    def run(given, beta):
        return torch.func.functional_call(layer, {"beta": beta}, (given,))

    assert torch.autograd.gradcheck(run, (given, layer.beta.detach().clone().requires_grad_()))


def test_swish_answers_in_the_dtype_that_it_is_given():
    assert LearnedSwish(1.0)(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_swish_goes_round_and_is_copied():
    layer = LearnedSwish(0.5)
    twin = copy.deepcopy(layer)
    layer.beta.data.fill_(2.0)
    assert twin.beta.item() == 0.5
    twin.load_state_dict(layer.state_dict())
    assert twin.beta.item() == 2.0 and twin.beta.ndim == 1
