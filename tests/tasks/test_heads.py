"""Heads of segmentation against torchvision's modules and plain references, weights copied."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from trainer.base.errors import PlanError
from trainer.tasks.segmentation.heads import AllMlp, DeepLabV3, Fcn, PyramidPooling, RefineNet
from trainer.tasks.segmentation.model import with_heads

CHANNELS = (8, 12, 16, 24)


def features(height=16, width=20):
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, channels, -(-height // 2**i), -(-width // 2**i), generator=random)
        for i, channels in enumerate(CHANNELS)
    ]


def settled(module: nn.Module) -> nn.Module:
    """Weights and running statistics that are not those of a start, in evaluation mode."""
    random = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=random) * 0.4 + 0.1)
    return module.eval()


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Weights in the order of their names: the same shapes, one after the other."""
    mine, others = ours.state_dict(), theirs.state_dict()
    assert [tuple(one.shape) for one in mine.values()] == [
        tuple(one.shape) for one in others.values()
    ]
    ours.load_state_dict(dict(zip(mine, others.values(), strict=True)))


def test_deeplab_is_torchvisions():
    theirs = settled(DeepLabHead(24, 5, (2, 4, 6)))
    ours = DeepLabV3(rates=(2, 4, 6), channels=256, dropout=0.5).build(CHANNELS, 5).eval()
    copied(ours, theirs)
    maps = features()
    with torch.no_grad():
        torch.testing.assert_close(ours(maps), theirs(maps[-1]), rtol=1e-5, atol=1e-5)


def test_fcn_is_torchvisions():
    theirs = settled(FCNHead(24, 5))
    ours = Fcn(dropout=0.1).build(CHANNELS, 5).eval()
    copied(ours, theirs)
    maps = features()
    with torch.no_grad():
        torch.testing.assert_close(ours(maps), theirs(maps[-1]), rtol=1e-5, atol=1e-5)


