"""On small maps a convolution leaves out the taps that only padding would meet: the same numbers,
exact zeros elsewhere.
"""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from support.pieced import relative
from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.engine.state import TrainingState
from trainer.models.parts.standardize import StandardizedConv2d
from trainer.models.small_maps import leave_out_padding_taps, used_taps

SHAPES = list(itertools.product((1, 2, 3, 4, 5, 8), (3, 5, 7), (1, 2, 4), (0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [one for one in SHAPES if one[0] + 2 * one[3] >= one[1]],
)
def test_a_tap_is_left_out_only_where_no_output_uses_it(size, kernel, stride, padding):
    first, end, needed = used_taps(size, kernel, stride, padding)
    images = torch.arange(1.0, size + 1).view(1, 1, size, 1)
    whole = torch.nn.functional.unfold(
        images, (kernel, 1), stride=(stride, 1), padding=(padding, 0)
    )  # [1, kernel, outputs]
    part = torch.nn.functional.unfold(
        images, (end - first, 1), stride=(stride, 1), padding=(needed, 0)
    )
    assert torch.equal(whole[:, first:end], part)
    assert not whole[:, :first].any() and not whole[:, end:].any()
    if padding == kernel // 2 and stride == 1:  # as in most models: all that can be is left out
        assert end - first == min(kernel, 2 * size - 1)


def layers():
    for groups, kernel, stride in itertools.product((1, 8), (3, 7), (1, 2)):
        yield nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups, bias=groups == 1)
    yield nn.Conv2d(8, 16, (1, 5), 1, (0, 2))
    yield nn.Conv2d(8, 16, 3, 1, 2, dilation=2)
    yield nn.Conv2d(8, 16, 3, 1, 1, padding_mode="circular")
    yield nn.Conv2d(8, 16, 3, 1, "same")


@pytest.mark.parametrize("layer", layers(), ids=str)
@pytest.mark.parametrize("px", [3, 2, 1])
def test_results_and_gradients_are_torchs(layer, px):
    layer = copy.deepcopy(layer).double()
    other = copy.deepcopy(layer)
    leave_out_padding_taps(other)
    images = torch.randn(4, 8, px, px, dtype=torch.float64, requires_grad=True)
    found = []
    for one in (layer, other):
        images.grad = None
        made = one(images)
        (
            made * torch.linspace(-1, 1, made.numel(), dtype=torch.float64).view_as(made)
        ).sum().backward()
        found.append((made.detach(), images.grad.clone(), one.weight.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0][2] == 0, found[1][2] == 0)


def test_it_is_in_every_run_on_a_cpu_and_its_copies_and_evaluations_are_their_own():
    plan = small_plan(
        overrides="average='{name: ema, decay: 0.9, every_steps: 1}' "
        "'model={norm: {name: group_norm, groups: 4, eps: 1e-5}, weight_standardization: "
        "{name: weight_standardization, of: all, depthwise: false, eps: 1e-5, eps_place: inside, "
        "variance: biased}}'"
    )
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    assert any(
        isinstance(module, StandardizedConv2d) and "_conv_forward" in vars(module)
        for module in state.model.modules()
    )
    for module, copied in zip(state.model.modules(), state.average.model.modules(), strict=True):
        if "_conv_forward" in vars(module):
            assert copied._conv_forward.__self__ is copied
    plain = timm.create_model("test_resnet", num_classes=10).eval()
    other = copy.deepcopy(plain)
    leave_out_padding_taps(other)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), other(images))


def test_a_step_of_a_resnet_at_32_px_has_the_same_gradients():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    images, found = torch.randn(4, 3, 32, 32), []
    for _ in range(2):
        model.zero_grad()
        model(images).square().mean().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        leave_out_padding_taps(model)
    assert relative(*found) < 1e-5
