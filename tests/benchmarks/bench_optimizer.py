"""Times one step of LAMB over resnet50's 161 tensors: ours (clipping included), timm's, and torch's
fused AdamW.

    python tests/benchmarks/bench_optimizer.py [--device cuda] [--num-threads 2] [--num-rounds 30]

The candidates take turns in one process, so that a machine that others use too slows all of them
alike. Writes results/bench/optimizer-cpu.json (-cuda on a GPU); --dry prints alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.optim import Lamb as TimmLamb

sys.path.insert(0, str(Path(__file__).parents[2]))

from written import write

from trainer.base import provenance
from trainer.components.optimizers import AdamW, Lamb, clip_gradients
from trainer.components.param_groups import param_groups

SHARED = {
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.02,
    "no_decay": ("vectors", "biases"),
}


def prepared(device: str) -> tuple[list[torch.Tensor], list[dict]]:
    """All weights of a fresh resnet50 with small random gradients, and their two groups."""
    model = timm.create_model("resnet50").to(device)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = (
            torch.randn_like(weight) * 1e-5
        )  # a global norm of 0.05: the clip is idle, as it mostly is
    return weights, param_groups(model, Lamb(**SHARED))


def candidates(device: str) -> dict[str, Callable[[], object]]:
    """One step of each optimizer, by name; the first is the yardstick."""
    own_weights, own_groups = prepared(device)
    own = Lamb(**SHARED).build(own_groups, 5e-3)
    plain = {"lr": 5e-3, "betas": SHARED["betas"], "eps": SHARED["eps"], "max_grad_norm": 1.0}

    def own_step() -> None:
        clip_gradients(own_weights, 1.0)
        own.step()

    return {
        "timm Lamb": TimmLamb(prepared(device)[1], **plain).step,
        "our Lamb, clipping included": own_step,
        "torch AdamW, fused": AdamW(**SHARED).build(prepared(device)[1], 1e-3).step,
    }


def measure(
    steps: dict[str, Callable[[], object]], num_rounds: int, device: str
) -> dict[str, float]:
    """Median milliseconds of each step over num_rounds rounds, after three rounds that warm up."""
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times_ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times[3:]) for name, times in times_ms.items()}


def main() -> None:
    """Prints the medians and how many times as fast as timm's Lamb each is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    medians_ms = measure(candidates(options.device), options.num_rounds, options.device)
    yardstick_ms = next(iter(medians_ms.values()))
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {options.device},"
        f" {options.num_threads} threads"
    )
    print(f"{'one step over 161 tensors':28}{'ms':>8}{'x timm':>8}")
    for name, median_ms in medians_ms.items():
        print(f"{name:28}{median_ms:8.1f}{yardstick_ms / median_ms:8.2f}")
    if not options.dry:
        facts = {
            "benchmark": "optimizer", "device": provenance.device_name(options.device),
            "num_threads": options.num_threads, "num_rounds": options.num_rounds,
            "torch": torch.__version__, "timm": timm.__version__,
            "step_ms": {name: round(median_ms, 2) for name, median_ms in medians_ms.items()},
        }  # fmt: skip
        write(f"optimizer-{options.device}", facts)


if __name__ == "__main__":
    main()
