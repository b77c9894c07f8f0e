"""One number of a recipe, set anew before every step of a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from trainer.base.errors import ConfigError, OverrideError, UserError, did_you_mean
from trainer.components.learning_rate import LearningRate
from trainer.components.param_groups import param_groups
from trainer.components.schedules import Constant
from trainer.engine.precise_norm import StepStatistics
from trainer.engine.state import TrainingState, as_it_runs
from trainer.models.build import assembled
from trainer.recipe import tree
from trainer.recipe.check import label_of, value_at
from trainer.recipe.plan import Plan
from trainer.recipe.schema import ABOUT, Recipe, apply_overrides

RATE = "lr.peak"
SPACINGS = ("exponential", "linear")
FROM, TO = 1e-6, 10.0  # of a learning rate
_WIDE = 10.0  # a range this many times as high as it starts is walked in equal ratios

# What stays as it is from the first step of a trial to its last, and so has no ramp.
_FIXED = {
    "batch": "how images are cut into steps",
    "epochs": "the length of the run",
    "repeats": "the order of the images",
    "augment_splits": "the images of a micro-batch",
    "image": "the size of the images",
    "average": "the average, which a LR finder run leaves out,",
    "precise_norm": "the statistics of an evaluation, which a LR finder run has none of,",
    "early_stopping": "the end of a run, which a LR finder run has not,",
    "lr": "the schedule, in whose place a ramp stands,",
}


class RampError(UserError):
    """A number that has no ramp, or a range that it cannot take."""


@dataclass(frozen=True)
class Scalar:
    """A number of a recipe by its path. own: the recipe's value, None where it is off. is_whole: it
    takes no fractions.
    """

    label: str
    own: float | None
    is_whole: bool = False

    @property
    def is_rate(self) -> bool:
        """Is it the learning rate?"""
        return self.label == RATE

    @property
    def is_of_model(self) -> bool:
        """Is a model with another value built anew, with first weights of its own?"""
        return self.section in ("model", "drop_path")

    @property
    def section(self) -> str:
        """The recipe's key that it stands under, or itself."""
        return self.label.partition(".")[0]

    def used(self, value: float) -> float:
        """What a step asked for `value` really uses."""
        return float(round(value)) if self.is_whole else float(value)

    def override(self, value: float) -> dict[str, float | int]:
        """The recipe's own item for a value."""
        return {self.label: round(value) if self.is_whole else float(value)}

    def plan_at(self, plan: Plan, value: float, rate: float) -> Plan:
        """A trial's plan with the scalar at a value and every step's learning rate at `rate`."""
        recipe = plan.recipe
        if not self.is_rate:
            recipe = apply_overrides(recipe, self.override(value), "ramp")[0]
        lr = recipe.lr.model_copy(update={"peak": rate})
        return replace(plan, recipe=recipe.model_copy(update={"lr": lr}))


def without_schedule(recipe: Recipe) -> Recipe:
    """A recipe as a trial follows it: a constant learning rate, no warm-up, no average."""
    lr = LearningRate(
        peak=recipe.lr.peak,
        updated="per_step",
        scaling=recipe.lr.scaling,
        schedule=Constant(),
    )
    without = dict.fromkeys(("average", "precise_norm", "early_stopping"))
    return recipe.model_copy(update={"lr": lr, **without})


def find_scalar(recipe: Recipe, text: str) -> Scalar:
    """The number that ramp= means: a spacing means the learning rate, a last name that is there
    once its whole path.

    Raises RampError for what is no number, and for what has no meaning when it changes from step to
    step.
    """
    values = tree.plain(recipe)
    label = RATE if text in SPACINGS else _whole_path(values, text)
    try:
        path = tree.find(Recipe, values, label)
    except ConfigError as error:
        raise error.raised_as(RampError, place=f"ramp={text}") from None
    label, own = label_of(values, path), value_at(values, path)
    section = str(path[0])
    why = _FIXED.get(section) or ("metadata" if section in ABOUT else None)
    if why and label != RATE:
        raise RampError(
            f"ramp={text}: {why} is one for a whole trial; use {RATE} or optimizer.weight_decay"
        )
    inside = [f"{label}.{key}" for key in _parts(own)]
    if inside:
        valid = ", ".join(inside[:4])
        raise RampError(f"ramp={text}: {label} is more than one number; valid: {valid}")
    if isinstance(own, (bool, str)):
        raise RampError(
            f"ramp={text}: {label} is {own!r}, not a number; use {RATE} or optimizer.weight_decay"
        )
    return Scalar(label, None if own is None else float(own), is_whole=_is_whole(recipe, label))


