"""A whole training loop on JPEG files beside one put together from timm's own parts, in the same
run, in turns.

    python tests/benchmarks/bench_end_to_end.py [--src <folder or tar of JPEGs>] [--px 64] [--rounds
    8] [--steps 4] [--workers 1]

Both train a ResNet-18 by the page A3: the same images, batch, model, loss, optimizer and precision,
with as many loader processes and threads. timm's: its ImageDataset, create_loader, Mixup,
BinaryCrossEntropy and Lamb. Writes results/bench/end-to-end.json and .md; --dry prints alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from written import write

from trainer.base import provenance
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import Settings, make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.recipe.plan import Plan
from trainer.runs.job import Job, plan_of
from trainer.tools.bench import image_folder, photo_files
from trainer.tools.bench_timm import TimmLoop

NUM_TRAIN, NUM_VAL = 1024, 64


class Timed:
    """An endless stream that counts the seconds for which it is waited for."""

    def __init__(self, stream) -> None:
        self.stream, self.waited_s = iter(stream), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        before_s = time.perf_counter()
        item = next(self.stream)
        self.waited_s += time.perf_counter() - before_s
        return item


def plan_over(folder: Path, px: int, batch: int) -> Plan:
    """A3 on a resnet18, long enough for any number of steps."""
    overrides = (
        f"image.train_px={px} image.test_px={px} batch.images={batch} batch.norm_images={batch}"
        " epochs=1000 lr.peak=1e-3 lr.warmup_epochs=null lr.warmup_from=null"
    )
    return plan_of(Job("A3", "resnet18", str(folder), None, 0, overrides))


def ours(plan: Plan, settings: Settings, folder: Path):
    """(a call that makes one step, the stream that it waits for) of the suite."""
    data = open_data(plan.profile, folder)
    state, number = TrainingState(plan, settings), iter(range(10**9))
    stream = Timed(data.train_stream(plan, settings, 0))
    return lambda: optimizer_step(state, stream, next(number)), stream


def of_timm(plan: Plan, settings: Settings, folder: Path):
    """The same of timm's parts."""
    loop = TimmLoop(plan, settings, folder)
    loop.stream = Timed(loop.stream)
    return loop.step, loop.stream


def in_turns(loops: dict, num_rounds: int, num_steps: int) -> tuple[dict, dict]:
    """Seconds of each loop's turns, and of these the seconds waited for data."""
    took, waited = ({name: [] for name in loops} for _ in range(2))
    for turn in range(
        num_rounds + 1
    ):  # the first is not counted: processes start, kernels are chosen
        for name, (step, stream) in loops.items():
            before_s, stream.waited_s = time.perf_counter(), 0.0
            for _ in range(num_steps):
                step()
            if turn:
                took[name].append(time.perf_counter() - before_s)
                waited[name].append(stream.waited_s)
    return took, waited


def as_markdown(facts: dict) -> str:
    lines = [
        "# A whole training loop, beside one of timm's parts",
        "",
        (
            f"{facts['device']}, {facts['num_threads']} threads and {facts['num_workers']} loader"
            f" process; resnet18, page A3, {facts['px']} px, batch {facts['batch']},"
            f" {facts['num_files']} JPEG files ({facts['source']}); timm {facts['timm']}, torch"
            f" {facts['torch']}. {facts['num_rounds']} rounds of {facts['num_steps']} steps in"
            " turns."
        ),
        "",
        "| loop | images/s, median | slowest to fastest | waiting for data |",
        "|---|---|---|---|",
    ]
    for row in facts["rows"]:
        lines.append(
            f"| {row['who']} | {row['images_per_s']:.1f} | {row['low']:.1f} to {row['high']:.1f} |"
            f" {row['wait_pct']:.1f} % |"
        )
    lines += [
        "",
        (
            f"ours / timm, median of the rounds: **{facts['ratio']:.2f}** ({facts['ratio_low']:.2f}"
            f" to {facts['ratio_high']:.2f})"
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path, help="a folder or a tar of JPEG files")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    keep_freed_memory()  # for both
    with tempfile.TemporaryDirectory() as name:
        files = photo_files(given.src, Path(name) / "files")
        folder = image_folder(Path(name) / "set", files, NUM_TRAIN, NUM_VAL)
        plan, settings = (
            plan_over(folder, given.px, given.batch),
            make_settings("cpu", workers=str(given.workers)),
        )
        loops = {
            who: make(plan, settings, folder)
            for who, make in (("timm's parts", of_timm), ("ours", ours))
        }
        took, waited = in_turns(loops, given.rounds, given.steps)
    images = given.batch * given.steps
    ratios = sorted(
        theirs / own for theirs, own in zip(took["timm's parts"], took["ours"], strict=True)
    )
    rows = [
        {"who": who, "images_per_s": images / statistics.median(times), "low": images / max(times), "high": images / min(times),
         "wait_pct": 100 * sum(waited[who]) / sum(times)} for who, times in took.items()
    ]  # fmt: skip
    facts = {"benchmark": "end to end", "device": provenance.device_name("cpu"), "num_threads": torch.get_num_threads(), "num_workers": given.workers,
             "px": given.px, "batch": given.batch, "num_files": len(files), "source": given.src.stem if given.src else "cut from two sample photos", "timm": timm.__version__, "torch": torch.__version__,
             "num_rounds": given.rounds, "num_steps": given.steps, "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
             "rows": rows}  # fmt: skip
    table = as_markdown(facts)
    print(table)
    if not given.dry:
        write("end-to-end", facts, table)


if __name__ == "__main__":
    main()
