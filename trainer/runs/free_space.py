"""Has the disk room for all that a run will write?"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from trainer.base.errors import UserError
from trainer.engine.state import TrainingState

_NUM_ON_DISK = 3  # checkpoints at a time: the last, the one before it, and the one being written
_LINE_BYTES = 800  # of a window, in all files that keep curves


def check_room(state: TrainingState, folder: Path) -> None:
    """Refuse a run whose disk cannot hold it to the end in its folder. Raises UserError, on rank
    0.
    """
    if not state.ranks.is_first:
        return
    plan, settings = state.plan, state.settings
    model_bytes = _num_bytes(state.model.state_dict().values())
    num_kept = plan.recipe.epochs // settings.keep_every_epochs if settings.keep_every_epochs else 0
    num_lines = plan.num_steps // settings.log_steps + 3 * plan.recipe.epochs
    num_other = model_bytes + num_lines * _LINE_BYTES
    check_free(folder, checkpoint_bytes(state), num_kept, num_other)


def checkpoint_bytes(state: TrainingState) -> int:
    """The size of the tensors in a checkpoint."""
    model_bytes = _num_bytes(state.model.state_dict().values())
    moments = moments_per_weight(state.plan.recipe.optimizer)
    moment_bytes = round(moments * _num_bytes(state.model.parameters()))
    return model_bytes * (2 if state.average else 1) + moment_bytes


def check_free(folder: Path, checkpoint_bytes: int, num_kept: int, other_bytes: int) -> None:
    """Refuse a folder without room for the checkpoints, num_kept of them for good, and for all
    else.

    What a process before has left in it counts as free: it is a part of what will be there. In its
    other folders trackers may be writing meanwhile.

    Raises UserError.
    """
    wanted = (_NUM_ON_DISK + num_kept) * checkpoint_bytes + other_bytes
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    found = shutil.disk_usage(there).free + sum(
        path.lstat().st_size
        for part in (folder, folder / "checkpoints")
        for path in part.glob("*")
        if path.is_file()
    )
    if wanted > found:
        kept = f", {num_kept} more of keep_every=" if num_kept else ""
        raise UserError(
            f"{folder}: the run will need {_mib(wanted)} MiB there ({_NUM_ON_DISK} checkpoints of"
            f" {_mib(checkpoint_bytes)} MiB{kept}, the model, curves), and {_mib(found)} MiB are"
            " free; free some space, or use runs=<a folder on another disk>"
        )


def moments_per_weight(optimizer) -> float:
    """How many numbers a recipe's optimizer keeps for each weight, found by a step of it."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    made = optimizer.build([{"params": [weight], "weight_decay": 0.0}], lr=1e-3)
    made.step()
    kept = (value for of_weight in made.state.values() for value in of_weight.values())
    return sum(value.numel() for value in kept if isinstance(value, torch.Tensor)) / 1000


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mib(num_bytes: float) -> str:
    mib = num_bytes / 2**20
    return f"{mib:.0f}" if mib >= 10 else f"{max(mib, 0.1):.1f}"
