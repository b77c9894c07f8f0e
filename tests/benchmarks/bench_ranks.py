"""What the means of several ranks cost where there is one: python tests/benchmarks/bench_ranks.py
[--model resnet50] [--rounds 12] [--steps 2].

A process by itself trains without any of them, also with gpus=1 or under torchrun with one process.
So the one rank here is told that it is not alone: it meets itself over gloo, adds its gradients up
in buckets, and agrees with itself on stop, loss and errors in every step. Blocks of steps in turns
beside a process by itself, from the same weights on the same images. Writes
results/bench/ranks-cpu.json and .md; --dry prints alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from written import write

from trainer.base import provenance
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.data.profile import data_folder
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.runs.job import Job, plan_of
from trainer.tools.bench import Rate, ratios

KINDS = ("none", "one rank")


class OneOfOne(Ranks):
    """A rank that does all that one of several does."""

    is_alone = False


def block_of(plan, settings, data, ranks: Ranks, num_steps: int, folder: Path):
    """A call that makes so many steps and gives their last loss."""
    state = TrainingState(plan, settings, ranks)
    stream, number, stop = (
        data.train_stream(plan, settings, 0, ranks),
        iter(range(10**9)),
        StopRequest(),
    )

    def block() -> float:
        for _ in range(num_steps):
            ranks.check(stop)
            loss = optimizer_step(state, stream, next(number))
        return loss.item()

    return block


def measured(given, folder: Path) -> tuple[dict[str, Rate], dict[str, float], int]:
    """Rates by kind, the last losses, and the threads used."""
    keep_freed_memory()
    plan = plan_of(Job(given.recipe, given.model, given.data, overrides=given.set))
    data = open_data(plan.profile, data_folder(given.data, None))
    settings = make_settings("cpu", in_memory=data.train.is_in_memory)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    blocks = {
        kind: block_of(plan, settings, data, ranks, given.steps, folder)
        for kind, ranks in zip(KINDS, (alone(), OneOfOne()), strict=True)
    }
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses = {}
    for number in range(given.rounds + 1):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            before = time.perf_counter()
            losses[kind] = blocks[kind]()
            if number:  # the first block begins all
                taken[kind].append(time.perf_counter() - before)
    dist.destroy_process_group()
    images = given.steps * plan.recipe.batch.images
    return (
        {kind: Rate(tuple(seconds), images) for kind, seconds in taken.items()},
        losses,
        torch.get_num_threads(),
    )


def as_markdown(facts: dict) -> str:
    """The table."""
    lines = ["# One rank, with and without the means of several", ""]
    lines += [f"`{facts['command']}`: {facts['device']}, {facts['num_threads']} threads, torch {facts['torch']}; {facts['model']}, page {facts['recipe']}, {facts['set']}. "
              f"{facts['num_rounds']} rounds of {facts['num_steps']} steps in turns; both end with the same loss.", ""]  # fmt: skip
    lines += ["| | images/s, median | quartiles |", "|---|---|---|"]
    lines += [
        f"| {kind} | {rate['images_per_s']:.1f} | {rate['low_images_per_s']:.1f} to"
        f" {rate['high_images_per_s']:.1f} |"
        for kind, rate in facts["rates"].items()
    ]
    low, high = facts["cost_quartiles_pct"]
    return "\n".join(
        [
            *lines,
            "",
            (
                f"One rank costs **{facts['cost_pct']:+.2f} %** (median of the rounds; quartiles"
                f" {low:+.2f} to {high:+.2f} %)."
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="A2")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--set", default="batch.images=64 batch.norm_images=32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates, losses, num_threads = measured(given, Path(folder))
    if losses["none"] != losses["one rank"]:
        raise SystemExit(f"error: the two end with other losses: {losses}")
    costs = [
        100 * (with_one / none - 1)
        for with_one, none in zip(rates["one rank"].seconds, rates["none"].seconds, strict=True)
    ]
    low, _, high = statistics.quantiles(costs, n=4, method="inclusive")
    facts = {
        "benchmark": "ranks",
        "command": f"python tests/benchmarks/bench_ranks.py --model {given.model} --rounds {given.rounds} --steps {given.steps}",
        "device": provenance.device_name("cpu"), "num_threads": num_threads,
        "torch": torch.__version__, "recipe": given.recipe, "model": given.model, "set": given.set,
        "num_rounds": given.rounds, "num_steps": given.steps,
        "ratio": round(statistics.median(ratios(rates["one rank"], rates["none"])), 4),
        "cost_pct": round(statistics.median(costs), 3),
        "cost_quartiles_pct": [round(low, 3), round(high, 3)],
        "rates": {kind: rate.as_facts() for kind, rate in rates.items()},
    }  # fmt: skip
    table = as_markdown(facts)
    print(table)
    if not given.dry:
        write("ranks-cpu", facts, table)


if __name__ == "__main__":
    main()
