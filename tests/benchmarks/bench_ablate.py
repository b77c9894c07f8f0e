"""What a sweep adds to its runs: `python tests/benchmarks/bench_ablate.py [--epochs 5] [--shapes]
[--model resnet18]`.

Twelve cells, one at a time, in an empty folder. A run's own time is from its plan on the disk to
its row on the disk; all else of the sweep's time is overhead: imports, the page, the one step of
each shape, forks, opening the data. It does not grow with the length of the runs, so that its share
of twelve one-minute runs is told too. --shapes: twelve different shapes of cells, each with its one
step, in the place of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEAST_S = 60.0

ONE_SHAPE = [{"name": f"{n / 100:g}", "set": {"smoothing": n / 100}} for n in range(1, 13)]
LOSSES = [{"name": "bce"}, {"name": "ce", "set": {"loss": {"name": "ce"}}}]
REPEATS = [{"name": "repeats"}, {"name": "none", "set": {"repeats": None}}]
MIXES = [
    {"name": "both"},
    {"name": "mixup", "set": {"mix": {"name": "mixup", "alpha": 0.2, "partner": "reversed"}}},
    {"name": "none", "set": {"mix": None}},
]


def write_page(path: Path, model: str, epochs: int, shapes: bool) -> Path:
    factors = [{"name": "smoothing", "levels": ONE_SHAPE}]
    if shapes:
        factors = [
            {"name": "loss", "levels": LOSSES},
            {"name": "repeats", "levels": REPEATS},
            {"name": "mix", "levels": MIXES},
        ]
    page = {
        "name": path.stem, "title": "overhead", "question": "How much?", "source": "a benchmark",
        "recipe": "A1", "models": [model], "data": ["digits"], "seeds": [0],
        "budget": {"epochs": epochs}, "design": {"name": "full", "factors": factors},
    }  # fmt: skip
    path.write_text(json.dumps(page))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--shapes", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = write_page(folder / "overhead.yaml", given.model, given.epochs, given.shapes)
        words = [
            "ablate",
            "--ablation",
            page,
            "--jobs",
            "1",
            "--runs",
            folder / "runs",
            "--results",
            folder / "results",
        ]
        before_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *map(str, words)], cwd=ROOT, env=os.environ
        )
        sweep_s = time.perf_counter() - before_s
        if done.returncode:
            sys.exit(done.returncode)
        rows = [path for path in (folder / "runs").glob("*/row.json")]
        own_s = sum(
            path.stat().st_mtime - path.with_name("plan.json").stat().st_mtime for path in rows
        )
    over_s = sweep_s - own_s
    print(
        f"{len(rows)} runs of {own_s / len(rows):.1f} s on average; the sweep took {sweep_s:.1f} s,"
        f" {over_s:.1f} s more than its runs"
    )
    print(
        f"overhead {100 * over_s / own_s:.2f} % of these runs,"
        f" {100 * over_s / (len(rows) * LEAST_S):.2f} % of as many one-minute runs"
    )


if __name__ == "__main__":
    main()
