"""A model's own classes are found by what they are subclasses of, or by being registered."""

import pytest
from timm.layers import LayerNorm2d
from torch import nn

from trainer.models.edit.layer_kinds import NORMS, LayerKind
from trainer.models.edit.replacement import find_layers, is_activation, is_norm


class Own2dNorm(LayerNorm2d):
    """Given [B, C, H, W], and not called so."""

    def __init__(self, num_channels):
        super().__init__(num_channels)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(NORMS, "_classes", NORMS._classes)
    NORMS.register(Centred)


def small(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2),
        norm,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )


def test_a_norm_of_ones_own_is_found_by_its_base_class():
    (place,) = find_layers(small(Own2dNorm(5))).norms
    assert (place.name, place.num_channels, place.is_channels_last, place.activation) == (
        "1",
        5,
        False,
        "2",
    )


def test_a_class_without_a_base_in_common_is_found_once_it_is_registered(registered):
    (place,) = find_layers(small(Centred())).norms
    assert (place.name, place.num_channels) == ("1", 5)


def test_a_class_that_is_not_registered_is_no_norm():
    assert not find_layers(small(Centred())).norms


def test_a_registered_class_counts_with_its_subclasses():
    kind = LayerKind(nn.ReLU)
    assert kind.register(Centred) is Centred
    more = type("More", (Centred,), {})
    assert kind.has(more()) and kind.has(nn.ReLU()) and not kind.has(nn.Sigmoid())


def test_gates_are_no_activations_of_a_body():
    assert not any(
        map(is_activation, [nn.Sigmoid(), nn.Softmax(dim=1), nn.Hardsigmoid(), nn.Tanh()])
    )
    assert (
        is_activation(nn.SiLU())
        and is_norm(nn.SyncBatchNorm(1))
        and not is_norm(nn.Conv2d(1, 1, 1))
    )
