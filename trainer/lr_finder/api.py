"""An LR finder run of one number of a recipe: which value to train with, measured along the
recipe's own training path.

request     what was asked                  Request
setup       plan, data, lengths             set_up: nothing is trained
trials      from initial weights            trial.Trials, each along the training path of a run
decision    ramps, probes, candidates       candidates.decide, from curves alone
result      with its picture and its files  LRFinderResult
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from trainer.ablation.cells import overrides_text
from trainer.base.commands import command
from trainer.base.errors import UserError, did_you_mean
from trainer.base.settings import Settings, make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import OpenedData, open_data
from trainer.data.patches import planned_over
from trainer.data.profile import data_folder
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.lr_finder.baseline import FEW_HELD, FEW_TRAIN, check_hold_out, hold_out
from trainer.lr_finder.candidates import CONSTANT_LEVEL, Lengths, decide, lengths_for
from trainer.lr_finder.output import lr_find_name, write_results
from trainer.lr_finder.plots import draw
from trainer.lr_finder.ramp import Scalar, check_effect, find_scalar, ramp_values, without_schedule
from trainer.lr_finder.rules import CURVES, LEAST_POINTS, BaselineLosses, Suggestion
from trainer.lr_finder.trial import TrialFolder, TrialLog, Trials
from trainer.models.build import check_model_name
from trainer.notebook import NotebookFigure
from trainer.recipe import tree
from trainer.recipe.overrides import overrides_of
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.schema import Recipe
from trainer.runs.job import Job, plan_of, with_content
from trainer.runs.lock import acquire
from trainer.runs.own_runs import TRIALS
from trainer.tasks import task_of
from trainer.tasks.constant import equal_odds_loss

_MOST_SEEDS, _MOST_STEPS = 100, 10_000
_CLASSES_LEVEL = "the loss of always predicting the class shares"


@dataclass(frozen=True)
class Request:
    """What a user asked of a LR finder run, as they wrote it.

    ramp: "exponential" or "linear" for the learning rate, or the path of any other number. low,
    high, num_steps: None for the defaults. curve: which losses the rules read, "train", "heldout"
    or "both"; None: both where they mean the same at every value, else heldout, whose loss stays
    the recipe's own.
    """

    ramp: str = "exponential"
    low: float | None = None
    high: float | None = None
    num_steps: int | None = None
    num_seeds: int = 3
    curve: str | None = None


@dataclass(frozen=True)
class Setup:
    """All that a LR finder run needs, nothing yet trained.

    plan: of the run that the value is for. trial_plan: of a trial, over what the held-out slice
    leaves of train.
    """

    job: Job
    request: Request
    settings: Settings
    plan: Plan
    trial_plan: Plan
    data: OpenedData
    data_fingerprint: str
    content_sha256: str | None
    scalar: Scalar
    values: np.ndarray
    lengths: Lengths

    @property
    def curve(self) -> str:
        """Which losses the rules read: a training loss means the same at every learning rate, not
        at every smoothing.
        """
        is_the_same = self.scalar.is_rate or self.scalar.section == "optimizer"
        return self.request.curve or ("both" if is_the_same else "heldout")

    @property
    def asked(self) -> dict[str, Any]:
        """What the curves depend on, beside the run's own science."""
        return {
            "ramp": self.scalar.label,
            "from": float(self.values[0]),
            "to": float(self.values[-1]),
            "middle": float(self.values[len(self.values) // 2]),
            "curve": self.curve,
            "lengths": dataclasses.asdict(self.lengths),
            "precision": self.settings.precision,
            "device": self.settings.device.partition(":")[0],
            # images rewritten under the same names and sizes are other images
            "content_sha256": self.content_sha256,
        }

    @property
    def name(self) -> str:
        """Of the folder under runs/."""
        return lr_find_name(self.plan, self.data_fingerprint, self.asked)


@dataclass(frozen=True)
class LRFinderResult:
    """What a LR finder run found. suggestion: the value and the reason, every curve, every rule
    with its spread.

    plan: of the run that the value is for. num_held_out: images of the slice. folder: None where
    nothing was written. equal_odds_nats: the loss on the slice of answers that say the same of
    every class.
    """

    suggestion: Suggestion
    scalar: Scalar
    values: np.ndarray
    plan: Plan
    job: Job
    settings: Settings
    data_fingerprint: str
    num_held_out: int
    asked: dict[str, Any]
    folder: Path | None
    equal_odds_nats: float | None = None

    @property
    def command(self) -> str | None:
        """What trains with the suggested value; None without one."""
        if self.suggestion.value is None:
            return None
        return train_command(self.job, self.plan.recipe, self.scalar, self.suggestion.value)

    def __repr__(self) -> str:
        value = self.suggestion.value
        found = "" if value is None else f"{self.scalar.label} {value:.3g}: "
        return f"{found}{self.suggestion.reason}"

    def plot(self) -> NotebookFigure:
        """The picture, a matplotlib Figure: curves, rules, the suggestion, the candidates."""
        return draw(self)


def set_up(
    job: Job,
    request: Request,
    machine: dict[str, Any],
    ranks: Ranks = alone(),
    out: Console = Console(quiet=True),
    stop: StopRequest = StopRequest(),
) -> Setup:
    """Everything but the training. machine: what make_settings takes.

    Raises UserError for whatever does not fit: recipe, model, data set, range.
    """
    _check(request)
    plan = plan_of(job, check_hold_out)
    scalar = find_scalar(plan.recipe, request.ramp)
    lengths = lengths_for(plan.num_steps, request.num_seeds, request.num_steps)
    values = ramp_values(
        plan.recipe, scalar, request.ramp, request.low, request.high, lengths.num_ramp_steps
    )
    check_model_name(plan.model)
    with ranks.first_here():
        opened = open_data(plan.profile, data_folder(job.data, job.data_dir))
    opened = with_content(opened, out, stop, ranks)
    settings = make_settings(**machine, in_memory=opened.train.is_in_memory)
    cut = hold_out(opened, plan.recipe.batch)
    made = trial_plan(plan, cut)
    check_effect(made, scalar, float(values[0]), float(values[-1]))
    return Setup(
        job=job,
        request=request,
        settings=settings,
        plan=plan,
        trial_plan=made,
        data=cut,
        data_fingerprint=opened.fingerprint,
        content_sha256=opened.content_sha256,
        scalar=scalar,
        values=values,
        lengths=lengths,
    )


def _check(request: Request) -> None:
    if request.curve not in (None, *CURVES):
        near = did_you_mean(request.curve, CURVES)
        raise UserError(f"curve={request.curve}: unknown{near}; valid: {', '.join(CURVES)}")
    if not 1 <= request.num_seeds <= _MOST_SEEDS:
        valid = f"1 to {_MOST_SEEDS} (default: seeds=3)"
        raise UserError(f"seeds={request.num_seeds}: out of range; valid: {valid}")
    if request.num_steps is not None and not LEAST_POINTS <= request.num_steps <= _MOST_STEPS:
        valid = f"{LEAST_POINTS} to {_MOST_STEPS}, such as steps=200"
        raise UserError(f"steps={request.num_steps}: out of range; valid: {valid}")


def trial_plan(plan: Plan, cut: OpenedData) -> Plan:
    """The plan of trials: the recipe's own science on what the slice leaves of train, without
    schedule and average.
    """
    numbers = {"num_train": cut.train.num_images, "num_val": cut.val.num_images}
    plan = make_plan(
        without_schedule(plan.recipe),
        model=plan.model,
        profile=plan.profile.model_copy(update=numbers),
        seed=plan.seed,
        page_digest=plan.page_digest,
        deviations=plan.deviations,
        world_size=plan.world_size,
        bad_images=plan.bad_images,
    )
    return planned_over(plan, cut.train)


def run(
    setup: Setup,
    is_written: bool = True,
    log: TrialLog | None = None,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = alone(),
    watch: Watch = Watch(),
) -> LRFinderResult:
    """Run the trials that are not there yet, decide, and write the files. Every rank goes through
    this; rank 0 writes.

    check: called before every step, by all ranks; watch.check: while this one waits for images.
    What they raise ends the LR finder run, and finished trials stay.

    Raises LockedError where another process works in the folder.
    """
    folder = setup.settings.runs / setup.name if is_written else None
    if not (folder and ranks.is_first):
        return _decided(setup, folder, log, check, ranks, watch)
    with acquire(folder) as lock:
        if setup.job.again:
            for path in [folder / "suggestion.json", *(folder / TRIALS).glob("*.json")]:
                path.unlink(missing_ok=True)

        def check_both() -> None:
            lock.check()
            check()

        found = _decided(setup, folder, log, check_both, ranks, watch)
        write_results(found)
    return found


def _decided(
    setup: Setup,
    folder: Path | None,
    log: TrialLog | None,
    check: Callable[[], None],
    ranks: Ranks,
    watch: Watch,
) -> LRFinderResult:
    shape = schedule_shape(setup.plan, setup.lengths.num_race_steps)
    trials = Trials(
        setup.trial_plan,
        setup.settings,
        setup.data,
        setup.scalar,
        rate_shape=shape,
        kept=TrialFolder(folder / TRIALS if folder else None),
        log=log,
        check=check,
        ranks=ranks,
        watch=watch,
    )
    first = setup.plan.seed
    suggestion = decide(
        trials,
        seeds=range(first, first + setup.lengths.num_seeds + setup.lengths.num_more_seeds),
        values=setup.values,
        baselines=baseline_losses(setup),
        lengths=setup.lengths,
        shape=shape if setup.scalar.is_rate else np.ones_like(shape),
        curve=setup.curve,
        is_rate=setup.scalar.is_rate,
        own=setup.scalar.own,
        level_name=CONSTANT_LEVEL if setup.plan.recipe.task else _CLASSES_LEVEL,
        obstacle=obstacle(setup.plan.profile.num_train, setup.job.weights is not None),
    )
    return LRFinderResult(
        suggestion=on_few_images(suggestion, setup.data.val.num_images),
        scalar=setup.scalar,
        values=setup.values,
        plan=setup.plan,
        job=setup.job,
        settings=setup.settings,
        data_fingerprint=setup.data_fingerprint,
        num_held_out=setup.data.val.num_images,
        asked=setup.asked,
        folder=folder,
        equal_odds_nats=(
            equal_odds_loss(setup.trial_plan, setup.data.val.labels)
            if setup.trial_plan.recipe.task is None
            else None
        ),
    )


def obstacle(num_train: int, has_weights: bool) -> str:
    """What keeps candidates from learning where longer trials would not help, and its remedy; else
    empty.
    """
    if num_train >= FEW_TRAIN:
        return ""
    remedy = "add images" if has_weights else "start from weights=, or add images"
    return f"{num_train} training images are too few to learn much from; {remedy}"


def on_few_images(suggestion: Suggestion, num_held_out: int) -> Suggestion:
    """The suggestion; where the slice is small, its reason begins with how little that tells.

    The seeds share the slice, so that they may agree on what is chance.
    """
    if suggestion.value is None or num_held_out >= FEW_HELD:
        return suggestion
    few = f"judged on only {num_held_out} images, the same for all seeds, which hardly tell"
    return dataclasses.replace(suggestion, reason=f"{few} rates apart; {suggestion.reason}")


def baseline_losses(setup: Setup) -> BaselineLosses:
    """The bias-only levels of both curves; none for training where the scalar itself moves it, or a
    teacher does.
    """
    task, train = task_of(setup.trial_plan, setup.settings), None
    moves = setup.scalar.section in ("loss", "smoothing", "mix")
    if not moves and not setup.trial_plan.recipe.distill:
        train = task.constant_loss(setup.data.train)
    return BaselineLosses(train, task.constant_loss(setup.data.val, is_mixed=False))


def schedule_shape(plan: Plan, num_steps: int) -> np.ndarray:
    """A run's learning rates as shares of the peak, at num_steps moments spread evenly over it:
    [num_steps].
    """
    moments = ((np.arange(num_steps) + 0.5) * plan.num_steps / num_steps).astype(int)
    return np.array([plan.lr_at(int(step)) for step in moments]) / plan.recipe.lr.peak


def train_command(job: Job, recipe: Recipe, scalar: Scalar, value: float) -> str:
    """`make recipe=... set="... lr.peak=..."`: the user's own items, but for those that this
    replaces.
    """
    items = _with_ends(recipe, scalar, float(f"{value:.3g}"))
    ours = {
        label: each if isinstance(each, int) else float(f"{each:.3g}")
        for label, each in items.items()
    }
    given = overrides_of(job.overrides)
    text = overrides_text({label: given[label] for label in given if label not in ours} | ours)
    places = {"recipe": job.recipe, "model": job.model, "data": job.data, "data_dir": job.data_dir}
    return command(**places, weights=job.weights and job.weights.word, set=text)


def _with_ends(recipe: Recipe, scalar: Scalar, value: float) -> dict[str, float | int]:
    """The value and, where a warm-up would now start above it or a schedule end there, those in
    proportion.
    """
    given = scalar.override(value)
    if not scalar.is_rate:
        return given
    lr, ends = recipe.lr, dict[str, Any]()
    if lr.warmup_from is not None and lr.warmup_from > value:
        ends["lr.warmup_from"] = lr.warmup_from * value / lr.peak
    if lr.schedule.end_rate() > value:
        ends |= tree.changed("lr.schedule", lr.schedule, lr.schedule.scaled_by(value / lr.peak))
    return given | ends
