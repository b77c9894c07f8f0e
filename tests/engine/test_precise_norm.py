"""Statistics over images do not depend on how a step is cut, and are exact where the recipe asks for
it.
"""

import signal
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.base.signals import Stopped, StopRequest
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate
from trainer.engine.null_run import NullRun
from trainer.engine.precise_norm import StepStatistics, make_norms_precise, statistics_note
from trainer.engine.state import TrainingState
from trainer.engine.train import evaluate_epoch
from trainer.models.parts import norms
from trainer.models.parts.norm_layers import BatchChannelNorm2d, EstimatedBatchNorm2d
from trainer.tasks import task_of

PRECISE = "precise_norm='{images: 24}' "


@pytest.fixture(scope="module")
def opened():
    return open_data(small_plan().profile, None)


@pytest.fixture
def settings():
    return make_settings(device="cpu", workers="0")


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 7])
def test_accumulated_running_statistics_equal_the_mean_over_ranks_that_update_once(
    num_micro_batches,
):
    generator = torch.Generator().manual_seed(0)
    batches = (
        torch.randn(num_micro_batches, 16, 3, 5, 5, generator=generator, dtype=torch.float64) * 2
        + 1
    )
    ranks = []
    for batch in batches:
        norm = nn.BatchNorm2d(3).double()
        norm.running_mean += 0.7
        norm(batch)
        ranks.append(norm)
    ours = nn.BatchNorm2d(3).double()
    ours.running_mean += 0.7
    statistics = StepStatistics(nn.Sequential(ours))
    for number, batch in enumerate(batches):
        statistics.set(number, num_micro_batches)
        ours(batch)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(rank, name) for rank in ranks]).mean(0)
        torch.testing.assert_close(getattr(ours, name), mean, rtol=0, atol=1e-12)


def test_a_step_reaches_the_batch_norm_inside_batch_channel_norm():
    norm = BatchChannelNorm2d(4, 2, 1e-5, 0.1, "batch")
    StepStatistics(nn.Sequential(norm)).set(0, 2)
    assert norm.batch.momentum == pytest.approx(0.05 / 0.95)


def test_what_an_unfinished_step_left_is_forgotten():
    norm = EstimatedBatchNorm2d(3, 1e-5, 0.1)
    statistics = StepStatistics(norm)
    statistics.set(0, 2)
    norm(torch.full((2, 3, 4, 4), 100.0))
    statistics.set(0, 1)
    norm(torch.ones(2, 3, 4, 4))
    statistics.finish()
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 0.1))


def steps_of(part, sizes, model, num_steps):
    """Gradients of the last of some steps over 32 images cut into micro-batches of the given sizes,
    and the buffers.
    """
    torch.manual_seed(0)
    net = nets(model)
    part.apply(net, 64)
    net = net.double()
    statistics = StepStatistics(net)
    for step in range(num_steps):
        images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(step)).double()
        labels = torch.arange(32) % 10
        net.zero_grad()
        for number, (some, theirs) in enumerate(
            zip(images.split(sizes), labels.split(sizes), strict=True)
        ):
            statistics.set(number, len(sizes))
            (nn.functional.cross_entropy(net(some), theirs, reduction="sum") / 32).backward()
        statistics.finish()
        with torch.no_grad():
            for weight in net.parameters():
                weight -= 0.05 * weight.grad
    buffers = [tensor for name, tensor in net.named_buffers() if "running" in name]
    return [weight.grad for weight in net.parameters()], buffers


def nets(model):
    if model != "small":
        return timm.create_model(
            model, num_classes=10, zero_init_last=False
        )  # zero gammas would stop the gradients
    body = [
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def distance(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("model", "num_steps"), [("small", 3), ("resnet18", 1)])
@pytest.mark.parametrize(
    ("part", "is_free"),
    [
        (norms.GroupNorm(groups=8, eps=1e-5), True),
        (norms.BatchChannelNorm(groups=8, eps=1e-5, momentum=0.1, statistics="estimated"), True),
        (norms.BatchChannelNorm(groups=8, eps=1e-5, momentum=0.1, statistics="batch"), False),
        (norms.BatchNorm(momentum=0.2, eps=1e-5, affine=True), False),
    ],
    ids=["group_norm", "estimated", "batch_channel_norm", "batch_norm"],
)
def test_32_images_at_once_and_16_times_2_are_one_step_for_norms_without_batch_statistics(
    model, num_steps, part, is_free
):
    once, cut = (steps_of(part, sizes, model, num_steps) for sizes in ([32], [2] * 16))
    if is_free:
        assert distance(once[0], cut[0]) < 1e-10
        assert distance(once[1], cut[1]) < 1e-10 if once[1] else not cut[1]
    else:
        assert distance(once[0], cut[0]) > 1e-3


def test_a_bad_start_of_the_estimates_does_no_harm():
    """Inputs a thousand times too large, and the estimates still at their start: what comes out is
    of size one.
    """
    norm = BatchChannelNorm2d(8, 2, 1e-5, 0.1, "estimated")
    statistics = StepStatistics(norm)
    for step in range(3):
        images = 1000 * torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(step)) + 500
        images.requires_grad_()
        made = norm(images)
        (made * torch.randn(made.shape)).sum().backward()
        assert (
            made.square().mean().item() == pytest.approx(1, abs=0.01)
            and images.grad.isfinite().all()
        )
        statistics.finish()


