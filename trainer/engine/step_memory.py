"""The memory of a training step, worked out without its device and without computing anything."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.base.settings import Settings
from trainer.components.optimizers import Optimizer
from trainer.components.param_groups import param_groups
from trainer.engine.micro_batches import pieces_at
from trainer.recipe.plan import Plan
from trainer.tasks import task_of


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device, by what they hold, where they are most: at the end of a forward pass.

    images: that go through the model at once. weights: of the model, buffers included; teacher:
    those of the recipe's teacher, whose forward pass keeps nothing. gradients,
    average: one for each weight. optimizer: its state. activations: what the backward pass of these
    images needs, the images included; with micro-batches of several parts, those of all parts. The
    last two are None where the optimizer or the model asks for values, which are not there.

    Not in it: what operations need for themselves (1 to 2 % of activations in a backward pass),
    cuDNN's workspace, the context of CUDA, and what torch's allocator holds without using it.
    """

    images: int
    weights: int
    gradients: int
    average: int
    teacher: int
    optimizer: int | None
    activations: int | None

    @property
    def total(self) -> int | None:
        """All of it; None where a part is not known."""
        if self.optimizer is None or self.activations is None:
            return None
        known = self.weights + self.gradients + self.average + self.teacher
        return known + self.optimizer + self.activations


def step_memory(
    plan: Plan, settings: Settings, model: nn.Module, teacher: nn.Module | None = None
) -> StepMemory:
    """Of one device of a run. model: as `build_model` gives it; left as it is, as the teacher is.
    settings.device need not be here.

    Runs a forward pass of tensors that have a shape, a type and a device, but no values.
    """
    with FakeTensorMode(allow_fallback_kernels=False):  # which would compute
        is_last = settings.is_channels_last(plan.recipe.image.train_px)
        fake = without_values(model, settings.device, is_last)
        weights = _num_bytes(chain(fake.parameters(), fake.buffers()))
        activations = _activation_bytes(plan, settings, fake)
    return StepMemory(
        images=_part_images(plan),
        weights=weights,
        gradients=_num_bytes(one for one in fake.parameters() if one.requires_grad),
        average=weights if plan.recipe.average else 0,
        teacher=0
        if teacher is None
        else _num_bytes(chain(teacher.parameters(), teacher.buffers())),
        optimizer=_state_bytes(plan.recipe.optimizer, model),
        activations=activations,
    )


def _part_images(plan: Plan) -> int:
    """Of one of the parts in which a rank's micro-batches go through the model."""
    own_images = -(-plan.recipe.images_together // plan.num_parts(0))
    return -(-own_images // pieces_at(plan, 1, 0))


def without_values(model: nn.Module, device: str, channels_last: bool = False) -> nn.Module:
    """A copy whose tensors hold no values, as on a device. Within a FakeTensorMode."""
    memo = {}
    for one in chain(model.parameters(), model.buffers()):
        is_map = channels_last and one.ndim == 4
        memory_format = torch.channels_last if is_map else torch.contiguous_format
        empty = torch.empty(one.shape, dtype=one.dtype, device=device, memory_format=memory_format)
        is_weight = isinstance(one, nn.Parameter)
        memo[id(one)] = nn.Parameter(empty, one.requires_grad) if is_weight else empty
    return deepcopy(model, memo).train()  # copies refer to what is in memo


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.untyped_storage().nbytes() for one in tensors)


def _activation_bytes(plan: Plan, settings: Settings, model: nn.Module) -> int | None:
    """The images and targets of a micro-batch, and all that autograd keeps of one of its parts; but
    for weights, which are there anyway.
    """
    recipe, profile, images_px = plan.recipe, plan.profile, plan.recipe.image.train_px
    splits, each, device = recipe.augment_splits or 1, _part_images(plan), settings.device
    images = torch.empty(splits * each, profile.channels, images_px, images_px, device=device)
    if settings.is_channels_last(images_px):
        images = images.contiguous(memory_format=torch.channels_last)
    targets = task_of(plan, settings).blank_targets(each, device)
    own = {id(one.untyped_storage()) for one in chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # a storage that is alive keeps its id to itself

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    keep(images), keep(targets)
    inputs_bytes = sum(one.nbytes() for one in kept.values())
    forward = functools.partial(_in_precision, model, settings)
    # of the run's own precision: autocast() asks whether the device is there
    without = replace(settings, precision="float32")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # it is called, and no more
            task_of(plan, without).loss(forward, images, targets)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, ValueError):  # a branch by a value, a tensor elsewhere
        return None
    return sum(one.nbytes() for one in kept.values()) + (pieces_at(plan, 1, 0) - 1) * inputs_bytes


def _in_precision(model: nn.Module, settings: Settings, images: Tensor) -> Tensor:
    """The forward pass under autocast, whether or not its device is here."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    if dtype is None:
        return model(images)
    kind = settings.device.split(":")[0]
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, dtype)
    try:
        return model(images)
    finally:
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


def _state_bytes(rule: Optimizer, model: nn.Module) -> int | None:
    """What an optimizer keeps after its first step, on any device the same."""
    with FakeTensorMode():
        fake = without_values(model, "cpu")
        optimizer = rule.build(param_groups(fake, rule), lr=1.0)
        for weight in fake.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        try:
            optimizer.step()
        except (RuntimeError, AssertionError, ValueError):  # as above
            return None
    values = chain.from_iterable(state.values() for state in optimizer.state.values())
    return _num_bytes(value for value in values if isinstance(value, Tensor))
