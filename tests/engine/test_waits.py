"""No optimizer step makes the host wait for the GPU, and an evaluation does so once."""

import math

import pytest

from support.gpu_stub import host_waits
from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate_all
from trainer.engine.state import TrainingState
from trainer.engine.train import fast_algorithms, optimizer_step
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe, recipe_paths

RECIPES = [path.stem for path in recipe_paths()]
# with an average and without, a norm with statistics of its own, one that samples no batch
EVALUATED = ["A2", "bcn", "convnext", "gn-ws"]
# small ones; some recipes ask for a kind of block, or a number of channels that groups divide
MODELS = {
    "bcn": "resnet18",
    "bit-i1k": "resnet18",
    "gn-ws": "resnet18",
    "convnext": "test_convnext2",
    "convnext-isotropic": "convnext_atto",
} | {name.partition(".")[0]: "resnet14t" for name in RECIPES if name.startswith("roadmap")}


def started(name: str, precision: str = "bf16"):
    """A state on the GPU two steps on, as the first ones copy what stays, and its micro-batches."""
    recipe = load_recipe(find_recipe(name))  # its schedule may not fit into fewer epochs
    model = MODELS.get(name.partition(".")[0], "test_resnet")
    plan = small_plan(name, model, f"epochs={recipe.epochs}")
    settings = make_settings("cuda", precision, workers="0")
    fast_algorithms(settings.device)
    state = TrainingState(plan, settings)
    window = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(2):
        optimizer_step(state, window, step)
    return state, window


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
