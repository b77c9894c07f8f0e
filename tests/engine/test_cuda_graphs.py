"""cuda_graphs=1: the same training, whose passes over a micro-batch are one launch."""

import dataclasses
import math

import pytest
import torch

from support.cpu_graphs import cpu_graphs
from support.gpu_steps import started
from support.gpu_stub import host_waits
from support.pieced import relative
from support.plans import small_plan
from support.ranked import on_ranks, ranked_plan
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.cuda_graphs import CapturedPasses
from trainer.engine.micro_batches import num_pieces
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step, own_micro_batches
from trainer.models.parts.norm_layers import EstimatedBatchNorm2d
from trainer.tools import faults

SMOOTH = "lr.peak=5e-4 'model={stem: {name: patchify, patch_px: 4}, activation: {name: silu}}'"


def after_steps(ranks, recipe: str, model: str, overrides: str, is_captured: bool) -> dict:
    """The last steps of an epoch, of which the very last has fewer images, and one of the next."""
    plan = ranked_plan(ranks, recipe, model, overrides)
    settings = dataclasses.replace(make_settings("cpu", workers="0"), cuda_graphs=is_captured)
    first, state = plan.steps_per_epoch - 3, None

    def kept():
        gradients = (one.grad for one in state.model.parameters() if one.grad is not None)
        return [*state.model.buffers(), *gradients]

    with cpu_graphs(kept) as graphs:
        state = TrainingState(plan, settings, ranks)
        window = open_data(plan.profile, None).train_stream(plan, settings, first, ranks)
        losses = [optimizer_step(state, window, first + step).item() for step in range(4)]
    return {
        "losses": losses,
        "weights": dict(state.model.named_parameters()),
        "statistics": dict(state.model.named_buffers()),
        "average": state.average.state_dict() if state.average else {},
        "replays": [graph.num_replays for graph in graphs],
    }


@pytest.mark.parametrize(
    ("num_ranks", "recipe", "model", "overrides"),
    [
        (1, "A2", "test_resnet", f"{SMOOTH} drop_path=0.2"),
        (2, "A2", "test_resnet", f"{SMOOTH} drop_path=0.2"),
        (1, "convnext", "test_convnext2", "lr.peak=1e-4"),
        (1, "bcn", "resnet18", "batch.images=16 batch.norm_images=4"),
    ],
)
def test_replays_train_as_single_launches_do(num_ranks, recipe, model, overrides):
    """Micro-batches, draws, mixing, statistics, the epoch's last window and several ranks."""
    plain, found = (
        on_ranks(after_steps, num_ranks, recipe, model, overrides, is_captured)[0]
        for is_captured in (False, True)
    )
    assert sum(found["replays"]) > sum(plain["replays"]) == 0
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    for what in ("weights", "statistics", "average"):
        assert relative(found[what], plain[what]) < 1e-4, what


@pytest.mark.gpu_stub
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["A2", "convnext", "torchvision-v2", "gn-ws", "bcn"])
def test_a_micro_batch_is_one_launch_and_nothing_waits(name, precision):
    from support.gpu_stub.watch import counts  # needs the library

    state, window = started(name, precision, cuda_graphs=True)
    number = len(own_micro_batches(state, 2)) * num_pieces(state, 2)
    before = counts()
    with host_waits() as waits:
        loss = optimizer_step(state, window, 2)
    found = counts() - before
    assert not waits and math.isfinite(loss.item())
    assert found["graph_launches"] == number > 1 and not found["captured"]


def _read(module, given) -> None:
    given[0].sum().item()


@pytest.mark.gpu_stub
def test_what_cannot_be_captured_is_one_line():
    state, window = started("A2", cuda_graphs=True)
    state.captured = CapturedPasses(state.model, state.settings.device)
    state.model.conv1.register_forward_pre_hook(_read)
    with pytest.raises(
        UserError, match=r"cuda_graphs=1: .* cannot be captured .*; use cuda_graphs=0"
    ):
        for step in (2, 3):
            optimizer_step(state, window, step)


def test_a_fault_in_the_next_forward_pass_strikes_between_replays():
    """inject=nan hangs a hook on the model, which no replay would run."""
    plan = small_plan()
    settings = dataclasses.replace(make_settings("cpu", workers="0"), cuda_graphs=True)
    with cpu_graphs(lambda: state.model.buffers()) as graphs:
        state = TrainingState(plan, settings)
        window = open_data(plan.profile, None).train_stream(plan, settings, 0)
        assert optimizer_step(state, window, 0).isfinite()
        faults._make_nan(state.model)
        assert optimizer_step(state, window, 1).isnan() and graphs


def test_what_no_graph_can_hold_is_refused():
    with pytest.raises(UserError, match="cuda_graphs=1: needs an NVIDIA GPU; use cuda_graphs=0"):
        make_settings("cpu", cuda_graphs=True)
    with pytest.raises(UserError, match="cuda_graphs=1: norms with estimated .* use cuda_graphs=0"):
        CapturedPasses(torch.nn.Sequential(EstimatedBatchNorm2d(4, 1e-5, 0.1)), "cuda")
    with pytest.raises(UserError, match="cuda_graphs=1: .* 2 ranks share a micro-batch"):
        CapturedPasses(torch.nn.Conv2d(3, 4, 1), "cuda", num_parts=2)


@pytest.mark.gpu_stub
@pytest.mark.parametrize("other", [{"activation_checkpointing": True}, {"micro_batch": "auto"}])
def test_of_two_settings_that_exclude_each_other_one_is_wanted(other):
    with pytest.raises(UserError, match=f"cuda_graphs=1 {next(iter(other))}=.*: .* one of the two"):
        make_settings("cuda", cuda_graphs=True, **other)