def _parts(value: object) -> list[str]:
    """The keys within a value, those of its items that have names by name; none for a single
    one.
    """
    if isinstance(value, Mapping):
        return [key for key in value if key != "name"]
    if isinstance(value, tuple):
        return [
            str(item["name"]) if isinstance(item, Mapping) else str(place)
            for place, item in enumerate(value)
        ]
    return []


def _whole_path(values: Mapping, text: str) -> str:
    labels = list(tree.leaves({key: values[key] for key in values if key not in ABOUT}))
    found = [label for label in labels if f".{label}".endswith(f".{text}")]
    if not found and "." not in text and text not in Recipe.model_fields:
        near = did_you_mean(text, sorted({label.rpartition(".")[2] for label in labels}))
        raise RampError(
            f"ramp={text}: the recipe has no such number{near}; use {RATE} or"
            " optimizer.weight_decay"
        )
    if len(found) > 1 and text not in found:
        raise RampError(f"ramp={text}: there is more than one; valid: {', '.join(found)}")
    return found[0] if len(found) == 1 else text


def _is_whole(recipe: Recipe, label: str) -> bool:
    try:
        apply_overrides(recipe, {label: 1.5}, "ramp")
    except OverrideError as error:
        return error.kind in ("int_type", "int_from_float")
    return False


def ramp_values(
    recipe: Recipe, scalar: Scalar, text: str, low: float | None, high: float | None, num_steps: int
) -> np.ndarray:
    """The values of a ramp's steps [num_steps], ascending: in equal ratios, or with ramp=linear in
    equal steps.

    Other numbers than the learning rate go in equal ratios too where their range starts above 0 and
    is tenfold or more.

    Raises RampError for a range that does not rise, or that the recipe cannot take.
    """
    low, high = _range(recipe, scalar, low, high)
    if not (np.isfinite([low, high]).all() and low < high):
        raise RampError(
            f"from={low:g} to={high:g}: the range does not rise; for {RATE} try from={FROM:g}"
            f" to={TO:g}"
        )
    if scalar.is_rate and low <= 0:
        raise RampError(f"from={low:g}: a learning rate's ramp starts above 0; use from={FROM:g}")
    for value in (low, high):
        apply_overrides(without_schedule(recipe), scalar.override(value), "ramp")
    is_linear = text == "linear" if scalar.is_rate else low <= 0 or high < _WIDE * low
    return np.linspace(low, high, num_steps) if is_linear else np.geomspace(low, high, num_steps)


def _range(
    recipe: Recipe, scalar: Scalar, low: float | None, high: float | None
) -> tuple[float, float]:
    """The range as far as it was given, else a hundredth to a hundred times the recipe's value, as
    far as the recipe goes.
    """
    if scalar.is_rate:
        return FROM if low is None else low, TO if high is None else high
    if low is not None and high is not None:
        return low, high
    if scalar.own:
        highs = [scalar.own * factor for factor in (100, 30, 10)] + [1.0, 0.999]
        fitting = (one for one in highs if one > scalar.own and _is_taken(recipe, scalar, one))
        high = next(fitting, None) if high is None else high
        low = scalar.own / 100 if low is None else low
        if high is not None:
            is_narrow = high < _WIDE * scalar.own
            return 0.0 if is_narrow and _is_taken(recipe, scalar, 0.0) else low, high
    raise RampError(f"ramp={scalar.label}: its range is not given; use from=<number> to=<number>")


def _is_taken(recipe: Recipe, scalar: Scalar, value: float) -> bool:
    try:
        apply_overrides(recipe, scalar.override(value), "ramp")
    except OverrideError:
        return False
    return True


