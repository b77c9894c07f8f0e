"""One trial is the recipe's own road with given values; what ends it, what it records, what it
leaves alone.
"""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import trainer.lr_finder.baseline
import trainer.lr_finder.trial
from support import ranged
from support.plans import small_plan
from support.ranked import on_ranks
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.lr_finder.api import trial_plan
from trainer.lr_finder.baseline import HeldOut, hold_out
from trainer.lr_finder.ramp import RATE, find_scalar, without_schedule
from trainer.lr_finder.trial import MOST_SKIPPED, TrialFolder, TrialLog, Trials, _Record, untouched

VALUES = np.geomspace(1e-4, 1e-2, 6)


@pytest.fixture(autouse=True, scope="module")
def _small_slice():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.lr_finder.baseline, "MOST_IMAGES", 40)
        yield


def trials(overrides="", recipe="A2", model="test_resnet", scalar=RATE, **more):
    plan = small_plan(recipe, model, f"batch.norm_images=32 {overrides}")
    cut = hold_out(open_data(plan.profile, None), plan.recipe.batch)
    settings = make_settings("cpu", workers="0")
    scalar = find_scalar(plan.recipe, scalar)
    return Trials(
        trial_plan(plan, cut),
        settings,
        cut,
        scalar,
        np.ones(len(VALUES)),
        TrialFolder(None),
        **more,
    )


@pytest.fixture(scope="module")
def one():
    """Trials whose curves all tests of this file may look at."""
    return trials()


def test_a_trial_is_the_steps_of_a_run_with_its_values_as_learning_rates(
    one, tmp_path, monkeypatch
):
    made_fast = []
    monkeypatch.setattr("trainer.lr_finder.trial.set_algorithms", made_fast.append)
    curve = one(3, VALUES, "ramp")
    assert made_fast == [one.settings]
    plan = replace(one.plan, seed=3, num_steps=len(VALUES))
    state = TrainingState(plan, one.settings)
    window = one.data.train_stream(plan, one.settings, 0)
    losses = []
    for step, rate in enumerate(VALUES):
        lr = plan.recipe.lr.model_copy(update={"peak": float(rate)})
        state.plan = replace(plan, recipe=plan.recipe.model_copy(update={"lr": lr}))
        losses.append(optimizer_step(state, window, step).item())
        assert state.optimizer.param_groups[0]["lr"] == rate
    assert curve.losses.tolist() == losses
    assert curve.values.tolist() == VALUES.tolist()
    assert (curve.ended, curve.seed, curve.purpose) == ("ramp", 3, "ramp")
    assert not list(tmp_path.iterdir())


def test_each_seed_has_weights_and_an_order_of_its_own_and_repeats_itself(one):
    first, second = one(0, VALUES, "ramp"), one(1, VALUES, "ramp")
    assert first.losses[0] != second.losses[0] and first.start_loss != second.start_loss
    assert trials()(0, VALUES, "ramp").losses.tolist() == first.losses.tolist()


def test_the_first_weights_are_measured_once_unless_the_model_is_another(monkeypatch):
    measured = []
    loss = HeldOut.loss

    def counted(self, model):
        measured.append(loss(self, model))
        return measured[-1]

    monkeypatch.setattr(HeldOut, "loss", counted)
    found = trials()
    starts = [found(0, VALUES[:2] * factor, "probe").start_loss for factor in (1, 2)]
    assert len(measured) == 3 and starts == [measured[0]] * 2  # of each trial's end one more
    found = trials("drop_path=0.05", scalar="drop_path")
    found(0, np.array([0.1, 0.2]), "probe"), found(0, np.array([0.2, 0.3]), "probe")
    assert len(measured) == 3 + 4


def test_the_slice_is_measured_after_the_last_step_and_in_a_ramp_along_the_way(one):
    steps, losses = one(0, VALUES, "ramp").held_out
    assert steps.tolist() == list(range(len(VALUES))) and np.isfinite(losses).all()
    assert one(0, VALUES, "race").held_out[0].tolist() == [len(VALUES) - 1]
    # the same values, so the same weights after them, whatever the trial was for
    assert one(0, VALUES, "race").held_out[1][-1] == losses[-1]


def test_no_schedule_no_average_is_left_of_a_page():
    page = without_schedule(small_plan("convnext", "test_convnext").recipe)
    assert page.average is None and page.lr.num_warmup_steps(10) == 0
    assert {page.lr.at(step, 10, 2) for step in range(20)} == {page.lr.peak}


