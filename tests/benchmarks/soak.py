"""Hundreds of short runs on some of the digits, half of them killed at random moments: is any
result lost, and does anything grow?

    OMP_NUM_THREADS=1 python tests/benchmarks/soak.py [--runs 300] [--hours 3] [--seed 0] [--out
    results]

The runs have one of four seeds. Half are given to processes that SIGKILL or SIGTERM ends after a
random time, again and again until the same command has ended the run; the others to one process
that lives to the end, in which memory, file handles and threads are counted after every run. Every
run's row and curves must equal those of an undisturbed run of its seed, byte for byte; nothing may
stay in its folder that a run does not leave. Writes results/soak.md and prints it; exit code 1
where anything was lost, differed or grew. All draws come from --seed; the moments are of the clock,
so that no two soaks are the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SEEDS = (0, 1, 2, 3)
SET = (
    "epochs=2 batch.images=16 batch.norm_images=8 lr.warmup_epochs=null lr.warmup_from=null"
    " image.train_px=32 image.test_px=32 average='{name: ema, decay: 0.9, every_steps: 2}'"
)
IMAGES = {"train": 192, "val": 48}  # of the digits
STOPPED = 75
HANGS = 20  # times the usual seconds of a run
MOST_KILLS = 12  # of one run; after them it is left alone
RSS_GROWTH_KIB = 256  # of a run, beyond which memory counts as growing
FREE = 10  # runs of a process before anything is counted: caches fill


def write_digits(root: Path) -> None:
    """Some of scikit-learn's digits as an image folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = 0
    for split, number in IMAGES.items():
        for place in range(first, first + number):
            path = root / split / str(digits.target[place]) / f"{place:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[place] * 15).astype(np.uint8)).save(path)
        first += number


def words(folder: Path, seed: int) -> list[str]:
    """Those of a run in a folder; the images lie beside it."""
    named = {
        "recipe": "A1", "model": "test_resnet", "data": folder.parent / "digits", "seed": seed,
        "device": "cpu", "workers": 0, "set": SET, "checkpoint-s": 0, "runs": folder / "runs",
        "results": folder / "results",
    }  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in named.items())]


# ---- the processes that train


def one_run(given: list[str], printed: str) -> int:
    """The program with these words in this process; its exit code."""
    from trainer.__main__ import main

    sys.argv = ["rsb", *given]
    with open(printed, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        main()
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        return 130


def killed_one(given: list[str], printed: str) -> None:
    sys.exit(one_run(given, printed))


def counted(pipe, printed: str) -> None:
    """Runs one after another in this process; after each its exit code and what is held."""
    for given in iter(pipe.recv, None):
        code = one_run(given, printed)
        pipe.send((code, held()))


def held() -> dict:
    """Resident memory in KiB, open file handles and threads of this process."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


# ---- what must be equal, and what is counted


@dataclass
class Soak:
    """What has been seen."""

    expected: dict[int, dict] = field(default_factory=dict)
    runs: Counter = field(default_factory=Counter)  # ended: "killed" and "counted"
    ends: Counter = field(
        default_factory=Counter
    )  # of processes: SIGKILL, SIGTERM (saved), SIGTERM (had ended), finished
    faults: list[str] = field(default_factory=list)
    kills_of_a_run: list[int] = field(default_factory=list)
    held: list[dict] = field(default_factory=list)

    def check(self, folder: Path, seed: int, printed: Path) -> None:
        """Compare a run that has ended with the undisturbed one of its seed."""
        found = ending(folder)
        if seed not in self.expected:
            self.expected[seed] = found
        for what, value in self.expected[seed].items():
            if found.get(what) != value:
                self.fault(
                    f"seed {seed}: {what} differs: {differing(found.get(what), value)}; printed"
                    f" {shorten(printed.read_text()[-300:])}"
                )

    def fault(self, text: str) -> None:
        """Keep it, and say it at once."""
        self.faults.append(text)
        print(text, flush=True)


def ending(folder: Path) -> dict:
    """Row without what may differ, curves, and the names of the files that are left."""
    rows, curves = (
        sorted((folder / "results" / "rows").glob("*.json")),
        sorted((folder / "runs").glob("*/metrics.jsonl")),
    )
    if len(rows) != 1 or len(curves) != 1:
        return {"rows": len(rows), "runs": len(curves)}
    row = json.loads(rows[0].read_text())
    free = (
        "images_per_s",
        "train_s",
        "step_s",
        "step_spread_share",
        "load_per_core",
        "peak_mem_mib",
        "finished_utc",
        "commit",
        "dirty",
    )
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        "row": {name: value for name, value in row.items() if name not in free},
        "metrics": curves[0].read_bytes(),
        "files": sorted(
            {name for name in left if "tensorboard" not in name and "events" not in name}
        ),
    }


def differing(found: object, expected: object) -> str:
    """What one has and the other has not."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return shorten(
            {
                name: (found.get(name), expected.get(name))
                for name in found | expected
                if found.get(name) != expected.get(name)
            }
        )
    if isinstance(found, list) and isinstance(expected, list):
        return shorten(
            {
                "more": sorted(set(found) - set(expected)),
                "missing": sorted(set(expected) - set(found)),
            }
        )
    return shorten(found)


