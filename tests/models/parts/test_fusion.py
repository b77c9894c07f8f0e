"""Branch and shortcut are joined as the formula says, in the blocks that were asked for."""

import copy

import pytest
import timm
import torch

from trainer.models.build import num_parameters
from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.fusion import Aff, AttentionalFusion, Iaff

AFF, IAFF = Aff(reduction=16, stages=2), Iaff(reduction=16, stages=2)


def of_gate(c):
    """Weights of one gate: two pointwise pairs with biases, and their norms."""
    h = c // 16
    return 2 * (c * h + h + 2 * h + h * c + c + 2 * c)


@pytest.mark.parametrize(("part", "gates", "published_m"), [(AFF, 1, 30.3), (IAFF, 2, 35.1)])
def test_it_adds_the_weights_of_its_gates_to_stages_3_and_4(part, gates, published_m):
    with torch.device("meta"):
        plain = timm.create_model("resnet50")
    model = timm.create_model("resnet50")
    replaced = part.apply(model, 64)
    added = gates * (6 * of_gate(1024) + 3 * of_gate(2048))
    assert num_parameters(model) == num_parameters(plain) + added
    # the paper's count, which is cut after one digit
    assert int(num_parameters(model) / 1e5) / 10 == published_m
    places = [f"layer3.{i}.fusion" for i in range(6)] + [f"layer4.{i}.fusion" for i in range(3)]
    assert list(replaced.places) == places


def gate(weights, x):
    """sigmoid(local + global) of x [C, H, W] in evaluation, channel by channel in float64."""

    def pointwise(layers, x):
        for conv, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
            kernel = conv.weight[:, :, 0, 0]
            x = torch.einsum("oc,chw->ohw", kernel, x) + conv.bias[:, None, None]
            scale = norm.weight / (norm.running_var + 1e-5).sqrt()
            x = (x - norm.running_mean[:, None, None]) * scale[:, None, None]
            x = x + norm.bias[:, None, None]
            x = x.clamp(min=0) if conv is layers[0] else x
        return x

    mean = x.mean(dim=(1, 2), keepdim=True)
    both = pointwise(weights.local_att, x) + pointwise(weights.global_att[1:], mean)
    return 1 / (1 + (-both).exp())


@pytest.mark.parametrize("is_iterative", [False, True])
def test_the_formula(is_iterative):
    torch.manual_seed(0)
    fusion = AttentionalFusion(8, 2, is_iterative).double().eval()
    for tensor in fusion.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.2)
    x, r = torch.randn(2, 8, 3, 3).double(), torch.randn(2, 8, 3, 3).double()
    for made, one, short in zip(fusion(x, r), x, r, strict=True):
        w = gate(fusion.gate, one + short)
        if is_iterative:  # both parts of the second gate are its own
            w = gate(fusion.gate2, one * w + short * (1 - w))
            expected = one * w + short * (1 - w)
        else:
            expected = 2 * one * w + 2 * short * (1 - w)
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "seresnet50", "resnetblur50"])
def test_with_an_addition_in_its_place_the_model_is_timms(name):
    """The rest of each block is timm's, attention and stochastic depth included."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, drop_path_rate=0.2, zero_init_last=False)
    model = copy.deepcopy(plain)
    for place in AFF.apply(model, 64).places:
        fusion = model.get_submodule(place)
        fusion.forward = lambda branch, shortcut: branch + shortcut
    images = torch.randn(4, 3, 64, 64)
    for one in (model, plain):
        torch.manual_seed(1)
        one(images).square().sum().backward()
    own = dict(model.named_parameters())
    for key, weight in plain.named_parameters():
        assert torch.equal(weight.grad, own[key].grad), key


def test_a_copy_is_the_same_and_every_weight_trains():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, zero_init_last=False)
    IAFF.apply(model, 64)
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model).eval()(images), model.eval()(images))
    model.train()(images).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "part", "what"),
    [
        ("test_convnext", AFF, "addition cannot be replaced"),
        ("resnet18", Aff(reduction=256, stages=4), "64 channels"),
    ],
)
def test_what_it_cannot_do_is_refused(name, part, what):
    with pytest.raises(ReplacementError, match=what):
        part.apply(timm.create_model(name), 64)
