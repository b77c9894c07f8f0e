"""What is frozen stays as it came, bit for bit; what is not trains as without it."""

import pytest
import torch

from support.plans import small_plan
from support.ranked import on_ranks, steps
from trainer.base.errors import PlanError, UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import build_model

PROBE = "'model.freeze={all_but: [head]}'"


def trained(overrides, first=0, until=3):
    """The state before any step, and the training state after some."""
    plan = small_plan(overrides=overrides)
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    loader = open_data(plan.profile, None).train_stream(plan, settings, first)
    for step in range(first, until):
        optimizer_step(state, loader, step)
    return before, state


def changed(before, state):
    after = state.model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}


def test_a_linear_probe_moves_the_classifier_alone():
    before, state = trained(PROBE)
    assert changed(before, state) == {"fc.weight", "fc.bias"}
    with_gradient = {
        name for name, weight in state.model.named_parameters() if weight.requires_grad
    }
    assert with_gradient == {"fc.weight", "fc.bias"}
    in_groups = sum(len(group["params"]) for group in state.optimizer.param_groups)
    assert in_groups == 2  # and so nothing is kept for the others in a checkpoint
    assert len(state.optimizer.state) == 2


def test_a_probe_sees_the_features_of_evaluation():
    """Frozen norms normalize by their running statistics: the head's gradient is that of features
    computed in eval mode.
    """
    _, state = trained(PROBE, until=1)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    state.model.train()
    state.freezing.set(1)
    found = state.model.forward_features(images)
    torch.testing.assert_close(found, state.model.eval().forward_features(images), rtol=0, atol=0)


def test_patterns_keep_weights_trained():
    before, state = trained("'model.freeze={all_but: [head, layer4.*]}'")
    moved = changed(before, state)
    weights = {name for name, _ in state.model.named_parameters()}
    assert moved & weights == {n for n in weights if n.startswith(("layer4.", "fc."))}
    assert not any(name.startswith(("bn1", "layer1")) for name in moved)  # nor running statistics


def test_until_an_epoch_all_is_still_and_then_moves():
    until = small_plan(overrides=PROBE).steps_per_epoch
    overrides = "'model.freeze={all_but: [head], until_epochs: 0.05}'"
    last = -(-until * 5 // 100)
    before, state = trained(overrides, until=last)
    assert changed(before, state) == {"fc.weight", "fc.bias"}
    before, state = trained(overrides, until=last + 1)
    first = next(name for name, _ in state.model.named_parameters())
    assert {first, "bn1.weight", "bn1.running_mean"} <= changed(before, state)


UNTIL = "'model.freeze={all_but: [head], until_epochs: 0.05}'"
FROM = "'model.freeze={all_but: [head], from_epochs: 0.05}'"


def test_from_an_epoch_on_all_but_some_is_still():
    first = -(-small_plan(overrides=FROM).steps_per_epoch * 5 // 100)
    before, state = trained(FROM, until=first)
    first_weight = next(name for name, _ in state.model.named_parameters())
    assert {first_weight, "bn1.weight", "bn1.running_mean"} <= changed(before, state)
    then = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    loader = open_data(state.plan.profile, None).train_stream(state.plan, state.settings, first)
    for step in range(first, first + 2):
        optimizer_step(state, loader, step)
    assert changed(then, state) == {"fc.weight", "fc.bias"}  # not by momentum or decay either


@pytest.mark.parametrize("overrides", [UNTIL, FROM])
@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_state_saved_while_frozen_resumes_to_the_same_bits(overrides, stopped_at):
    plan, settings = small_plan(overrides=overrides), make_settings("cpu", workers="0")
    _, whole = trained(overrides, until=6)
    _, stopped = trained(overrides, until=stopped_at)
    resumed = TrainingState(plan, settings)
    resumed.load_state_dict(stopped.state_dict())
    loader = open_data(plan.profile, None).train_stream(plan, settings, stopped_at)
    for step in range(stopped_at, 6):
        optimizer_step(resumed, loader, step)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("overrides", [UNTIL, FROM])
def test_two_ranks_train_what_one_does(overrides):
    given = "A2", "test_resnet", f"{overrides} batch.images=64", 0, 6
    (alone,), pair = (on_ranks(steps, number, *given) for number in (1, 2))
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(pair[0]["weights"][name], tensor, rtol=1e-4, atol=1e-6)


def test_frozen_statistics_stay_to_the_bit_on_three_ranks():
    """A third of a number, three times, is not always that number."""
    overrides = f"{PROBE} batch.images=24 batch.norm_images=8"
    before, _ = trained(overrides, until=0)
    for rank in on_ranks(steps, 3, "A2", "test_resnet", overrides, 0, 3):
        for name, tensor in rank["buffers"].items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("names", ["[layer9.*]", '["*"]'])
def test_what_cannot_be_frozen_is_refused(names):
    with pytest.raises(PlanError) as error:
        build_model(small_plan(overrides=f"'model.freeze={{all_but: {names}}}'"))
    assert error.value.path[:2] == ("model", "freeze") and error.value.hint


def test_frozen_until_and_from_are_one_or_the_other():
    with pytest.raises(UserError) as error:
        small_plan(overrides="'model.freeze={all_but: [head], until_epochs: 1, from_epochs: 2}'")
    assert "from_epochs" in str(error.value)