def shorten(value: object) -> str:
    return repr(value)[:400]


# ---- the soak


def undisturbed(context, soak: Soak, place: Path) -> float:
    """One run of each seed, alone; gives the usual seconds of one."""
    took = []
    for seed in SEEDS:
        folder = place / f"alone-{seed}"
        began = time.monotonic()
        process = context.Process(
            target=killed_one, args=(words(folder, seed), str(place / "printed.txt"))
        )
        process.start()
        process.join()
        took.append(time.monotonic() - began)
        if process.exitcode:
            raise SystemExit(
                f"error: the undisturbed run of seed {seed} ended with {process.exitcode}:"
                f" {(place / 'printed.txt').read_text()}"
            )
        soak.check(folder, seed, place / "printed.txt")
    return statistics.median(took)


def killed_run(
    context, soak: Soak, place: Path, seed: int, usual_s: float, draw: random.Random
) -> None:
    """One run, by processes that are ended at random moments until one has ended it."""
    folder, printed = place / "run", place / "printed.txt"
    for kills in range(MOST_KILLS + 1):
        process = context.Process(target=killed_one, args=(words(folder, seed), str(printed)))
        process.start()
        after = draw.uniform(0, 1.2 * usual_s) if kills < MOST_KILLS else None
        number = signal.SIGKILL if draw.random() < 0.7 else signal.SIGTERM
        process.join(after or HANGS * usual_s)
        if process.is_alive():
            os.kill(process.pid, number if after else signal.SIGKILL)
            process.join(HANGS * usual_s)
        if process.is_alive() or (after is None and process.exitcode == -signal.SIGKILL):
            soak.fault(f"seed {seed}: a process hung")
            process.kill()
            process.join()
        code = process.exitcode
        soak.ends[named(code)] += 1
        if code == 0:
            break
        if code not in (STOPPED, -signal.SIGKILL, -signal.SIGTERM):
            soak.fault(
                f"seed {seed}: a process ended with {code}: {shorten(printed.read_text()[-300:])}"
            )
            break
    soak.kills_of_a_run.append(kills)
    soak.check(folder, seed, printed)


def named(code: int) -> str:
    if code in (0, STOPPED):
        return "finished" if code == 0 else "stopped and saved (75)"
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


class Counted:
    """The process that lives to the end."""

    def __init__(self, context, place: Path) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=counted, args=(theirs, str(place / "counted.txt")), daemon=True
        )
        self.process.start()

    def run(self, soak: Soak, place: Path, seed: int, usual_s: float) -> None:
        self.pipe.send(words(place / "run", seed))
        if not self.pipe.poll(HANGS * usual_s):
            self.process.kill()
            raise SystemExit(
                "error: the process that lives to the end hangs, or is gone, in a run of seed"
                f" {seed}"
            )
        code, found = self.pipe.recv()
        soak.held.append(found)
        if code:
            soak.fault(f"seed {seed}: the process that lives to the end: a run ended with {code}")
        soak.check(place / "run", seed, place / "counted.txt")


