"""What checkpoints cost a run: `python tests/benchmarks/bench_checkpoints.py [--model resnet50] [--every-s 30] [--rounds 6]`.

Steps of the suite in blocks, in turns: without a checkpoint, with one begun before the block's first step and written
beside it, and with one that is waited for. A block lasts longer than the writing. Reports how much longer a block with
one took, as a share of the time between two checkpoints; and what a noisy machine does not blur: the time for which the
step stood still and the writer's processor time, which it takes from the steps where every core is busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from trainer.cores import num_cores
from trainer.data.opened import open_data
from trainer.job import Job, plan_of
from trainer.profiles import data_folder
from trainer.saver import Saver
from trainer.settings import make_settings
from trainer.state import State
from trainer.train import optimizer_step

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="A2")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--set", default="batch.images=64 batch.norm_images=64")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--every-s", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()

    plan = plan_of(Job(given.recipe, given.model, given.data, overrides=given.set))
    data = open_data(plan.profile, data_folder(given.data, None))
    settings = make_settings(given.device, in_memory=data.train.is_in_memory)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        state = State(plan, settings, Path(folder))
        stream, number = data.train_stream(plan, settings, 0), iter(range(10**9))
        saver = Timed(Path(folder) / "checkpoints")

        def block(kind: str) -> float:
            if settings.device.startswith("cuda"):
                torch.cuda.synchronize()
            before = time.perf_counter()
            if kind != "none":
                saver.start(next(steps), state.facts(), lambda: None)
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
    report(given, taken, saver, mib)


def report(given, taken: dict, saver: Timed, mib: float) -> None:
    """Print what was measured, and one line of JSON."""
    plain_s = statistics.median(taken["none"])
    shares = {}
    for kind in BLOCKS[1:]:
        extra = [with_one - none for with_one, none in zip(taken[kind], taken["none"], strict=True)]
        shares[kind] = statistics.median(extra) / given.every_s
        print(f"{kind:7} {statistics.median(extra):+.3f} s a checkpoint, {100 * shares[kind]:+.2f} % at one every {given.every_s:g} s "
              f"(of {len(extra)} rounds from {min(extra):+.3f} to {max(extra):+.3f} s; a block lasts {plain_s:.1f} s)")  # fmt: skip
    still_s, writer_s, took_s = (statistics.median(found) for found in (saver.still_s, saver.writer_s, saver.took_s))
    most = (still_s + writer_s / num_cores()) / given.every_s
    print(f"a checkpoint of {mib:.0f} MiB: the step stands still for {still_s:.3f} s, the writer takes {took_s:.2f} s beside it and "
          f"{writer_s:.2f} s of one of {num_cores()} cores: {100 * most:.2f} % where all of them are busy")  # fmt: skip
    print(json.dumps({"benchmark": "checkpoints", "model": given.model, "mib": round(mib), "share": shares, "still_s": still_s, "writer_s": writer_s, "most_share": most}))


if __name__ == "__main__":
    main()
