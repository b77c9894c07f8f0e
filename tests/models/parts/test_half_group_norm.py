"""Group norms in half precision: statistics are float32's, only the ends are rounded."""

import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.transforms import autocast
from trainer.engine.state import as_it_runs
from trainer.models.build import build_model
from trainer.models.parts.half_group_norm import group_norm, use_half_group_norm
from trainer.models.parts.norm_layers import BatchChannelNorm2d


def by_loops(x, groups: int, weight, bias, slope):
    """(y, gradients of x, weight and bias) in float64, image by image and group by group."""
    x, weight, bias, slope = (np.asarray(each, np.float64) for each in (x, weight, bias, slope))
    y, of_x = np.zeros_like(x), np.zeros_like(x)
    of_weight, of_bias, size = np.zeros_like(weight), slope.sum((0, 2, 3)), x.shape[1] // groups
    for image in range(len(x)):
        for first in range(0, x.shape[1], size):
            part = slice(first, first + size)
            deviation = np.sqrt(x[image, part].var() + 1e-5)
            normal = (x[image, part] - x[image, part].mean()) / deviation
            gamma = weight[part, None, None]
            y[image, part] = normal * gamma + bias[part, None, None]
            of_weight[part] += (slope[image, part] * normal).sum((1, 2))
            along = slope[image, part] * gamma
            of_x[image, part] = (
                along - along.mean() - normal * (along * normal).mean()
            ) / deviation
    return y, of_x, of_weight, of_bias


def drawn(num_images: int, num_channels: int, px: int, mean: float, dtype=torch.bfloat16):
    """(x, weight, bias, slope), x and slope as a half type holds them, channels_last."""
    torch.manual_seed(0)
    x, slope = (torch.randn(num_images, num_channels, px, px) for _ in range(2))
    x, slope = (
        each.to(dtype).contiguous(memory_format=torch.channels_last) for each in (x + mean, slope)
    )
    return x, torch.randn(num_channels), torch.randn(num_channels), slope


def found_by(norm, x, groups, weight, bias, slope):
    given = [
        x.clone().requires_grad_(),
        *(each.clone().requires_grad_() for each in (weight, bias)),
    ]
    y = norm(given[0], groups, given[1], given[2], 1e-5)
    y.backward(slope)
    return y, *(each.grad for each in given)


def compare(norm, num_images, num_channels, groups, px, mean, dtype=torch.bfloat16) -> None:
    x, weight, bias, slope = drawn(num_images, num_channels, px, mean, dtype)
    found = found_by(norm, x, groups, weight, bias, slope)
    assert [each.dtype for each in found] == [dtype] * 2 + [torch.float32] * 2
    exact = by_loops(x.float(), groups, weight, bias, slope.float())
    rounded = 1.001 * torch.finfo(dtype).eps / 2  # to the nearest
    # all but rounding of y and of the gradient of x is float32's
    for each, other, most in zip(found, exact, (rounded, rounded, 1e-4, 1e-4), strict=True):
        distance = np.abs(each.detach().double().numpy() - other)
        assert (distance <= most * np.maximum(np.abs(other), np.abs(other).std())).all()


SHAPES = [  # images, channels, groups, px, mean: groups of 3, places and channels left over
    (2, 96, 32, 7, 0.0),
    (1, 64, 2, 12, 20.0),
    (3, 8, 8, 3, -5.0),
    (1, 130, 1, 6, 1.0),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_cpu_only_the_ends_are_rounded(shape):
    compare(group_norm, *shape)


def test_the_kernels_of_a_gpu_round_only_the_ends():
    """Interpreted, each program after the other."""
    pytest.importorskip("triton")  # torch's wheels for a CPU bring none
    code = "from models.parts import test_half_group_norm as own; own.compare_kernels()"
    folder = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    path = os.pathsep.join([folder, os.path.dirname(folder)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def compare_kernels() -> None:
    from trainer.models.parts.group_norm_kernels import HalfGroupNorm  # needs Triton

    for shape in SHAPES:  # of fp16, as the interpreter cuts bf16 off
        compare(HalfGroupNorm.apply, *shape, torch.float16)


def test_layers_keep_their_weights_and_copies_are_in_half_too():
    model = nn.Sequential(nn.GroupNorm(2, 8), BatchChannelNorm2d(8, 2, 1e-5, 0.1, "batch"))
    names, image = list(model.state_dict()), torch.randn(2, 8, 4, 4)
    plain = model(image)
    assert use_half_group_norm(model) == 2
    assert list(model.state_dict()) == names and torch.equal(model(image), plain)  # of float32
    with torch.autocast("cpu", torch.bfloat16):
        assert deepcopy(model)(image.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu_stub
@pytest.mark.parametrize("is_half", [False, True])
def test_a_run_has_it_where_its_settings_say_so(is_half):
    plan = small_plan("gn-ws", "resnet18")
    settings = make_settings("cuda", "bf16", workers="0", half_group_norm=is_half)
    model, seen = as_it_runs(build_model(plan), settings, 32), []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    with autocast(settings):
        model(torch.randn(2, 3, 32, 32, device="cuda"))
    assert set(seen) == {torch.bfloat16 if is_half else torch.float32}


@pytest.mark.gpu_stub
def test_a_gpu_runs_its_kernels():
    from support.gpu_stub.watch import counts  # needs the library

    x, weight, bias, slope = (each.cuda() for each in drawn(2, 96, 7, 0.0))
    found_by(group_norm, x, 32, weight, bias, slope)
    before = counts()
    found = found_by(group_norm, x, 32, weight, bias, slope)
    assert [each.dtype for each in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert (counts() - before)["launches"] < 30