@pytest.mark.parametrize("model", ["test_convnext"])
def test_the_cut_into_micro_batches_does_not_move_the_curve_of_a_model_without_batch_statistics(
    model,
):
    """Item by item the same images: 1, 2 and 4 micro-batches of a step of 32."""
    curves = []
    for norm_images in (32, 16, 8):
        made = trials(
            f"batch.norm_images={norm_images} mix=null drop_path=null repeats=null", model=model
        )
        curves.append(made(0, np.geomspace(1e-4, 3e-2, 8), "ramp"))
    for curve in curves[1:]:
        np.testing.assert_allclose(curve.losses, curves[0].losses, rtol=0, atol=1e-6)
        np.testing.assert_allclose(curve.held_out[1], curves[0].held_out[1], rtol=0, atol=1e-6)


def with_losses(monkeypatch, change):
    """The losses of a trial's steps, each as `change(step, loss)` makes it."""
    real = trainer.lr_finder.trial.optimizer_step

    def step_of(state, window, step):
        return change(step, real(state, window, step))

    monkeypatch.setattr(trainer.lr_finder.trial, "optimizer_step", step_of)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_trial_there_and_what_was_measured_stays(
    one, monkeypatch, bad
):
    with_losses(monkeypatch, lambda step, loss: loss * bad if step == 4 else loss)
    curve = trials()(0, VALUES, "ramp")
    assert curve.ended == "not a number"
    assert curve.losses.tolist() == one(0, VALUES, "ramp").losses.tolist()[:4]
    assert curve.values.tolist() == VALUES.tolist()[:4] and curve.held_out[0].tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_weights_that_are_no_numbers_end_it_even_where_the_steps_loss_still_is_one(monkeypatch):
    made = trials()
    monkeypatch.setattr(made.held_out, "loss", lambda model: math.nan)
    curve = made(0, VALUES, "ramp")
    assert curve.ended == "not a number" and len(curve.losses) == 1 and not len(curve.held_out[0])


class Scaler:
    """A gradient scaler that finds infinite gradients at some of its steps: as fp16 does at the
    start, and later.
    """

    skips: frozenset = frozenset()

    def __init__(self, device, enabled):
        self.size, self.count = 65536.0, -1

    def is_enabled(self):
        return True

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        self.count += 1

    def step(self, optimizer):
        if self.count not in self.skips:
            optimizer.step()

    def update(self):
        self.size *= 0.5 if self.count in self.skips else 1.0

    def get_scale(self):
        return self.size


def test_a_step_that_fp16_skips_is_not_recorded_and_its_value_is_used_by_the_next(monkeypatch):
    monkeypatch.setattr(Scaler, "skips", frozenset({0, 1, 4}))
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    rates = []
    with_losses(monkeypatch, lambda step, loss: rates.append((step, loss.item())) or loss)
    made = trials()
    curve = made(0, VALUES, "ramp")
    taken = [loss for step, loss in rates if step not in Scaler.skips]
    assert [step for step, _ in rates] == list(range(len(VALUES) + 3))
    assert (
        curve.losses.tolist() == taken
        and curve.values.tolist() == VALUES.tolist()
        and curve.ended == "ramp"
    )


def test_a_trial_that_fp16_skips_for_ever_ends(monkeypatch):
    monkeypatch.setattr(Scaler, "skips", frozenset(range(10_000)))
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(
        trainer.lr_finder.trial,
        "optimizer_step",
        lambda state, window, step: (
            state.scaler.unscale_(None),
            state.scaler.update(),
            torch.ones(()),
        )[2],
    )
    curve = trials()(0, VALUES, "ramp")
    assert (curve.ended, len(curve.losses)) == ("not a number", 0)
    assert MOST_SKIPPED > 16  # halvings from 2**16 to 1


def ends_at(losses):
    """The number of losses after which a trial is called diverged; None if never."""
    record = _Record(start_loss=losses[0])
    for number, loss in enumerate(losses, 1):
        record.add(1.0, loss)
        if record.has_diverged():
            return number
    return None


def test_a_blow_up_ends_a_trial_and_spikes_and_noise_do_not():
    noise = np.random.default_rng(0).normal(0, 0.05, 200)
    flat = 2.3 + noise
    assert ends_at(flat) is None
    spiked = flat.copy()
    spiked[[2, 3, 50, 51, 120]] = 1e6
    assert ends_at(spiked) is None
    falling = np.linspace(2.3, 0.3, 200) + noise
    assert ends_at(falling) is None
    blown = np.concatenate([falling[:150], falling[149] * 1.3 ** np.arange(50)])
    lowest = falling[:150].min()
    limit = lowest + 4 * (2.3 - lowest)
    assert abs(ends_at(blown) - (150 + np.flatnonzero(blown[150:] > limit)[0] + 3)) <= 2
    assert (
        ends_at([2.3, 2.4, *(1e4,) * 10]) == 5
    )  # from the start: twice its height is more than noise