def growth(held: list[dict], name: str) -> float:
    """By how much a count grows a run, by Theil and Sen's median of slopes: a jump is none."""
    values = np.array([one[name] for one in held[FREE:]], float)
    if len(values) < 3:
        return 0.0
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (second - first)))


def grown(held: list[dict]) -> list[str]:
    limits = {"rss_kib": RSS_GROWTH_KIB, "handles": 0.02, "threads": 0.02}
    return [
        f"{name} grows by {growth(held, name):.3g} a run"
        for name, most in limits.items()
        if growth(held, name) > most
    ]


def table(soak: Soak, seconds: float, asked) -> str:
    """results/soak.md."""
    from trainer.base import provenance

    commit, is_dirty = provenance.commit()
    lines = [
        "# A soak: many runs, killed at random, and nothing lost",
        "",
        (
            f"`python tests/benchmarks/soak.py --runs {asked.runs} --seed {asked.seed}`,"
            f" {datetime.now(UTC):%Y-%m-%d}, commit {commit}{' with changes' if is_dirty else ''},"
            f" {os.cpu_count()} cores, {seconds / 60:.0f} minutes: {IMAGES['train']} of the digits"
            " as an image folder, test_resnet, two epochs, a checkpoint after every step."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| runs ended | {sum(soak.runs.values())} |",
        f"| of them by processes that were killed or stopped | {soak.runs['killed']} |",
        f"| of them in one process that lived to the end | {soak.runs['counted']} |",
        *(f"| processes: {name} | {number} |" for name, number in sorted(soak.ends.items())),
        f"| most ends of one run before its last | {max(soak.kills_of_a_run, default=0)} |",
        f"| rows, curves or files that differ from the undisturbed run's | {len(soak.faults)} |",
        "",
        f"In the process that lived to the end, after its first {FREE} runs:",
        "",
        "| | first | median | last | growth a run |",
        "|---|---|---|---|---|",
        *held_lines(soak.held),
    ]
    faults = [*soak.faults[:20], *grown(soak.held)]
    return "\n".join([*lines, "", *(f"- {fault}" for fault in faults)]).rstrip() + "\n"


def held_lines(held: list[dict]) -> list[str]:
    lines = []
    for name, title in {
        "rss_kib": "resident memory, KiB",
        "handles": "open file handles",
        "threads": "threads",
    }.items():
        values = [one[name] for one in held[FREE:]] or [0]
        lines.append(
            f"| {title} | {values[0]:,} | {statistics.median(values):,.0f} | {values[-1]:,} |"
            f" {growth(held, name):+.3f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300, help="how many")
    parser.add_argument("--hours", type=float, default=3.0, help="and for how long at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where soak.md goes")
    asked = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "trainer.cli.main",
            "trainer.runs.job",
            "trainer.engine.train",
            "trainer.runs.export",
            "timm",
        ]
    )
    soak, draw, began = Soak(), random.Random(asked.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rsb-soak-") as folder:
        place = Path(folder)
        write_digits(place / "digits")
        usual_s = undisturbed(context, soak, place)
        lives = Counted(context, place)
        for number in range(asked.runs):
            if time.monotonic() - began > asked.hours * 3600:
                break
            seed, kind = draw.choice(SEEDS), "killed" if number % 2 else "counted"
            if kind == "killed":
                killed_run(context, soak, place, seed, usual_s, draw)
            else:
                lives.run(soak, place, seed, usual_s)
            soak.runs[kind] += 1
            shutil.rmtree(place / "run")
            if number % 10 == 9:
                print(
                    f"{number + 1} runs, {dict(soak.ends)}, {len(soak.faults)} faults,"
                    f" {soak.held[-1]}",
                    flush=True,
                )
        lives.pipe.send(None)
        lives.process.join(20)
    text = table(soak, time.monotonic() - began, asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "soak.md").write_text(text)
    print(text)
    return 1 if soak.faults or grown(soak.held) else 0


if __name__ == "__main__":
    sys.exit(main())
