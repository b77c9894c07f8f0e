"""What the suite adds to a bare loop: `python tests/benchmarks/bench_overhead.py [--data
fashion-mnist] [--rounds 12]`.

The same model, optimizer and batch: once through the suite's own step (loading, augmentation,
mixing, logging of the loss), once as a bare loop on tensors that lie in memory already. Both in
turns, a few steps each, so that a machine that grows slower grows slower for both. Reports images/s
and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from trainer.base.memory import keep_freed_memory
from trainer.base.settings import make_settings
from trainer.components.optimizers import clip_gradients
from trainer.data.dataset import open_data
from trainer.data.profile import data_folder
from trainer.data.transforms import autocast
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.runs.job import Job, plan_of


def bare_step(state: TrainingState, images: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward, backward, clip and optimizer step on tensors in memory."""
    recipe = state.plan.recipe
    with autocast(state.settings):
        logits = state.model(images)
    recipe.loss(logits.float(), targets).backward()
    if recipe.optimizer.clip_global_norm is not None:
        clip_gradients(state.model.parameters(), recipe.optimizer.clip_global_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


def seconds(step, num_steps: int, on_gpu: bool) -> float:
    before = time.perf_counter()
    for _ in range(num_steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="A3")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()

    keep_freed_memory()  # as a run does
    plan = plan_of(Job(given.recipe, given.model, given.data, given.data_dir))
    data = open_data(plan.profile, data_folder(given.data, given.data_dir))
    settings = make_settings(given.device, workers=given.workers, in_memory=data.train.is_in_memory)
    on_gpu = settings.device.startswith("cuda")
    state = TrainingState(plan, settings)
    stream = data.train_stream(plan, settings, 0)
    images, targets = state.task.prepare(next(data.train_stream(plan, settings, 0)))
    number = iter(range(10**9))
    suite = lambda: optimizer_step(state, stream, next(number))  # noqa: E731
    bare = lambda: bare_step(state, images, targets)  # noqa: E731

    for step in (suite, bare):  # caches, kernels' choices, allocations
        seconds(step, 3, on_gpu)
    taken = {"suite": [], "bare": []}
    for _ in range(given.rounds):
        taken["suite"].append(seconds(suite, given.steps, on_gpu))
        taken["bare"].append(seconds(bare, given.steps, on_gpu))
    num_images = plan.recipe.batch.images * given.steps
    rates = {name: num_images / statistics.median(times) for name, times in taken.items()}
    ratios = sorted(bare / suite for suite, bare in zip(taken["suite"], taken["bare"], strict=True))
    for name, rate in rates.items():
        print(f"{name:6} {rate:8.1f} images/s")
    middle = statistics.median(ratios)
    print(
        f"suite / bare: median {middle:.3f} of {len(ratios)} rounds, from {ratios[0]:.3f} to"
        f" {ratios[-1]:.3f}"
    )
    print(
        json.dumps(
            {
                "benchmark": "overhead",
                "model": given.model,
                "data": given.data,
                "ratio": middle,
                **rates,
            }
        )
    )


if __name__ == "__main__":
    main()