def test_what_was_kept_is_not_run_again(one, monkeypatch):
    one(0, VALUES, "ramp")
    monkeypatch.setattr(trainer.lr_finder.trial, "optimizer_step", None)
    told = []
    one.log = TrialLog()
    one.log.end = lambda curve, asked, was_kept: told.append(was_kept)
    assert one(0, VALUES, "ramp").losses.tolist() == one(0, VALUES, "ramp").losses.tolist()
    assert told == [True, True]


def test_a_candidate_is_logged_by_its_own_value_which_its_schedule_need_not_reach(one):
    told, shape = [], np.linspace(0.9, 0.0, len(VALUES))
    made = trials(log=TrialLog())
    made.rate_shape = shape
    made.log.end = lambda curve, asked, was_kept: told.append(asked)
    made(0, 0.04 * shape, "race")
    made(0, VALUES, "ramp")
    assert told == pytest.approx([0.04, VALUES[-1]])


def test_in_a_race_of_another_number_the_learning_rate_follows_the_pages_schedule(monkeypatch):
    made = trials(scalar="weight_decay")
    made.rate_shape = np.linspace(1.0, 0.0, len(VALUES))
    rates = []
    real = trainer.lr_finder.trial.optimizer_step

    def step_of(state, window, step):
        loss = real(state, window, step)
        rates.append(
            (state.optimizer.param_groups[0]["lr"], state.optimizer.param_groups[0]["weight_decay"])
        )
        return loss

    monkeypatch.setattr(trainer.lr_finder.trial, "optimizer_step", step_of)
    peak = made.plan.recipe.lr.peak
    made(0, np.full(len(VALUES), 0.3), "race")
    assert rates == [(pytest.approx(peak * share), 0.3) for share in made.rate_shape]
    rates.clear()
    made(0, np.full(len(VALUES), 0.3), "probe")
    assert rates == [(peak, 0.3)] * len(VALUES)


def test_decay_that_counts_in_shares_of_the_peak_follows_each_value():
    """decoupled_sgd: at its peak a weight loses weight_decay of itself, whatever that peak is."""
    made = trials(recipe="mosaic-mild")
    given = np.array([0.01, 0.1, 1.0])
    peaks, rates = made._rates(given, "ramp")
    assert peaks.tolist() == rates.tolist() == given.tolist()
    assert made._rates(given, "race")[0].tolist() == [1.0, 1.0, 1.0]
    seen = []
    real = torch.optim.SGD.step

    class Seen:
        def __call__(self, optimizer, *given):
            seen.append([(group["initial_lr"], group["lr"]) for group in optimizer.param_groups])
            return real(optimizer, *given)

    step = Seen()
    torch.optim.SGD.step = lambda self, *given: step(self, *given)
    try:
        made(0, given, "ramp")
    finally:
        torch.optim.SGD.step = real
    assert [pairs[0] for pairs in seen] == [(value, value) for value in given]


def states():
    generators = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    return (
        *generators,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was_also_by_an_error(fails):
    before = states()
    try:
        with untouched("cpu"):
            random.random(), np.random.rand(), torch.rand(1), torch.manual_seed(5)
            torch.set_num_threads(2)
            torch.set_default_dtype(torch.float64)
            torch.backends.cudnn.benchmark = True
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert states() == before


# ---- several ranks


@pytest.mark.drill
def test_two_ranks_find_the_curve_of_one_and_rank_0_alone_writes(tmp_path):
    (alone,) = on_ranks(ranged.trial, 1, str(tmp_path / "one"))
    both = on_ranks(ranged.trial, 2, str(tmp_path / "two"))
    assert both[0] == both[1]
    np.testing.assert_allclose(both[0]["losses"], alone["losses"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        both[0]["held_out"]["losses"], alone["held_out"]["losses"], rtol=0, atol=1e-6
    )
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["0"]


@pytest.mark.drill
def test_where_one_rank_meets_nan_all_end_at_that_step(tmp_path):
    for found in on_ranks(ranged.trial, 2, str(tmp_path), 1, 3):
        assert (found["ended"], len(found["losses"])) == ("not a number", 3)
