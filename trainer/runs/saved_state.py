"""Is what a checkpoint holds a state of this very run? Asked before any of it is taken.

A right checksum says that a file is as it was written, not by whom: a state that fits in part would
end in a traceback later, or in a row that says what was never measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.engine.state import TrainingState
from trainer.runs.results import Count, Sha256, Text
from trainer.tasks import task_of

_Line = Annotated[Text, Field(max_length=1000)]
_Lines = Annotated[list[_Line], Field(max_length=1000)]


class SavedCode(BaseModel):
    """Which program wrote the checkpoint. digest: of the package's files."""

    model_config = ConfigDict(strict=True)

    digest: Sha256
    commit: _Line | None = None
    dirty: bool | None = None


class SavedProgress(BaseModel):
    """`engine.state.Progress` and what the run keeps beside it; other keys, of another version,
    are passed over.

    metrics_bytes, metrics_sha256: length and digest of metrics.jsonl. A checkpoint of an earlier
    version has no digest and no code.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Count
    evaluated_step: Count = 0
    loss_sum: float = 0.0
    loss_steps: Count = 0
    num_replaced: Count = 0
    num_seen: Count = 0
    train_s: Annotated[float, Field(ge=0, le=1e10)] = 0.0
    compile_s: Annotated[float, Field(ge=0, le=1e10)] = 0.0
    scores: dict[str, dict[str, float]] = {}
    history: Annotated[list[float], Field(max_length=10_000)] = []
    changes: _Lines = []
    num_pieces: Annotated[int, Field(ge=1, le=2**20)] = 1
    injected: _Lines = []
    metrics_bytes: Count = 0
    metrics_sha256: Sha256 | None = None
    curves_incomplete: bool = False
    machine: dict[_Line, _Line] = {}
    code: SavedCode | None = None


def check_saved(saved: Mapping[str, Any], step: int, state: TrainingState) -> None:
    """Refuse what is not the state after `step` steps of this run. Raises ValueError, one line."""
    own = state.state_dict()
    if missing := sorted(set(own) - set(saved)):
        raise ValueError(f"no {missing[0]}")
    progress = saved_progress(saved)
    _check_progress(progress, step, state)
    _check_tensors("model", saved["model"], own["model"])
    if own["average"] is not None:
        _check_tensors("average", saved["average"], own["average"])
    _check_scaler(saved["scaler"])
    _check_optimizer(saved["optimizer"], own["optimizer"], state)


def saved_progress(saved: Mapping[str, Any]) -> SavedProgress:
    """The progress that a checkpoint holds. Raises ValueError for what is none."""
    try:
        return SavedProgress.model_validate(saved["progress"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, ("progress", *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}, found {first['input']!r}"[:200]) from None


def _check_progress(progress: SavedProgress, step: int, state: TrainingState) -> None:
    plan = state.plan
    if progress.step != step or step > plan.num_steps:
        raise ValueError(f"progress.step is {progress.step} in the file of step {step}")
    # stopped at one, it may be evaluated or not yet
    every = state.settings.eval_every_epochs
    due = {plan.last_evaluation(number, every) for number in (step, max(0, step - 1))}
    if progress.evaluated_step not in due:
        raise ValueError(f"progress.evaluated_step is {progress.evaluated_step} after step {step}")
    if progress.loss_steps > step:
        raise ValueError(f"progress.loss_steps is {progress.loss_steps} after step {step}")
    names = set(state.weights()) if progress.evaluated_step else set()
    if set(progress.scores) != names:
        raise ValueError(f"progress.scores are of {', '.join(progress.scores) or 'nothing'}"[:200])
    task, num_images = task_of(plan, state.settings), plan.profile.num_val
    for name, scores in progress.scores.items():
        try:
            found = task.restored(scores)
        except (KeyError, ValueError) as error:
            raise ValueError(f"progress.scores.{name}: {error}"[:200]) from None
        if found.record() != scores or found.num_images != num_images:
            raise ValueError(f"progress.scores.{name} are no scores of {num_images} images"[:200])


def _check_tensors(what: str, saved: Any, own: Mapping[str, torch.Tensor]) -> None:
    """The same names, shapes and types as the run's own."""
    if not isinstance(saved, Mapping) or set(saved) != set(own):
        odd = sorted(set(own) ^ set(saved)) if isinstance(saved, Mapping) else ["nothing by name"]
        raise ValueError(f"{what}: other names than this run's: {odd[0]!r}"[:200])
    for name, tensor in own.items():
        found = saved[name]
        if not isinstance(found, torch.Tensor) or _kind(found) != _kind(tensor):
            shown = " ".join(_kind(found)) if isinstance(found, torch.Tensor) else type(found)
            wanted = " ".join(_kind(tensor))
            raise ValueError(f"{what}: {name} is {shown}, where this run has {wanted}"[:200])


