"""Sweeps for tests: a data set of 32 pictures, a recipe of quick cells, and processes that run it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parents[1]
STEPS = 4


def write_pictures(root: Path) -> Path:
    """Two classes, 16 pictures each for training and 4 for validation, of noise about two
    brightnesses.
    """
    draws = np.random.default_rng(5)
    for split, count in (("train", 16), ("val", 4)):
        for label, level in (("dark", 80), ("light", 170)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draws.normal(level, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def write_page(path: Path, data: Path, smoothings, overrides: dict | None = None) -> Path:
    """A recipe whose cells differ in smoothing, each STEPS steps long. overrides: by smoothing, what
    a cell sets besides.
    """
    shared = {
        "epochs": STEPS // 2, "batch.images": 16, "batch.norm_images": 8, "lr.warmup_epochs": None,
        "lr.warmup_from": None, "image.train_px": 32, "image.test_px": 32, "repeats": None,
    }  # fmt: skip
    levels = [
        {"name": f"{value:g}", "set": {"smoothing": value, **(overrides or {}).get(value, {})}}
        for value in smoothings
    ]
    page = {
        "name": path.stem, "title": "smoothings", "question": "How much?", "source": "a test",
        "recipe": "A1", "models": ["test_resnet"], "data": [str(data)], "seeds": [0],
        "set": shared,
        "design": {"name": "full", "factors": [{"name": "smoothing", "levels": levels}]},
    }  # fmt: skip
    path.write_text(json.dumps(page, indent=1))  # JSON is YAML
    return path


class Sweeper:
    """Processes of the program without the seconds that imports take."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "support" / "sweeper.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _ask(self, what: dict) -> int:
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def begin(self, words, output: Path, **environment: str) -> int:
        """Start one; gives its process id, which is its group's too."""
        return self._ask(
            {
                "words": [str(word) for word in words],
                "environment": environment,
                "output": str(output),
            }
        )

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Sweep:
    """One ablation in one folder, called as often as a test likes."""

    def __init__(self, sweeper: Sweeper, folder: Path, page: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sweeper, self.folder, self.page = sweeper, folder, page
        self.runs, self.results, self.trace = folder / "runs", folder / "results", folder / "trace"
        self.trace.mkdir(exist_ok=True)
        self.output = folder / "output.txt"

    def begin(
        self, *words: str, faults: dict | None = None, page: Path | None = None, device: str = "cpu"
    ) -> int:
        named = {
            "ablation": page or self.page,
            "device": device,
            "runs": self.runs,
            "results": self.results,
            "checkpoint-s": 0,
            "workers": 0,
        }
        flags = [f"--{name}={value}" for name, value in named.items()]
        environment = {"TRACE": str(self.trace), "FAULTS": json.dumps(faults or {})}
        return self.sweeper.begin(["ablate", *flags, *words], self.output, **environment)

    def run(self, *words: str, **named) -> int:
        return self.sweeper.wait(self.begin(*words, **named))

    def kill(self, pid: int) -> int:
        """kill -9 of the whole tree."""
        os.killpg(pid, signal.SIGKILL)
        return self.sweeper.wait(pid)

    def rows(self) -> dict[str, dict]:
        return {
            path.stem: json.loads(path.read_text()) for path in self.results.glob("rows/*.json")
        }

    def endings(self) -> dict[str, tuple]:
        """What must be equal however a sweep was disturbed: status, weights, scores and curves of
        every run.
        """
        facts = (
            "status",
            "weights_sha256",
            "top1_pct",
            "loss_nats",
            "bitwise",
            "changes",
            "num_threads",
            "cell",
        )
        curves = {path.parent.name: path.read_bytes() for path in self.runs.glob("*/metrics.jsonl")}
        return {
            run: (*(row[fact] for fact in facts), curves.get(run))
            for run, row in self.rows().items()
        }

    def steps(self, run: str) -> list[tuple[int, int]]:
        """(process, step) of every step that was trained, in order."""
        path = self.trace / f"{run}.steps"
        return (
            [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    def check_each_ran_once(self) -> None:
        """No run had two processes at once; each had its last step done and its row stored once."""
        assert not list(self.trace.glob("*.overlaps"))
        for run, row in self.rows().items():
            assert (self.trace / f"{run}.stored").read_text().count("\n") == 1, run
            if row["status"] == "finished":
                assert len({pid for pid, step in self.steps(run) if step == STEPS - 1}) >= 1, run

    def num_steps(self) -> int:
        return sum(path.read_text().count("\n") for path in self.trace.glob("*.steps"))


@contextmanager
def sweeping(folder: Path):
    sweeper = Sweeper(folder)
    try:
        yield sweeper
    finally:
        sweeper.close()


def wait_until(is_true, most_s: float = 200.0) -> None:
    """Look every few milliseconds, so that nothing waits longer than it takes."""
    end_s = time.monotonic() + most_s
    while not is_true():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)
