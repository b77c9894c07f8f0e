"""Adaptive clipping against timm's; the global norm's clipping is tested with the optimizers."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from trainer.components.clipping import clip_adaptively, clip_values


def with_gradients(model, size):
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.grad = (
            torch.randn(weight.shape, generator=generator)
            * size
            * torch.rand(1, generator=generator)
        )
    return model


@pytest.mark.parametrize("most", [1e-4, 0.1, 100.0])
def test_values_are_cut_as_torch_cuts_them(most):
    model = timm.create_model("test_resnet", num_classes=7)
    other = with_gradients(copy.deepcopy(model), 1.0)
    for ours, theirs in zip(
        with_gradients(model, 1.0).parameters(), other.parameters(), strict=True
    ):
        ours.grad = theirs.grad.clone()
    next(model.parameters()).grad = next(other.parameters()).grad = None
    clip_values(model.parameters(), most)
    nn.utils.clip_grad_value_(other.parameters(), most)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_gradients_are_cut_as_timm_cuts_them(name, size):
    """Outside timm's own `exclude_head`, which takes the last two weights for the head, as they are
    here.
    """
    torch.manual_seed(0)
    model = with_gradients(timm.create_model(name, num_classes=7), size)
    timms = copy.deepcopy(model)
    for weight, other in zip(model.parameters(), timms.parameters(), strict=False):
        other.grad = weight.grad.clone()
    adaptive_clip_grad(list(timms.parameters())[:-2], 0.01)
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    clip_adaptively(model, 0.01)
    for (_, weight), other in zip(model.named_parameters(), timms.parameters(), strict=False):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-5, atol=0)
    head = model.get_classifier()
    assert torch.equal(
        head.weight.grad,
        before["head.fc.weight" if "convnext" in model.__class__.__name__.lower() else "fc.weight"],
    )
    if size == 1.0:
        assert any(
            not torch.equal(weight.grad, before[name]) for name, weight in model.named_parameters()
        )


def test_no_unit_keeps_more_than_its_share():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    with_gradients(model, 10.0)
    head = model[-1].weight.grad.clone()
    model[0].bias.grad = None
    clip_adaptively(model, 0.02)
    for weight in (model[0].weight, model[2].weight):
        units, slopes = (
            part.detach().double().numpy().reshape(len(weight), -1)
            for part in (weight, weight.grad)
        )
        share = np.linalg.norm(slopes, axis=1) / np.maximum(np.linalg.norm(units, axis=1), 1e-3)
        np.testing.assert_allclose(share, 0.02, rtol=1e-5)
    assert torch.equal(model[-1].weight.grad, head) and model[0].bias.grad is None


def test_weights_and_gradients_of_zero_stay_numbers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    model[0].weight.grad, model[0].bias.grad = torch.ones(3, 3), torch.zeros(3)
    clip_adaptively(model, 0.01)
    assert model[0].weight.grad.norm(dim=1).tolist() == pytest.approx([1e-5] * 3, rel=1e-4)
    assert model[0].bias.grad.tolist() == [0, 0, 0]
