"""No optimizer step makes the host wait for the GPU, and an evaluation does so once."""

import math

import pytest

from support.gpu_steps import started
from support.gpu_stub import host_waits
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate_all
from trainer.engine.train import optimizer_step
from trainer.recipe.shipped import recipe_paths

RECIPES = [path.stem for path in recipe_paths()]
# with an average and without, a norm with statistics of its own, one that samples no batch
EVALUATED = ["A2", "bcn", "convnext", "gn-ws"]


@pytest.mark.gpu_stub
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_gpu(name, precision):
    state, window = started(name, precision)
    with host_waits() as waits:
        loss = optimizer_step(state, window, 2)
    assert not waits
    assert math.isfinite(loss.item())


@pytest.mark.gpu_stub
@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_waits_once(name):
    state, _ = started(name)
    data = open_data(state.plan.profile, None)
    batches = list(data.val_batches(state.plan, state.settings))
    scored = state.plan, state.settings, state.weights(), batches
    evaluate_all(*scored)  # the first time cuDNN tries its algorithms
    with host_waits() as waits:
        evaluate_all(*scored)
    assert len([wait for wait in waits if "pageable" not in wait]) == 1
