"""No optimizer step makes the host wait for the GPU, and an evaluation does so once."""

import math

import pytest

from support.gpu_steps import started
from support.gpu_stub import host_waits
from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import Ranks
from trainer.engine.evaluate import evaluate_all
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import recipe_paths

RECIPES = [path.stem for path in recipe_paths() if load_recipe(path).task is None]
# with an average and without, a norm with statistics of its own, one that samples no batch
EVALUATED = ["A2", "bcn", "convnext", "gn-ws"]


@pytest.mark.gpu_stub
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_gpu(name, precision):
    state, window = started(name, precision)
    with host_waits() as waits:
        loss = optimizer_step(state, window, 2)
    # timm's own optimizers leave it to torch's scaler, which reads one number
    asks_host = precision == "fp16" and state.plan.recipe.optimizer.waits_under_fp16
    assert len(waits) == asks_host and all("Synchronize" in wait for wait in waits)
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


class SilentRanks(Ranks):
    """A rank whose others are not there; how many numbers each sum on the device has is noted."""

    def __init__(self, *given):
        super().__init__(*given)
        object.__setattr__(self, "sums", [])

    def start_sum(self, tensor):
        self.sums.append(tensor.numel())
        return lambda: None

    def total(self, number):
        return number


def test_estimates_of_all_layers_are_one_sum_over_ranks():
    estimated = (
        "'model={norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1,"
        " statistics: estimated}}'"
    )
    plan, settings = small_plan(overrides=estimated), make_settings("cpu", workers="0")
    ranks = SilentRanks(0, 2)
    window = open_data(plan.profile, None).train_stream(plan, settings, 0, ranks)
    one = TrainingState(plan, settings, ranks)
    optimizer_step(one, window, 0)
    ranks.sums.clear()
    optimizer_step(one, window, 1)
    num_channels = [len(norm.running_mean) for norm in one.step_statistics.estimated]
    assert len(num_channels) > 10
    num_buckets = len(one.gradients._buckets)
    assert len(ranks.sums) == num_buckets + 2  # gradients, estimates, the loss
    assert sum(2 * number + 1 for number in num_channels) in ranks.sums
