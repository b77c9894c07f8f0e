"""A few steps on a GPU, a pretended one or not, by one process or by ranks."""

from __future__ import annotations

import shlex

import torch

from support.parts import SMALLER
from support.plans import small_plan
from support.ranked import ranked_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import Ranks
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.recipe.schema import from_random_weights, load_recipe
from trainer.recipe.shipped import find_recipe

# Small models; some recipes ask for a kind of block, or a number of channels that groups divide,
# or are of one model alone.
_MODELS = {
    "airbench94": "airbench94",
    "airbench96": "airbench96",
    "roadmap": "bottlenecks",
    "bcn": "resnet18",
    "bit": "resnet18",
    "gn": "resnet18",
    "convnext": "test_convnext2",
    "convnext-isotropic": "convnext_atto",
}


def started(name: str, precision: str = "bf16", **settings):
    """A state two steps on, as the first ones copy what stays, and its micro-batches. On the last
    GPU: the first is where a tensor lies that is told none.
    """
    page = load_recipe(find_recipe(name))
    kinds = name.partition(".")[0], name.partition("-")[0]
    model = next((_MODELS[kind] for kind in kinds if kind in _MODELS), "test_resnet")
    recipe = page.for_model(model)  # its schedule may not fit into fewer epochs
    smaller = [
        f"model.{part}.{key}={list(value) if isinstance(value, tuple) else value}"
        for part, values in SMALLER.items()
        for key, value in values.items()
        if getattr(recipe.model, part, None) is not None
    ]
    alone = from_random_weights(recipe)
    if recipe.model and recipe.model.pretrained and recipe.model != alone.model:
        smaller.append("model.pretrained=null")
    if recipe.distill != alone.distill:
        smaller.append("distill=null")
    overrides = [f"epochs={recipe.epochs}", *smaller]
    plan = small_plan(name, model, shlex.join(overrides))
    number = torch.cuda.device_count() - 1
    device = f"cuda:{number}" if number else "cuda"
    machine = make_settings(device, precision, workers="0", **settings)
    return _after_two_steps(TrainingState(plan, machine))


def _after_two_steps(state: TrainingState):
    set_algorithms(state.settings)
    data = open_data(state.plan.profile, None)
    window = data.train_stream(state.plan, state.settings, 0, state.ranks)
    for step in range(2):
        optimizer_step(state, window, step)
    return state, window


def collectives(ranks: Ranks, alone_on: int | None = None) -> list[tuple[str, int, str]]:
    """NCCL's calls in one step on this rank. alone_on: the rank that adds one up by itself."""
    from support.gpu_stub.watch import Watch  # needs the library

    plan = ranked_plan(ranks, "A2", "test_resnet", "")
    state = TrainingState(plan, make_settings(f"cuda:{ranks.rank}", workers="0"), ranks)
    state, window = _after_two_steps(state)
    finish = state.gradients.finish

    def finish_and_sum() -> None:
        finish()
        ranks.sum(state.loss_sum)

    if ranks.rank == alone_on:
        state.gradients.finish = finish_and_sum
    with Watch() as watch:
        optimizer_step(state, window, 2)
    return watch.collectives