def _kind(tensor: torch.Tensor) -> tuple[str, str]:
    return str(tuple(tensor.shape)), str(tensor.dtype)


def _check_scaler(saved: Any) -> None:
    """Plain numbers by name, none of them below zero; nothing where no precision needs it."""
    if not isinstance(saved, Mapping) or not all(
        type(value) in (int, float) and 0 <= value < float("inf") for value in saved.values()
    ):
        raise ValueError(f"scaler is {saved!r}"[:200])


def _check_optimizer(saved: Any, own: Mapping[str, Any], state: TrainingState) -> None:
    """The same weights in the same groups with the recipe's numbers, and for each weight what a
    step of the optimizer keeps.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise ValueError("optimizer: no state and groups")
    groups, of_recipe = own["param_groups"], set(type(state.plan.recipe.optimizer).model_fields)
    if not isinstance(saved["param_groups"], list) or len(saved["param_groups"]) != len(groups):
        raise ValueError(f"optimizer: other groups than the {len(groups)} of this run")
    for number, (found, group) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if not isinstance(found, Mapping):
            raise ValueError(f"optimizer: group {number} is {type(found).__name__}")
        for name in {"params"} | (of_recipe & set(group) & set(found)):
            if type(found.get(name)) is not type(group[name]) or found[name] != group[name]:
                raise ValueError(f"optimizer: {name} of group {number} is not this run's")
        if type(found.get("lr")) not in (int, float):
            raise ValueError(f"optimizer: lr of group {number} is {found.get('lr')!r}"[:200])
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    _check_moments(saved["state"], weights, state)


def _check_moments(saved: Any, weights: list[torch.Tensor], state: TrainingState) -> None:
    kinds = _kept_by_a_step(state)
    if not isinstance(saved, Mapping) or not all(
        type(key) is int and 0 <= key < len(weights) and isinstance(of_weight, Mapping)
        for key, of_weight in saved.items()
    ):
        raise ValueError("optimizer: its state is not by the numbers of the weights")
    for number, of_weight in saved.items():
        weight = weights[number]
        if kinds is None or weight.numel() == 1:  # of one number every tensor is as the weight
            continue
        found = {name: _kept_kind(value, weight) for name, value in of_weight.items()}
        if found != kinds:
            odd = sorted(map(str, set(found.items()) ^ set(kinds.items())))
            raise ValueError(f"optimizer: state of weight {number}: {odd[0]}"[:200])


def _kept_by_a_step(state: TrainingState) -> dict[str, str] | None:
    """What one step of the run's optimizer keeps of a weight, by name; None where that depends on
    the weight's shape, as for factored moments.
    """
    seen = []
    for shape in ((7,), (5, 7), (5, 7, 3, 3)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.ones(shape)
        made = state.plan.recipe.optimizer.build([{"params": [weight], "weight_decay": 0.0}], 1e-3)
        made.step()
        seen.append({name: _kept_kind(value, weight) for name, value in made.state[weight].items()})
    is_known = all(kinds == seen[0] and "other" not in kinds.values() for kinds in seen)
    return seen[0] if is_known else None


def _kept_kind(value: Any, weight: torch.Tensor) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.shape == weight.shape:
        return "as the weight"
    return "a number" if value.numel() == 1 else "other"