def check_effect(plan: Plan, scalar: Scalar, low: float, high: float) -> None:
    """Refuse a number of the optimizer or the model that no step after the first would notice.

    Raises RampError.
    """
    is_clipping = scalar.label.startswith("optimizer.clip_")
    if is_clipping or not (scalar.section == "optimizer" or scalar.is_of_model):
        return
    rate = plan.recipe.lr.peak
    with torch.random.fork_rng(devices=[]):
        one, other = (scalar.plan_at(plan, value, rate) for value in (low, high))
        if scalar.section == "optimizer":
            first, last = (_hyperparameters(_optimizer_of(each, rate)) for each in (one, other))
            is_noticed = first != last
            why = f"{plan.recipe.optimizer.name} takes it in once, when it is built"
        else:
            models = [assembled(each)[0] for each in (one, other)]
            shapes = [
                {name: tensor.shape for name, tensor in model.state_dict().items()}
                for model in models
            ]
            if shapes[0] != shapes[1]:
                raise RampError(
                    f"ramp={scalar.label}: the model has other weights at every value; make a run"
                    " for each value"
                )
            is_noticed = _settings_of(models[0]) != _settings_of(models[1])
            why = "it makes the first weights, and no step after them"
    if not is_noticed:
        use = f'make a run for each value (set="{scalar.label}=...")'
        raise RampError(f"ramp={scalar.label}: {why}; {use}")


def _optimizer_of(plan: Plan, rate: float) -> torch.optim.Optimizer:
    """An optimizer of the recipe, over one weight that decays."""
    ours, weight = plan.recipe.optimizer, nn.Parameter(torch.zeros(1, 1))
    return ours.build([{"params": [weight], "weight_decay": ours.weight_decay}], lr=rate)


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict]:
    """What an optimizer reads at a step, group by group, but for weights and rate; then what it was
    built with.
    """
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return [*groups, dict(optimizer.defaults)]


def _settings_of(model: nn.Module) -> list[tuple]:
    """Every plain value that a model's modules hold beside their weights, and their kinds."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (
            type(module).__name__,
            {key: value for key, value in vars(module).items() if isinstance(value, plain)},
        )
        for module in model.modules()
    ]


class HyperparameterSetter:
    """The scalar of one running trial, turned to a value before each step.

    What the step reads from its plan (loss, smoothing, mixing, clipping, learning rate) comes with
    the plan. What the optimizer holds is taken from one that is built anew. What stands in the
    model's modules comes with a model that is built anew around the same weights.
    """

    def __init__(self, scalar: Scalar, state: TrainingState) -> None:
        self.scalar, self.state, self.plan = scalar, state, state.plan
        self._held = _hyperparameters(state.optimizer)

    def set(self, value: float, rate: float, peak: float) -> None:
        """Set the scalar. rate: the learning rate of the step; peak: of the run that the step
        stands for.
        """
        self.state.plan = self.scalar.plan_at(self.plan, value, rate)
        if self.scalar.is_of_model:
            self._rebuild()
        if self.scalar.is_rate or self.scalar.section == "optimizer":
            self._renew(peak)

    def _renew(self, peak: float) -> None:
        section, optimizer = self.state.plan.recipe.optimizer, self.state.optimizer
        fresh = _hyperparameters(section.build(param_groups(self.state.model, section), lr=peak))
        for kept, before, now in zip(
            [*optimizer.param_groups, optimizer.defaults], self._held, fresh, strict=True
        ):
            # only what the value has changed: some optimizers count their steps in their groups
            kept.update({key: now[key] for key in now if now[key] != before[key]})
        self._held = fresh

    def _rebuild(self) -> None:
        state = self.state
        before = dict(state.model.named_modules())
        with torch.random.fork_rng(devices=[]):
            model, _ = assembled(state.plan)
        for name, module in model.named_modules():
            if name in before:
                kept, own = before[name], {"recurse": False}
                tensors = *kept.named_parameters(**own), *kept.named_buffers(**own)
                for held, tensor in tensors:
                    setattr(module, held, tensor)
        state.model = as_it_runs(model, state.settings, state.plan.recipe.image.train_px).train(
            state.model.training
        )
        state.step_statistics = StepStatistics(model, state.settings.activation_checkpointing)
