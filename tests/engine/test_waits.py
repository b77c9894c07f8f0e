"""No optimizer step makes the host wait for the GPU: checked on a GPU where there is one, and
without one on tensors that only say that they lie on one.
"""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import Ranks, alone
from trainer.engine import state
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import build_model

# with erasing, EMA, lighting, every optimizer and way of clipping that the recipes have
PAGES = [
    ("A2", "test_resnet"),
    ("convnext", "test_convnext2"),
    ("pycls-dds", "test_resnet"),
    ("torchvision-v2", "test_resnet"),
]
aten = torch.ops.aten
_READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
_INDEXING = {aten.index, aten.index_put, aten.index_put_}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page[0])
def test_no_step_waits_for_the_gpu(page, micro_batches, tmp_path):
    plan = small_plan(*page, overrides=f"batch.norm_images={32 // micro_batches}")
    settings = make_settings("cuda", workers="0")
    one = TrainingState(plan, settings)
    window = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(2):  # the first ones copy what stays
        optimizer_step(one, window, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = optimizer_step(one, window, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


class Waits(TorchDispatchMode):
    """Where the host would wait for a GPU. Inside a FakeTensorMode: what has no part on the GPU is
    computed as ever.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parts = arg_tree_leaves(*args, **kwargs)
        if not any(_is_gpus(part) for part in parts):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if _waits(func, args, kwargs):
            self.found.append(str(func))
        if func.overloadpacket is aten._fused_sgd_:  # in place, and torch has no fake of it
            return None
        return func(*args, **kwargs)


def _is_gpus(part) -> bool:
    return isinstance(part, FakeTensor) or (isinstance(part, torch.device) and part.type == "cuda")


def _waits(func, args, kwargs) -> bool:
    if func.overloadpacket in _READING:
        return True
    if func.overloadpacket in _INDEXING:
        return any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1])
    if func.overloadpacket is aten._to_copy:
        to = torch.device(kwargs.get("device") or args[0].device)
        return to.type != args[0].device.type and not kwargs.get("non_blocking")
    if func.overloadpacket is aten.copy_:
        return args[0].device.type != args[1].device.type and not (
            args[2] if len(args) > 2 else kwargs.get("non_blocking")
        )
    return False


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on "cuda" have a shape and no values; what would have to be read from one is an
    error.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits


def placed(model):
    """The model's tensors on the GPU. By hand: Module.to cannot exchange what is fake."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = (
                    None
                    if tensor is None
                    else torch.empty_like(tensor, device="cuda").requires_grad_(
                        tensor.requires_grad
                    )
                )
    return model


class FakeRanks(Ranks):
    """A rank whose others are not there; the sizes of what it sums on the device are noted."""

    def __init__(self, *given):
        super().__init__(*given)
        object.__setattr__(self, "sums", [])

    def start_sum(self, tensor):
        if tensor.device.type == "cuda":
            self.sums.append(tensor.numel())
        return lambda: None

    def total(self, number):
        return number


def fake_state(plan, settings, folder, monkeypatch, ranks=alone()):
    """A run on the fake GPU. Its backward passes, in which no line is ours, are left out: autograd
    would want a real one.
    """
    with unset_fake_temporarily():
        model = build_model(plan)
    monkeypatch.setattr(state, "build_model", lambda plan: model)
    monkeypatch.setattr(state, "as_it_runs", lambda model, settings: placed(model))
    one = TrainingState(plan, settings, ranks)

    def backward(loss):
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return one


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the test above says more")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page[0])
def test_no_step_reads_from_a_gpu_or_copies_to_it_in_its_own_time(
    page, tmp_path, monkeypatch, request
):
    plan, on_cpu = small_plan(*page), make_settings("cpu", workers="0")
    stream = open_data(plan.profile, None).train_stream(plan, on_cpu, 0)
    window = iter(list(itertools.islice(stream, 2 * plan.micro_batches(0))))
    waits = request.getfixturevalue("fake_gpu")
    one = fake_state(
        plan, replace(on_cpu, device="cuda", channels_last=True), tmp_path, monkeypatch
    )
    optimizer_step(one, window, 0)  # the first one copies what stays
    waits.found.clear()
    optimizer_step(one, window, 1)
    assert not waits.found


ESTIMATED = (
    "'model={norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1,"
    " statistics: estimated}}'"
)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU")
def test_estimates_of_all_layers_are_one_sum_over_ranks_without_a_wait(monkeypatch, request):
    plan, on_cpu = small_plan(overrides=ESTIMATED), make_settings("cpu", workers="0")
    ranks = FakeRanks(0, 2)
    stream = open_data(plan.profile, None).train_stream(plan, on_cpu, 0, ranks)
    window = iter(list(itertools.islice(stream, 4)))
    waits = request.getfixturevalue("fake_gpu")
    one = fake_state(plan, replace(on_cpu, device="cuda"), None, monkeypatch, ranks)
    one.gradients._never = []  # no backward pass says which gradients come
    optimizer_step(one, window, 0)
    waits.found.clear(), ranks.sums.clear()
    optimizer_step(one, window, 1)
    assert not waits.found
    num_channels = [len(norm.running_mean) for norm in one.step_statistics.estimated]
    assert len(num_channels) > 10
    num_buckets = len(one.gradients._buckets)
    assert len(ranks.sums) == num_buckets + 2  # gradients, estimates, the loss
    assert sum(2 * number + 1 for number in num_channels) in ranks.sums


def test_the_fake_gpu_tells_a_wait(fake_gpu):
    held = torch.arange(6, device="cuda")
    for wait in (
        lambda: held[held > 2],
        lambda: torch.arange(3).to("cuda"),
        lambda: held.sum().item(),
        lambda: held.cpu(),
    ):
        fake_gpu.found.clear()
        with contextlib.suppress(
            DataDependentOutputException, DynamicOutputShapeException
        ):  # nothing can be read from it
            wait()
        assert fake_gpu.found
    fake_gpu.found.clear()
    torch.arange(3).to("cuda", non_blocking=True)
    held[torch.arange(3)] = 7
    assert not fake_gpu.found