def normed(maps, state, name):
    weight, bias, mean, variance = (
        state[f"{name}.{key}"].double().view(1, -1, 1, 1)
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (maps - mean) / (variance + 1e-5).sqrt() * weight + bias


def test_segformers_head_is_a_plain_reference():
    """Each map by a matrix product, repeated bilinearly, the coarsest first; in float64."""
    head = settled(AllMlp(channels=6, dropout=0.1).build(CHANNELS, 5))
    state, maps, size = head.state_dict(), features(), (16, 20)
    found = []
    for i, one in enumerate(maps):
        weight = state[f"layers.{i}.weight"].double()[:, :, 0, 0]
        mixed = torch.einsum("oc,bchw->bohw", weight, one.double())
        mixed = mixed + state[f"layers.{i}.bias"].double().view(1, -1, 1, 1)
        found.insert(0, functional.interpolate(mixed, size, mode="bilinear", align_corners=False))
    joined = torch.einsum(
        "oc,bchw->bohw", state["joined.0.weight"].double()[:, :, 0, 0], torch.cat(found, 1)
    )
    joined = normed(joined, state, "joined.1").clamp(min=0)
    expected = torch.einsum(
        "oc,bchw->bohw", state["classifier.weight"].double()[:, :, 0, 0], joined
    ) + state["classifier.bias"].double().view(1, -1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(head(maps).double(), expected, rtol=1e-5, atol=1e-4)


def test_pyramid_pooling_pools_over_grids():
    """Means over a grid's cells by a loop, for a size that its bins divide."""
    head = settled(PyramidPooling(bins=(1, 2), channels=7, dropout=0.1).build((24,), 5))
    maps, state = torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(0)), None
    state = head.state_dict()
    branches = [maps.double()]
    for place, bins in ((1, 1), (2, 2)):
        cells = np.zeros((2, 24, bins, bins))
        for row in range(bins):
            for column in range(bins):
                step = 4 // bins
                part = maps[
                    :, :, row * step : (row + 1) * step, column * step : (column + 1) * step
                ]
                cells[:, :, row, column] = part.double().mean((2, 3)).numpy()
        name = f"0.branches.{place}.convolved"
        weight = state[f"{name}.0.weight"].double()[:, :, 0, 0]
        mixed = torch.einsum("oc,bchw->bohw", weight, torch.from_numpy(cells))
        mixed = normed(mixed, state, f"{name}.1").clamp(min=0)
        branches.append(functional.interpolate(mixed, (4, 4), mode="bilinear", align_corners=False))
    joined = functional.conv2d(torch.cat(branches, 1), state["1.0.weight"].double(), padding=1)
    joined = normed(joined, state, "1.1").clamp(min=0)
    expected = functional.conv2d(joined, state["3.weight"].double(), state["3.bias"].double())
    with torch.no_grad():
        torch.testing.assert_close(head([maps]).double(), expected, rtol=1e-5, atol=1e-3)


def test_refinenet_is_a_plain_reference():
    """Each path by single operations in float64: pooled by numpy, convolved as a sum of shifts."""
    head = settled(RefineNet(channels=4, coarsest_channels=6, num_pools=2, dropout=0.5).build(
        CHANNELS, 5
    ))  # fmt: skip
    for tensor in head.state_dict().values():
        tensor.sub_(0.3).mul_(0.3)  # both signs, so that a ReLU counts
    state, maps = head.state_dict(), features()

    def convolved(given, name):
        weight = state[f"{name}.weight"].double().numpy()
        height, width = given.shape[2:]
        padded = np.pad(given, ((0, 0), (0, 0), (1, 1), (1, 1)))
        found = sum(
            np.einsum(
                "oc,bchw->bohw",
                weight[:, :, down, right],
                padded[:, :, down : down + height, right : right + width],
            )
            for down in range(3)
            for right in range(3)
        )
        bias = state.get(f"{name}.bias")
        return found if bias is None else found + bias.double().numpy()[:, None, None]

    def unit(given, name):
        inner = convolved(np.maximum(given, 0), f"{name}.first")
        return given + convolved(np.maximum(inner, 0), f"{name}.second")

    def largest(given):
        padded = np.pad(given, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (2, 3))
        return windows.max((4, 5))

    refined = None
    for place in (3, 2, 1, 0):
        own = convolved(maps[place].double().numpy(), f"adapted.{place}.0")
        own = unit(unit(own, f"adapted.{place}.1"), f"adapted.{place}.2")
        if refined is not None:
            coarser = torch.from_numpy(convolved(refined, f"coarser.{place}"))
            size = own.shape[2:]
            coarser = functional.interpolate(coarser, size, mode="bilinear", align_corners=False)
            own = convolved(own, f"own.{place}") + coarser.numpy()
        refined = part = np.maximum(own, 0)
        for link in range(2):
            part = convolved(largest(part), f"refined.{place}.0.chain.{link}.1")
            refined = refined + part
        for number in (1, 2, 3):
            refined = unit(refined, f"refined.{place}.{number}")
    expected = torch.from_numpy(convolved(refined, "classifier"))
    with torch.no_grad():
        found = head(maps).double()
    assert found.shape == (2, 5, 16, 20) and found.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_refinenet_has_as_many_weights_as_the_published_one():
    """ResNet-101's maps: the head of the authors' published model, counted from its layers."""
    head = RefineNet(channels=256, coarsest_channels=512, num_pools=4, dropout=0.5)
    own = head.build((256, 512, 1024, 2048), 21)
    square = 9 * 256 * 256
    unit, wide = 2 * square + 256, 9 * 512 * 512
    coarsest = 9 * 2048 * 512 + 5 * (2 * wide + 512) + 4 * wide + 9 * 512 * 256
    others = 3 * (5 * unit + 4 * square + square) + 2 * square + 9 * 256 * (1024 + 512 + 256)
    assert sum(one.numel() for one in own.parameters()) == (
        coarsest + others + 9 * 256 * 21 + 21
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext", "test_efficientnet", "pvt_v2_b0", "mobilenetv3_small_050"],
)
@pytest.mark.parametrize(
    "head",
    [
        AllMlp(channels=8, dropout=0.0),
        RefineNet(channels=8, coarsest_channels=16, num_pools=2, dropout=0.0),
    ],
    ids=["segformer", "refinenet"],
)
def test_on_any_backbone_all_weights_learn_and_sizes_are_those_of_the_images(name, head):
    model = with_heads(name, timm.create_model(name, num_classes=4), head, 4, True).train()
    images = torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    main, aux = model(images)
    assert main.shape == aux.shape == (2, 4, 70, 90)
    (main.square().mean() + aux.square().mean()).backward()
    silent = [key for key, one in model.named_parameters() if one.grad is None]
    assert not silent
    model.eval()
    with torch.no_grad():
        assert model(images).shape == (2, 4, 70, 90)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_resnet_is_dilated_to_its_output_stride(stride):
    body = timm.create_model("resnet18", num_classes=4, output_stride=stride)
    model = with_heads("resnet18", body, Fcn(dropout=0.1), 4, False).eval()
    sizes = []
    model.heads["main"].register_forward_pre_hook(lambda _, given: sizes.append(given[0][-1].shape))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert sizes[0][-1] == 64 // stride


def test_a_model_without_feature_maps_is_refused():
    with pytest.raises(PlanError, match="feature maps"):
        with_heads("plain", nn.Linear(2, 2), Fcn(dropout=0.1), 4, False)
