"""Weights that do not train: all but some, for the whole run, until an epoch or from one on."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable

from torch import nn

from trainer.base.errors import PlanError
from trainer.models.edit.replacement import classifier_of, is_norm
from trainer.models.spec import Freeze

HEAD = "head"


def frozen_names(model: nn.Module, freeze: Freeze) -> list[str]:
    """The names of the weights that a recipe freezes, in the model's order.

    Raises PlanError for a name that no weight has, and where nothing is left to freeze.
    """
    names = [name for name, _ in model.named_parameters()]
    trained: set[str] = set()
    for pattern in freeze.all_but:
        found = _head_names(model) if pattern == HEAD else fnmatch.filter(names, pattern)
        if not found:
            raise PlanError(
                f"model.freeze.all_but: no weight of this model is named {pattern!r}",
                f'use "{HEAD}" or names as {", ".join(names[-3:])}',
                path=("model", "freeze", "all_but"),
            )
        trained.update(found)
    frozen = [name for name in names if name not in trained]
    if not frozen:
        raise PlanError(
            "model.freeze.all_but: names all weights, none would be frozen",
            "leave model.freeze out",
            path=("model", "freeze"),
        )
    return frozen


def freeze_for_good(model: nn.Module, freeze: Freeze) -> None:
    """Freeze what never trains. Raises PlanError as `frozen_names` does."""
    weights = dict(model.named_parameters())
    for name in frozen_names(model, freeze):
        if freeze.is_for_good:
            weights[name].requires_grad_(False)


def _head_names(model: nn.Module) -> list[str]:
    head = classifier_of(model)
    own = {id(weight) for weight in head.parameters()} if head is not None else set()
    return [name for name, weight in model.named_parameters() if id(weight) in own]


class Freezing:
    """Keeps weights from training, and the running statistics of their norms from moving, up to a
    step or from one on.

    A norm that is frozen normalizes by its running statistics, as in evaluation.
    """

    def __init__(self, model: nn.Module, freeze: Freeze | None, steps_per_epoch: int) -> None:
        names = set(frozen_names(model, freeze)) if freeze else set()
        frozen = [weight for name, weight in model.named_parameters() if name in names]
        # what a model itself keeps from training is not released
        self._weights = [weight for weight in frozen if weight.requires_grad]
        ids = {id(weight) for weight in frozen}
        self._norms = [
            module
            for module in model.modules()
            if is_norm(module) and _all_within(module.parameters(recurse=False), ids)
        ]
        until = freeze.until_epochs if freeze else 0.0
        first = freeze.from_epochs if freeze else None
        self.until_step = math.inf if until is None else _step_of(until, steps_per_epoch)
        self.from_step = 0 if first is None else _step_of(first, steps_per_epoch)

    def set(self, step: int) -> bool:
        """Freeze or release the weights for a step; were others trained at the step before?"""
        is_frozen = self.from_step <= step < self.until_step
        is_changed = any(weight.requires_grad == is_frozen for weight in self._weights)
        for weight in self._weights if is_changed else ():
            weight.requires_grad_(not is_frozen)
        for norm in self._norms:  # an evaluation sets the modes of all modules
            norm.train(not is_frozen)
        return is_changed


def _step_of(epochs: float, steps_per_epoch: int) -> int:
    return math.ceil(round(epochs * steps_per_epoch, 6))


def _all_within(weights: Iterable[nn.Parameter], ids: set[int]) -> bool:
    found = [id(weight) in ids for weight in weights]
    return bool(found) and all(found)
