"""Every optimizer of timm: a step as timm's own factory takes it, fields checked, a resume that
changes nothing.
"""

import io

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from trainer.components import timm_optimizer
from trainer.components.optimizers import Optimizer, TimmOptimizer
from trainer.components.param_groups import param_groups


def is_here(name):
    try:
        timm_optimizer.class_of(name)
    except ValueError:
        return False
    return True


HERE = [name for name in list_optimizers() if is_here(name)]


def numbers_of(name):
    """timm's own numbers, but with momentum where there is one, for Nesterov's needs it."""
    found = timm_optimizer.numbers_of(name)
    return {**found, **({"momentum": 0.9} if "momentum" in found else {})}


def page_of(name):
    return TimmOptimizer(
        optimizer=name, fields=numbers_of(name), weight_decay=0.02, no_decay=("vectors",)
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def take_steps(model, optimizer, numbers):
    for number in numbers:
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - number / 10)
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model, other):
    for (name, weight), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=False
    ):
        torch.testing.assert_close(weight, theirs, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", HERE)
def test_steps_are_those_of_timms_factory_and_a_resume_changes_nothing(name):
    page, ours, theirs, halted = page_of(name), network(), network(), network()
    take_steps(ours, page.build(param_groups(ours, page), 0.01), range(4))
    take_steps(
        theirs,
        create_optimizer_v2(theirs, name, lr=0.01, weight_decay=0.02, **numbers_of(name)),
        range(4),
    )
    assert_same(ours, theirs)
    saved = page.build(param_groups(halted, page), 0.01)
    take_steps(halted, saved, range(2))
    stored = io.BytesIO()
    torch.save(saved.state_dict(), stored)
    resumed = page.build(param_groups(halted, page), 0.01)
    resumed.load_state_dict(torch.load(io.BytesIO(stored.getvalue()), weights_only=True))
    assert_same(take_steps(halted, resumed, range(2, 4)), ours)


@pytest.mark.parametrize("name", ["muon", "nadamuon"])
def test_muon_leaves_the_classifier_to_adamw_as_timms_fallback_list(name):
    ours, theirs = network(), network()
    for by in ({"fallback_classifier": True}, {"fallback_names": ("5.weight", "5.*")}):
        page = page_of(name).model_copy(update=by)
        ours = network()
        ours.get_classifier = lambda ours=ours: ours[5]
        groups = param_groups(ours, page)
        assert sum(group.get("use_fallback", False) for group in groups) == 2
        take_steps(ours, page.build(groups, 0.01), range(4))
        theirs = network()
        other = create_optimizer_v2(
            theirs, name, lr=0.01, weight_decay=0.02, fallback_list=["5.*"], **numbers_of(name)
        )
        assert_same(ours, take_steps(theirs, other, range(4)))
    plain = network()
    take_steps(plain, page_of(name).build(param_groups(plain, page_of(name)), 0.01), range(4))
    assert not torch.allclose(plain[5].weight, ours[5].weight)


def test_an_optimizer_of_one_rule_has_no_fallback():
    with pytest.raises(ValidationError, match="one rule"):
        TimmOptimizer(
            optimizer="lion", fields=numbers_of("lion"), weight_decay=0.0, fallback_classifier=True
        )


def test_what_is_left_out_needs_what_is_not_here():
    left_out = set(list_optimizers()) - set(HERE)
    assert left_out == {
        name for name in list_optimizers() if name.startswith(("bnb", "fused", "kron"))
    } | {"adahessian"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "lions"}, "timm has no optimizer 'lions' .did you mean lion"),
        ({"optimizer": "fusedlamb"}, "of the package apex"),
        ({"optimizer": "adahessian"}, "second derivatives"),
        ({"optimizer": "kron"}, "random numbers of its own"),
        ({"optimizer": "lion"}, r"fields has no betas .timm: \[0.9, 0.99\].; write it"),
        ({"optimizer": "adamw", "fields": {"eps": 1e-8}}, "fields has no betas"),
        (
            {"optimizer": "lion", "fields": {"beta": (0.9, 0.99)}},
            "no field 'beta' .did you mean betas",
        ),
        (
            {"optimizer": "lion", "fields": {"betas": (0.9, 0.99), "lr": 1.0}},
            "no field 'lr'; there are betas, caution",
        ),
        ({"optimizer": "lion", "fields": {"betas": "high"}}, "takes no betas 'high'"),
        ({"optimizer": "lion", "fields": {"betas": (0.9, 0.99, 0.9)}}, "takes no betas"),
        (
            {"optimizer": "lion", "fields": {"betas": (0.9, 0.99), "caution": 1}},
            "takes no caution 1",
        ),
        (
            {"optimizer": "sgd", "fields": {"momentum": 0.0, "dampening": 0.0}},
            "refuses its fields: Nesterov momentum",
        ),
        ({"optimizer": "lion", "fields": {"betas": (0.9, 1.5)}}, "refuses its fields"),
    ],
)
def test_what_timm_does_not_have_is_refused_in_one_line(fields, words):
    with pytest.raises(ValidationError, match=words) as refusal:
        TypeAdapter(Optimizer).validate_python({"name": "timm", "weight_decay": 0.01, **fields})
    assert all("\n" not in error["msg"] for error in refusal.value.errors())
