"""A small recipe of a masked autoencoder, on the digits; steps of it over ranks."""

from pathlib import Path

from support import ranked
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.runs.job import Job, plan_of

MODEL = "vit_micro_patch4_32"
RECIPE = """\
name: small-mae
version: 1
title: "a small recipe for tests"
source: "none"
task:
  name: masked_autoencoder
  patch_px: 4
  hidden_share: 0.75
  decoder: {width: 32, blocks: 1, heads: 2}
epochs: 2
batch: {images: 480, norm_images: 120}
lr: {peak: 0.002, updated: per_step, schedule: {name: cosine, end: 0.0, period: after_warmup}}
optimizer: {name: adamw, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.05, no_decay: [vectors, biases]}
loss: {name: mse}
augment:
  - {name: random_resized_crop, area: [0.2, 1.0], aspect: [0.75, 1.3333333333333333], interpolation: bicubic}
  - {name: flip}
image: {train_px: 32, test_px: 32, test_crop_share: 1.0, test_interpolation: bicubic}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "small-mae.v1.yaml"
    path.write_text(text)
    return path


def plan_for(recipe: Path, overrides: str = "", **job):
    return plan_of(Job(str(recipe), MODEL, "digits", overrides=overrides, **job))


def autoencoded_steps(ranks, folder: str, number: int) -> dict:
    """Some optimizer steps in float64 of four micro-batches each, shared by ranks, and the scores
    of a pass that they share.
    """
    plan = plan_for(Path(folder) / "small-mae.v1.yaml", world_size=ranks.world_size)
    settings = make_settings("cpu", workers="0")
    data = open_data(plan.profile, None)
    with ranked.in_float64():
        state = TrainingState(plan, settings, ranks)
        stream = data.train_stream(plan, settings, 0, ranks)
        losses = [train.optimizer_step(state, stream, step).item() for step in range(number)]
        scores = evaluate(
            plan, settings, state.model, data.val_batches(plan, settings, ranks), ranks=ranks
        )
    weights = {name: weight.detach() for name, weight in state.model.named_parameters()}
    return {"losses": losses, "weights": weights, "scores": scores.record()}
