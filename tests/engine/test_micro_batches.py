"""Where memory runs out, a step is made again in smaller pieces; activations made again change no
bit.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from support import pieced
from support.pieced import relative, steps
from support.plans import small_plan
from support.ranked import on_ranks
from trainer.base.errors import UserError
from trainer.base.memory import MemoryFull, is_memory_full
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import Ranks, alone
from trainer.engine import train
from trainer.engine.activation_checkpointing import recompute_activations
from trainer.engine.evaluate import evaluate
from trainer.engine.micro_batches import explained, pieces_at, remedies, split
from trainer.engine.precise_norm import StepStatistics
from trainer.engine.state import TrainingState
from trainer.models.parts.norm_layers import EstimatedBatchNorm2d, GhostBatchNorm2d
from trainer.recipe.plan import make_plan
from trainer.runs.row import deviation_of_memory

# smooth, and without draws on the device: what is left between two ways to cut a step is rounding
SMOOTH = (
    "drop_path=null lr.peak=5e-4 'model={stem: {name: patchify, patch_px: 4}, activation: {name:"
    " silu}%s}'"
)
GROUPS = SMOOTH % ", norm: {name: group_norm, groups: 4, eps: 1e-5}"
ESTIMATED = (
    SMOOTH % ", norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1, statistics:"
    " estimated}"
)
BATCH = SMOOTH % ""


def run(tmp_path, overrides, num_steps, inject="", **machine):
    return steps(
        alone(), str(tmp_path), "A2", "test_resnet", overrides, num_steps, inject, **machine
    )


@pytest.mark.parametrize("overrides", [GROUPS, ESTIMATED], ids=["group_norm", "estimated"])
def test_a_step_in_pieces_is_the_same_step_where_norms_do_not_sample_the_micro_batch(
    tmp_path, overrides
):
    expected = run(tmp_path / "a", overrides, 4)
    found = run(tmp_path / "b", overrides, 4, "oom@2,oom@3", micro_batch="auto")
    assert found["num_pieces"] == 4
    assert found["changes"] == [
        "micro_batch 8 -> 4 images after step 1: out of memory",
        "micro_batch 4 -> 2 images after step 2: out of memory",
    ]
    assert found["injected"] == ["oom@2", "oom@3"]
    assert found["ids"] == expected["ids"]  # every micro-batch is loaded once
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert relative(found["weights"], expected["weights"]) < 1e-6
    assert relative(found["buffers"], expected["buffers"]) < 1e-6  # group norm has none
    assert deviation_of_memory(found["state"]) == ()
    assert not any("DEVIATION" in line for line in found["said"])


def test_norms_over_images_sample_a_piece_and_the_row_says_so(tmp_path):
    found = run(tmp_path, BATCH, 1, "oom@1", micro_batch="auto")
    (deviation,) = deviation_of_memory(found["state"])
    assert (deviation.path, deviation.before, deviation.after, deviation.origin) == (
        "batch.norm_images",
        "8",
        "4",
        "memory",
    )
    assert any("DEVIATION" in line and "4 images" in line for line in found["said"])


def test_after_two_halvings_the_recipe_still_says_what_it_said(tmp_path):
    found = run(tmp_path, BATCH, 2, "oom@1,oom@2", micro_batch="auto")
    last = [line for line in found["said"] if "DEVIATION" in line][-1]
    assert "2 images" in last and "batch.norm_images 8" in last


def test_running_statistics_of_pieces_move_as_those_of_ranks_do_and_forget_the_pass_that_failed(
    tmp_path,
):
    plan_steps = run(tmp_path / "a", BATCH, 1, "oom@1", micro_batch="auto")
    model = plan_steps["state"].model
    name, norm = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    )
    means = []
    handle = norm.register_forward_pre_hook(
        lambda module, given: means.append(given[0].detach().double().mean((0, 2, 3)))
    )
    before = norm.running_mean.clone().double()
    state = plan_steps["state"]
    window = open_data(state.plan.profile, None).train_stream(state.plan, state.settings, 1)
    train.optimizer_step(state, window, 1)
    handle.remove()
    assert len(means) == 8  # 4 micro-batches in 2 pieces each
    expected = 0.9 * before + 0.1 * torch.stack(means).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), expected, rtol=1e-5, atol=1e-7)
    assert (
        plan_steps["buffers"][f"{name}.num_batches_tracked"] == 8
    )  # not 9: the first pass was undone


@pytest.mark.drill
@pytest.mark.parametrize("overrides", [GROUPS, BATCH], ids=["group_norm", "batch_norm"])
def test_out_of_memory_on_one_of_two_ranks_lets_both_go_on_in_pieces(tmp_path, overrides):
    def given(name):
        return str(tmp_path / name), "A2", "test_resnet", overrides

    whole = on_ranks(pieced.steps, 2, *given("a"), 4)
    found = on_ranks(pieced.auto_steps, 2, *given("b"), 4, "oom@2")
    for rank, expected in zip(found, whole, strict=True):
        assert rank["num_pieces"] == 2 and rank["ids"] == expected["ids"]
        assert rank["changes"] == ["micro_batch 8 -> 4 images after step 1: out of memory"]
        assert all(
            torch.equal(tensor, found[0]["weights"][name])
            for name, tensor in rank["weights"].items()
        )
        if overrides == GROUPS:
            assert relative(rank["weights"], expected["weights"]) < 1e-6
    if overrides == BATCH:  # two ranks that cut alike are one rank that cuts alike
        one = steps(alone(), *given("c"), 4, "oom@2", micro_batch="auto")
        assert relative(found[0]["weights"], one["weights"]) < 1e-5


def test_a_micro_batch_is_cut_by_images_with_all_their_splits():
    images, targets = (
        torch.arange(10.0).view(10, 1, 1, 1),
        torch.arange(5.0).view(5, 1),
    )  # two splits of 5 images
    parts = [
        (some.flatten().tolist(), theirs.flatten().tolist())
        for some, theirs in split(images, targets, 2)
    ]
    assert parts == [([0, 2, 4, 5, 7, 9], [0, 2, 4]), ([1, 3, 6, 8], [1, 3])]
    assert [len(theirs) for _, theirs in split(images, targets, 1)] == [5]


def test_every_micro_batch_of_a_step_has_the_same_number_of_pieces_and_none_is_too_small():
    plan = small_plan(
        overrides="batch.images=32 batch.norm_images=8 batch.drop_last=false"
    )  # the last step: 29 images
    assert [pieces_at(plan, number, 0) for number in (1, 2, 8, 64)] == [1, 2, 8, 8]
    assert [pieces_at(plan, number, 0, least_images=2) for number in (2, 4, 8)] == [2, 4, 4]
    assert pieces_at(plan, 8, plan.steps_per_epoch - 1) == 7  # micro-batches of 8, 7, 7 and 7


def test_without_auto_one_line_says_what_would_fit(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "a", BATCH, 1, "oom@1")
    found = run(tmp_path / "b", GROUPS, 1)
    state = found["state"]
    with pytest.raises(MemoryFull) as caught, explained(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nand much more")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("out of memory in step 2: a micro-batch of 8 images of ")
    assert "micro_batch=auto, activation_checkpointing=1, or precision=bf16" in line
    with pytest.raises(RuntimeError, match="something else"), explained(state):
        raise RuntimeError("something else")


def test_memory_that_lies_in_pieces_is_named_first(tmp_path, monkeypatch):
    state = run(tmp_path, GROUPS, 1)["state"]
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 60 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 40 * gib)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * gib)
    )
    monkeypatch.setattr(state, "settings", replace(state.settings, device="cuda"))
    with pytest.raises(MemoryFull, match=r"use PYTORCH_ALLOC_CONF=.*25%"), explained(state):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_norms_over_images_are_told_first_what_keeps_their_sample():
    plan = small_plan()
    settings = make_settings("cpu", workers="0")
    found = remedies(plan, settings, is_sampled=True)
    assert (
        found[0] == "activation_checkpointing=1"
        and "micro_batch=auto" in found[-1]
        and "deviations" in found[-1]
    )
    assert 'set="batch.norm_images=4"' in found[-1] and found[-2].startswith("8 ranks, 2 of")
    best = make_settings(
        "cpu", "bf16", workers="0", micro_batch="auto", activation_checkpointing=True
    )
    assert remedies(plan, best, is_sampled=False) == ["a device with more memory"]


def test_pieces_of_one_image_that_do_not_fit_end_the_run(tmp_path):
    faults = ",".join(f"oom@{step}" for step in range(1, 5))
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, GROUPS, 5, faults, micro_batch="auto")  # 8, 4, 2, 1


def test_what_the_cpu_says_when_memory_is_out_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert is_memory_full(caught.value) and is_memory_full(torch.OutOfMemoryError("any"))
    assert not is_memory_full(RuntimeError("shapes cannot be multiplied")) and not is_memory_full(
        MemoryError()
    )


def accelerator_error(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code
    return error


NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error. Last error:\n"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (accelerator_error(2), True),  # cudaErrorMemoryAllocation
        (accelerator_error(710), False),  # an assertion on the device
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.distributed.DistBackendError(f"{NCCL}Failed to CUDA calloc async 24 bytes"), True),
        (torch.distributed.DistBackendError(f"{NCCL}Cuda failure 'out of memory'"), True),
        (torch.distributed.DistBackendError(f"{NCCL}Connection closed by peer"), False),
    ],
)
def test_every_form_in_which_a_gpu_says_that_memory_is_out_is_known(error, is_memory):
    assert is_memory_full(error) == is_memory


def test_the_communication_of_ranks_that_is_out_of_memory_is_not_tried_again(tmp_path, monkeypatch):
    """Its communicator is lost: the ranks could not agree to."""
    calls = []

    def failing(*given):
        calls.append(given)
        raise torch.distributed.DistBackendError(f"{NCCL}Failed to CUDA malloc 24 bytes")

    monkeypatch.setattr(train, "add_gradients", failing)
    with pytest.raises(torch.distributed.DistBackendError):
        run(tmp_path, GROUPS, 1, micro_batch="auto")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(8, [8, 8, 4]), (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])],
    ids=["fits", "does not"],
)
def test_an_evaluation_that_memory_does_not_hold_goes_on_in_halves(most, sizes):
    plan, settings = small_plan(), make_settings("cpu", workers="0")
    model = TrainingState(plan, settings).model
    images, labels = next(iter(open_data(plan.profile, None).val_batches(plan, settings)))
    batches = list(zip(images[:20].split(8), labels[:20].split(8), strict=True))
    expected, seen = evaluate(plan, settings, model, batches), []

    def limit(module, given):
        seen.append(len(given[0]))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    model.register_forward_pre_hook(limit)
    found = evaluate(plan, settings, model, batches)
    assert seen == sizes
    assert (found.num_top1, found.num_top5, found.num_images) == (
        expected.num_top1,
        expected.num_top5,
        20,
    )
    assert found.loss_nats == pytest.approx(expected.loss_nats, rel=1e-6)


def test_one_image_that_does_not_fit_ends_an_evaluation_in_a_line():
    plan, settings = small_plan(), make_settings("cpu", workers="0")
    model = TrainingState(plan, settings).model

    def full(module, given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    model.register_forward_pre_hook(full)
    with pytest.raises(
        MemoryFull, match="one image of 32x32 px does not fit on cpu; use a device with more memory"
    ):
        evaluate(
            plan,
            settings,
            model,
            [(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))],
        )


def test_ranks_that_join_statistics_cannot_try_again():
    plan = small_plan()
    plan = make_plan(plan.recipe, plan.model, plan.profile, world_size=8)
    settings = make_settings("cpu", workers="0", micro_batch="auto")
    with pytest.raises(UserError, match="leave micro_batch= out, or use 4 ranks"):
        TrainingState(plan, settings, Ranks(rank=3, world_size=8))
    with pytest.raises(UserError, match="micro_batch=atuo: unknown .did you mean auto"):
        make_settings("cpu", micro_batch="atuo")


DRAWS = "drop_path=0.3 "


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("test_resnet", DRAWS),
        (
            "test_resnet",
            DRAWS + "'model={norm: {name: ghost_batch_norm, images: 4, momentum: 0.1, eps: 1e-5}}'",
        ),
        (
            "test_resnet",
            DRAWS + "'model={norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1,"
            " statistics: estimated}}'",
        ),
        ("test_convnext", DRAWS),
    ],
    ids=["batch_norm", "ghost", "estimated", "convnext"],
)
def test_activations_made_again_change_no_bit(tmp_path, model, overrides):
    expected, found = (
        steps(alone(), str(tmp_path), "A2", model, overrides, 3, activation_checkpointing=again)
        for again in (False, True)
    )
    assert found["losses"] == expected["losses"]
    for kind in ("weights", "buffers"):
        assert all(
            torch.equal(tensor, expected[kind][name]) for name, tensor in found[kind].items()
        ), kind


def kept_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(8, 3, 64, 64))
    return total


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto"])
def test_activations_made_again_are_not_kept(model):
    net = timm.create_model(model)
    before = kept_bytes(net)
    recompute_activations(net)
    assert kept_bytes(net) < 0.4 * before


def staged() -> nn.Module:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
            )
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.stage(x).mean((2, 3)))

    torch.manual_seed(0)
    return Net()


def test_a_model_without_timms_way_is_recomputed_by_stages():
    plain, again = staged(), staged()
    recompute_activations(again)
    images = torch.randn(4, 3, 16, 16)
    for net, is_again in ((plain, False), (again, True)):
        statistics = StepStatistics(net, is_recomputed=is_again)
        statistics.set(0, 1)
        loss = net(images).square().sum()
        with statistics.at_rest():
            loss.backward()
    assert kept_bytes(again) < 0.5 * kept_bytes(plain)
    again_state = staged()
    again_state.load_state_dict(again.state_dict())  # the same names
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for norm in (plain.stage[1], again.stage[1]):
        assert norm.momentum == 0.1 and not math.isclose(norm.running_mean.abs().sum().item(), 0)


def test_what_cannot_be_made_again_is_refused():
    with pytest.raises(UserError, match="has no stages to recompute"):
        recompute_activations(nn.Linear(2, 2))
    with pytest.raises(UserError, match="0 .EvoNorm2dB0. would move its statistics twice"):
        recompute_activations(nn.Sequential(timm.layers.EvoNorm2dB0(8)))


def test_statistics_at_rest_move_nothing():
    net = nn.Sequential(
        nn.BatchNorm2d(2),
        GhostBatchNorm2d(2, 2, 1e-5, 0.1),
        EstimatedBatchNorm2d(2, 1e-5, 0.1),
        nn.BatchNorm2d(2, momentum=None),
    )
    statistics = StepStatistics(net, is_recomputed=True)
    statistics.set(0, 1)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with statistics.at_rest():
        net(torch.randn(4, 2, 3, 3))
    statistics.finish()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    net(torch.randn(4, 2, 3, 3))
    statistics.finish()
    assert not any(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
