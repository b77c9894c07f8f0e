"""The average of the weights against timm's and torchvision's."""

import copy

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from trainer.components.averaging import Ema, Lookahead


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def moved(model, step):
    """The model after another optimizer step, made up, and one more pass of BatchNorm."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        model.train()(torch.randn(4, 3, 6, 6, generator=generator))
    return model


@pytest.fixture
def model():
    return moved(small_model(), 1000)


def assert_same_floats(ours, theirs):
    for (name, own), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        if own.is_floating_point():
            torch.testing.assert_close(
                own, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("foreach", [False, True])
def test_equals_timms_average_buffers_included(model, foreach):
    timms = ModelEmaV3(model, decay=0.9, foreach=foreach)
    ours = Ema(decay=0.9, every_steps=1).start(model)
    for step in range(20):
        moved(model, step)
        timms.update(model)
        ours.update(model, step, 5, 64, 10, 10)
    assert_same_floats(ours.model, timms.module)
    assert ours.model[1].num_batches_tracked == timms.module[1].num_batches_tracked == 21


@pytest.mark.parametrize(
    "steps_per_epoch", [8, 10]
)  # with 10, counting the run's steps would be another rule
@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize(("decay", "batch_images"), [(0.999, 64), (0.99998, 1024), (0.9, 1024)])
def test_equals_torchvisions_adjusted_average(
    model, warmup_epochs, decay, batch_images, steps_per_epoch
):
    """Its classification reference: the adjusted decay, an update every 4 steps, the count reset in
    the warm-up.
    """
    epochs, every_steps = 5, 4
    share = min(1.0, (1 - decay) * batch_images * every_steps / epochs)
    visions = AveragedModel(
        model, avg_fn=lambda old, new, count: (1 - share) * old + share * new, use_buffers=True
    )
    rule = Ema(decay=decay, every_steps=every_steps, adjusted=True, restarts_in_warmup=True)
    ours = rule.start(model)
    for epoch in range(epochs):
        for inner in range(steps_per_epoch):
            step = epoch * steps_per_epoch + inner
            moved(model, step)
            if inner % every_steps == 0:
                visions.update_parameters(model)
                if epoch < warmup_epochs:
                    visions.n_averaged.fill_(0)
            ours.update(
                model, step, warmup_epochs * steps_per_epoch, batch_images, epochs, steps_per_epoch
            )
            assert_same_floats(ours.model, visions.module)


def test_torchvisions_numbers_are_the_published_ones():
    rule = Ema(decay=0.99998, every_steps=32, adjusted=True, restarts_in_warmup=True)
    assert 1 - rule.weight_at(256 * 1251, 6255, 1024, 600, 1251) == pytest.approx(
        0.998908, abs=1e-6
    )


def test_updates_come_every_so_many_steps_of_an_epoch():
    rule = Ema(decay=0.9, every_steps=3)
    weights = [rule.weight_at(step, 0, 64, 10, 5) for step in range(10)]
    assert [step for step, weight in enumerate(weights) if weight is not None] == [0, 3, 5, 8]
    assert weights[8] == pytest.approx(0.1)


def test_the_average_is_a_copy_that_takes_no_gradients_and_is_in_eval_mode(model):
    before = copy.deepcopy(model.state_dict())
    average = Ema(decay=0.5, every_steps=1).start(model)
    moved(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert not any(weight.requires_grad for weight in average.model.parameters())
    assert not any(module.training for module in average.model.modules())
    assert model.training and all(weight.requires_grad for weight in model.parameters())


def test_a_saved_average_goes_on_bit_for_bit(model):
    rule = Ema(decay=0.9, every_steps=2, restarts_in_warmup=True)
    straight, halted = rule.start(model), rule.start(model)
    for step in range(12):
        moved(model, step)
        straight.update(model, step, 3, 64, 10, 5)
        halted.update(model, step, 3, 64, 10, 5)
        saved = copy.deepcopy(halted.state_dict())
        halted = rule.start(small_model_like(model))
        halted.load_state_dict(saved)
    for own, other in zip(
        straight.state_dict().values(), halted.state_dict().values(), strict=True
    ):
        assert torch.equal(own, other)


def small_model_like(model):
    """A model of the same shapes with other weights."""
    return moved(copy.deepcopy(model), 77)


def test_a_channels_last_resnet_is_averaged_like_any_other():
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=4)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    averages = [Ema(decay=0.9, every_steps=1).start(model) for model in (plain, last)]
    for average, model in zip(averages, (plain, last), strict=True):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        average.update(model, 0, 0, 64, 10, 5)
    assert_same_floats(averages[0].model, averages[1].model)


@pytest.mark.parametrize(
    "changes",
    [
        {"decay": 0.0},
        {"decay": 1.0},
        {"decay": 99.998},
        {"every_steps": 0},
        {"every_steps": 1.5},
        {"step": 2},
    ],
)
def test_absurd_pages_are_refused(changes):
    with pytest.raises(ValidationError):
        Ema.model_validate({"decay": 0.9, "every_steps": 1, **changes})


@pytest.mark.parametrize(("batch_images", "epochs"), [(16, 100), (23, 100), (1024, 600)])
def test_a_shortened_adjusted_average_has_a_decay_whatever_the_batch(batch_images, epochs):
    """In batches of 16 over 100 epochs the adjusted form would need a decay below 0."""
    rule = Ema(decay=0.99998, every_steps=32, adjusted=True)
    scaled = rule.scaled((750_000, 100 * epochs), (1024, batch_images), (600, epochs))
    weight = scaled.weight_at(0, 0, batch_images, epochs, 100)
    assert 0 < scaled.decay < 1 and 0.001 < weight <= 0.5


@pytest.mark.parametrize("power", [None, 3.0])
def test_lookahead_is_its_formula(power):
    """Slow and fast weights in float64; the last step of 2 epochs of 8 is no fifth one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    rule = Lookahead(decay=0.7, every_steps=5, power=power)
    average = rule.start(model)
    slow = {k: v.double().clone() for k, v in model.state_dict().items()}
    fast = {k: v.clone() for k, v in slow.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(16):
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                moved_by = torch.randn(tensor.shape, generator=generator)
                tensor.add_(moved_by)
                fast[key] = fast[key] + moved_by.double()
        average.update(model, step, 0, 64, 2, 8)
        done = step + 1
        for key in fast if done % 5 == 0 else ():
            kept = 0.7 * (done / 16) ** (power or 0)
            slow[key] = kept * slow[key] + (1 - kept) * fast[key]
            fast[key] = slow[key]
    fast = slow
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), fast[key], rtol=1e-5, atol=1e-5)
            assert torch.equal(tensor, average.model.state_dict()[key])