@pytest.mark.parametrize("affected", ["batch_norm", "ghost_batch_norm"])
def test_precise_statistics_are_the_plain_mean_over_the_first_images_of_the_epoch(
    opened, settings, affected
):
    plan = small_plan(overrides=PRECISE + "batch.images=16 batch.norm_images=8")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Conv2d(4, 2, 3),
        nn.BatchNorm2d(2),
    )
    if affected == "ghost_batch_norm":
        norms.GhostBatchNorm(images=4, momentum=0.1, eps=1e-5).apply(model, 32)
    model[1].running_mean += 5
    first_step = plan.steps_per_epoch
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = opened.train_stream(plan, settings, first_step)
    make_norms_precise(plan, settings, [model], batches)
    stream = opened.train_stream(plan, settings, first_step)
    micro_batches = [task_of(plan, settings).prepare(next(stream))[0] for _ in range(3)]
    size = 4 if affected == "ghost_batch_norm" else 8
    samples = [part for batch in micro_batches for part in batch.split(size)]
    check_running(model[1], [model[0](part) for part in samples])
    normalized = [
        nn.functional.batch_norm(model[0](part), None, None, training=True) for part in samples
    ]
    check_running(model[4], [model[3](part) for part in normalized])
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" not in name)
    assert model.training and model[1].momentum == 0.1


def check_running(norm, maps):
    flat = [each.detach().double().transpose(0, 1).flatten(1) for each in maps]
    torch.testing.assert_close(
        norm.running_mean.double(),
        torch.stack([each.mean(1) for each in flat]).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        norm.running_var.double(),
        torch.stack([each.var(1) for each in flat]).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_stop_in_the_middle_of_recomputing_leaves_nothing_behind(opened, settings):
    """Its checkpoint has statistics half recomputed; the next process recomputes them to the same
    bits.
    """
    plan = small_plan(overrides=PRECISE)
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", num_classes=10)
    stopped = deepcopy(whole)
    make_norms_precise(plan, settings, [whole], opened.train_stream(plan, settings, 0))
    with StopRequest() as stop, pytest.raises(Stopped):
        signal.raise_signal(signal.SIGUSR1)
        make_norms_precise(
            plan, settings, [stopped], opened.train_stream(plan, settings, 0), each=stop.check
        )
    assert (
        all(norm.momentum == 0.1 for norm in stopped.modules() if isinstance(norm, nn.BatchNorm2d))
        and stopped.training
    )
    resumed = timm.create_model("test_resnet", num_classes=10)
    resumed.load_state_dict(stopped.state_dict())
    make_norms_precise(plan, settings, [resumed], opened.train_stream(plan, settings, 0))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_an_epoch_is_evaluated_with_precise_statistics_of_the_weights_and_of_their_average(
    opened, settings, tmp_path
):
    plan = small_plan(overrides=PRECISE + "average='{name: ema, decay: 0.9, every_steps: 1}'")
    state = TrainingState(plan, settings)
    state.progress.step = plan.steps_per_epoch
    expected = {}
    for which, model in state.weights().items():
        model = deepcopy(model)
        make_norms_precise(plan, settings, [model], opened.train_stream(plan, settings, 0))
        expected[which] = vars(evaluate(plan, settings, model, opened.val_batches(plan, settings)))
    raw = vars(evaluate(plan, settings, state.model, opened.val_batches(plan, settings)))
    assert evaluate_epoch(state, opened, NullRun())
    assert state.progress.scores == expected and expected["model"] != raw
    assert state.model.training and not state.average.model.training


def test_the_note_says_whether_a_micro_batch_is_science():
    plan = small_plan(overrides="mix.images=8")
    torch.manual_seed(0)

    def note(part=None):
        model = timm.create_model("test_resnet", num_classes=10)
        if part:
            part.apply(model, 64)
        return statistics_note(model, plan)

    assert (
        "15 BatchNorm2d (conv1.1 the first)" in note() and "the 8 images of a micro-batch" in note()
    )
    assert "part of the science" in note(
        norms.BatchChannelNorm(groups=8, eps=1e-5, momentum=0.1, statistics="batch")
    )
    assert "virtual batches of 4 out of the 8 images" in note(
        norms.GhostBatchNorm(images=4, momentum=0.1, eps=1e-5)
    )
    estimated = note(
        norms.BatchChannelNorm(groups=8, eps=1e-5, momentum=0.1, statistics="estimated")
    )
    assert "15 norms normalize by running estimates" in estimated and "memory only" in estimated
    assert "No norm takes statistics over images" in note(norms.GroupNorm(groups=8, eps=1e-5))
    assert "memory only" in statistics_note(timm.create_model("test_convnext"), plan)


def num_calls(num_layers: int) -> int:
    """Of torch, to move the fixed statistics of a step of three micro-batches."""
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(num_layers)))
    statistics, number = StepStatistics(model, is_momentum_fixed=True), 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal number
            views = ("detach", "split", "unbind", "split_with_sizes")
            number += function.overloadpacket.__name__ not in views
            return function(*args, **(kwargs or {}))

    with Counting():
        for place in range(3):
            statistics.set(place, 3)
        statistics.finish()
    return number


def test_fixed_statistics_of_all_layers_move_in_as_many_calls_as_those_of_one():
    assert num_calls(30) == num_calls(1) < 12
