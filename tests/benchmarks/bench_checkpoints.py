"""What checkpoints cost a run: `python tests/benchmarks/bench_checkpoints.py [--model resnet50]
[--every-s 30] [--rounds 6]`.

Steps of the suite in blocks, in turns: without a checkpoint, with one begun before the block's
first step and written beside it, and with one that is waited for. A block lasts longer than the
writing. Reports how much longer a block with one took, as a share of the time between two
checkpoints; and what a noisy machine does not blur: the time for which the step stood still and the
writer's processor time, which it takes from the steps where every core is busy. Writes
results/bench/checkpoints-cpu.json and .md (-cuda on a GPU); --dry prints alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from written import write

from trainer.base import provenance
from trainer.base.cores import num_cores
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.profile import data_folder
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.runs.checkpoint_writer import Saver
from trainer.runs.job import Job, plan_of

BLOCKS = ("none", "beside", "waited")


class Timed(Saver):
    """A saver that counts the seconds of a start, and of its thread the processor's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3600)
        self.still_s, self.writer_s, self.took_s = [], [], []

    def start(self, *given) -> None:
        before = time.perf_counter()
        super().start(*given)
        self.still_s.append(time.perf_counter() - before)

    def _write(self, *given) -> None:
        before, began = time.thread_time(), time.perf_counter()
        super()._write(*given)
        self.writer_s.append(time.thread_time() - before)
        self.took_s.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="A2")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--set", default="batch.images=64 batch.norm_images=64")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--every-s", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written; absent: the temporary folder"
    )
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()

    plan = plan_of(Job(given.recipe, given.model, given.data, overrides=given.set))
    data = open_data(plan.profile, data_folder(given.data, None))
    settings = make_settings(given.device, in_memory=data.train.is_in_memory)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        state = TrainingState(plan, settings)
        stream, number = data.train_stream(plan, settings, 0), iter(range(10**9))
        saver = Timed(Path(folder) / "checkpoints")

        def block(kind: str) -> float:
            if settings.device.startswith("cuda"):
                torch.cuda.synchronize()
            before = time.perf_counter()
            if kind != "none":
                saver.start(next(steps), state.state_dict(), lambda: None)
            if kind == "waited":
                saver.wait()
            for _ in range(given.steps):
                optimizer_step(state, stream, next(number)).item()
            took = time.perf_counter() - before
            saver.wait()  # not a part of it, but the next block must not pay for it
            return took

        steps = iter(range(10**9))
        block("none"), block("waited")
        saver.still_s, saver.writer_s, saver.took_s = [], [], []
        taken = {kind: [] for kind in BLOCKS}
        for _ in range(given.rounds):
            for kind in BLOCKS:
                taken[kind].append(block(kind))
        mib = sum(path.stat().st_size for path in saver.folder.glob("*.pt")) / 2 / 2**20
    facts = facts_of(given, settings.device, taken, saver, mib)
    table = as_markdown(facts)
    print(table)
    if not given.dry:
        write(f"checkpoints-{settings.device.split(':')[0]}", facts, table)


def facts_of(given, device: str, taken: dict, saver: Timed, mib: float) -> dict:
    """What was measured, for a JSON file."""
    still_s, writer_s, took_s = (
        statistics.median(found) for found in (saver.still_s, saver.writer_s, saver.took_s)
    )
    extra = {
        kind: [one - none for one, none in zip(taken[kind], taken["none"], strict=True)]
        for kind in BLOCKS[1:]
    }
    words = {
        "recipe": given.recipe,
        "model": given.model,
        "data": given.data,
        "set": given.set,
        "every_s": given.every_s,
    }
    return words | {
        "benchmark": "checkpoints", "device": provenance.device_name(device),
        "torch": torch.__version__, "num_cores": num_cores(), "num_rounds": given.rounds,
        "mib": round(mib), "block_s": round(statistics.median(taken["none"]), 3),
        "still_s": round(still_s, 4), "took_s": round(took_s, 3), "writer_s": round(writer_s, 3),
        "most_pct": round(100 * (still_s + writer_s / num_cores()) / given.every_s, 3),
        "extra_s": {kind: [round(statistics.median(found), 3), round(min(found), 3), round(max(found), 3)] for kind, found in extra.items()},
        "extra_pct": {kind: round(100 * statistics.median(found) / given.every_s, 3) for kind, found in extra.items()},
    }  # fmt: skip


def as_markdown(facts: dict) -> str:
    """The table."""
    lines = ["# What checkpoints cost a run", ""]
    lines += [f"{facts['device']}, {facts['num_cores']} cores, torch {facts['torch']}; {facts['model']}, page {facts['recipe']}, {facts['set']}; a checkpoint of {facts['mib']} MiB "
              f"every {facts['every_s']:g} s. {facts['num_rounds']} rounds of blocks of {facts['block_s']:.1f} s, in turns.", ""]  # fmt: skip
    lines += [
        (
            "| a block with a checkpoint takes longer by | median | shortest to longest | of the"
            " time between two |"
        ),
        "|---|---|---|---|",
    ]
    names = {"beside": "written beside the steps", "waited": "waited for"}
    for kind, name in names.items():
        median, low, high = facts["extra_s"][kind]
        lines.append(
            f"| {name} | {median:+.3f} s | {low:+.3f} to {high:+.3f} s |"
            f" {facts['extra_pct'][kind]:+.2f} % |"
        )
    lines += ["", f"The step stands still for {facts['still_s']:.3f} s; the writer takes {facts['took_s']:.2f} s beside it and {facts['writer_s']:.2f} s of one of "
              f"{facts['num_cores']} cores: **{facts['most_pct']:.2f} %** where all of them are busy.", ""]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
