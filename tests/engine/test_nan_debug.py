"""debug=nan names where numbers stop being finite, dead gradients and spikes, and moves no bit."""

import math

import pytest
import torch

from support.commands import rsb
from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine import nan_debug, train
from trainer.engine.nan_debug import FEWEST_SPIKE_STEPS, MOST_NOTES, NanDebug
from trainer.engine.null_run import NullLogger, NullRun
from trainer.engine.state import TrainingState
from trainer.tasks import Classification


class Notes(NullLogger):
    def __init__(self):
        self.lines = []

    def say(self, line, style=None):
        self.lines.append(line)


def stepped(num_steps=1, spoil=lambda state: None, debug="nan", **overrides):
    """(lines said in some steps, the state after them)."""
    plan = small_plan("A2", "test_resnet", **overrides)
    settings = make_settings("cpu", workers="0", debug=debug)
    state, run = TrainingState(plan, settings), NullRun()
    run.logger = Notes()
    spoil(state)
    loader = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(num_steps):
        train.optimizer_step(state, loader, step)
        state.progress.step = step + 1
        train.log_notes(state, run)
    return run.logger.lines, state


def layers_of(model):
    """A convolution in the middle of a model and its name."""
    convolutions = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d)
    ]
    return convolutions[len(convolutions) // 2]


def test_a_sound_step_says_nothing():
    assert stepped(num_steps=2)[0] == []


def test_the_layer_with_the_bad_weight_is_named_and_no_later_one():
    names = []

    def spoil(state):
        name, layer = layers_of(state.model)
        names.append(name)
        layer.weight.data[0] = math.nan

    lines, _ = stepped(spoil=spoil)
    (line,) = [line for line in lines if "output" in line]
    assert f"{names[0]} (Conv2d)" in line and "weight" in line and "step 1, micro-batch 0" in line


def test_an_image_that_is_not_finite_is_named(monkeypatch):
    prepare, shown = Classification.prepare, []

    def prepared(self, batch):
        inputs, targets = prepare(self, batch)
        if batch.micro_batch == 2:
            inputs = inputs.clone()
            inputs[3, 0, 0, 0] = math.inf
            shown.append(int(batch.shown[3]))
        return inputs, targets

    monkeypatch.setattr(Classification, "prepare", prepared)
    lines, _ = stepped()
    assert f"of train images {shown[0]}" in lines[0] and "micro-batch 2" in lines[0]


def test_the_first_gradient_is_that_nearest_to_the_loss():
    names = []

    def spoil(state):
        name, layer = layers_of(state.model)
        names.append(name)

        def forward(module, inputs, output):
            output.register_hook(lambda gradient: gradient * math.nan)

        layer.register_forward_hook(forward)

    lines, _ = stepped(spoil=spoil)
    (line,) = lines
    assert f"gradient that is not finite is of {names[0]}.weight" in line


def test_an_infinite_loss_of_finite_layers_is_the_loss(monkeypatch):
    loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda *given: loss(*given) * math.inf)
    lines, _ = stepped()
    assert any("the loss is inf" in line for line in lines)


def test_dead_gradients_are_named_once():
    names = []

    def spoil(state):
        name, layer = layers_of(state.model)
        names.append(name)
        layer.register_forward_hook(lambda module, inputs, output: output.detach())

    lines, state = stepped(num_steps=20, spoil=spoil)
    (line,) = [line for line in lines if "dead" in line]
    assert f"up to step {state.settings.log_steps}:" in line
    assert f"{names[0]}.weight" in line or "more" in line


def test_a_loss_spike_is_told_beside_the_median():
    debug = NanDebug(torch.nn.Linear(1, 1))
    for step in range(FEWEST_SPIKE_STEPS):
        debug.end_step(step, 2.0 + step / 10)
    debug.end_step(FEWEST_SPIKE_STEPS, 6.0)
    assert debug.notes == []
    debug.end_step(FEWEST_SPIKE_STEPS + 1, 9.0)
    (line,) = debug.notes
    assert f"step {FEWEST_SPIKE_STEPS + 2}:" in line and "9 is 3." in line


def test_notes_of_a_kind_end():
    debug = NanDebug(torch.nn.Linear(1, 1))
    for step in range(nan_debug.SPIKE_STEPS):
        debug.end_step(step, 1.0)
    for step in range(2 * MOST_NOTES):
        debug.end_step(step, 100.0)
    assert len(debug.notes) == MOST_NOTES


def test_it_moves_no_bit_and_evaluations_are_not_watched():
    _, watched = stepped(num_steps=3)
    _, alone = stepped(num_steps=3, debug="")
    assert alone.debug is None and not alone.model._forward_hooks
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, watched.model.state_dict()[name]), name
    assert alone.progress == watched.progress
    watched.model.eval()(torch.full((2, 3, 8, 8), math.nan))
    assert watched.debug.notes == []
    assert watched.average is None or not watched.average.model._forward_hooks


@pytest.mark.parametrize("settings", [{"compile": True}, {"debug": "inf"}])
def test_what_cannot_be_watched_is_refused(settings):
    with pytest.raises(UserError, match="debug="):
        make_settings("cpu", **{"debug": "nan"} | settings)


def test_the_command_says_it_in_the_log(tmp_path):
    words = ["--recipe", "A2", "--model", "test_resnet", "--device", "cpu", "--debug", "nan"]
    where = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    short = (
        "epochs=1 batch.images=96 batch.norm_images=48 lr.warmup_epochs=null lr.warmup_from=null"
    )
    done = rsb("train", *words, *where, "--set", short, "--inject", "nan@3")
    assert done.exit_code == 3, done.output
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    # the injected fault is in what the model gives, past all of its layers
    assert "the loss is nan, though" in log.read_text()
