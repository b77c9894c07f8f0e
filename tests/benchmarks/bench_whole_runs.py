"""Whole runs beside timm's train.py, from the start of the program to its exit, evaluations
included: wall time, CPU time, and the most memory that all its processes held together.

    python tests/benchmarks/bench_whole_runs.py --train-py <timm's train.py>
    [--src <folder or tar of JPEGs>] [--models resnet18 resnet50] [--px 224 32]
    [--workers 1 2] [--rounds 3]

Both train by A3 on the same files, in batches of the same size, in turns. timm's train.py is not in
its wheel: take it from github.com/huggingface/pytorch-image-models at the wheel's version. Writes
results/bench/whole-runs.json and .md, each record as soon as it is whole and in the place of an
earlier one of the same model, size and number of workers; --dry prints alone.

Memory is the sum of the processes' PSS (a page that n of them share counts 1/n in each), sampled
while they run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from written import BENCH, write

from trainer.base import provenance
from trainer.tools.bench import image_folder, photo_files

EPOCHS, LOOK_S = 2, 0.5  # summing up the pages of a process takes it 30 ms


@dataclass(frozen=True)
class Used:
    """What a program took. own_mib: the most of its first process; others_mib: of the others."""

    wall_s: float
    cpu_s: float
    mem_mib: float
    own_mib: float
    others_mib: float


def used(command: list[str], folder: Path) -> Used:
    """Run a program to its end. Raises CalledProcessError."""
    before_s = time.monotonic()
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        most, own, others = 0.0, 0.0, 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            held = {each: pss_mib(each) for each in in_session(process.pid)}
            main = held.pop(process.pid, 0.0)
            most, own = max(most, main + sum(held.values())), max(own, main)
            others = max(others, sum(held.values()))
            time.sleep(LOOK_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print((folder / "said").read_text()[-2000:], file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    wall_s = time.monotonic() - before_s
    return Used(wall_s, usage.ru_utime + usage.ru_stime, most, own, others)


def in_session(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            found.append(int(path.parent.name))
    return found


def pss_mib(pid: int) -> float:
    """The memory of a process; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def ours(images: Path, out: Path, model: str, px: int, batch: int, workers: int) -> list[str]:
    overrides = (
        f"image.train_px={px} image.test_px={px} batch.images={batch} batch.norm_images={batch}"
        f" epochs={EPOCHS} lr.peak=1e-3 lr.warmup_epochs=null lr.warmup_from=null"
    )
    return [
        *(sys.executable, "-m", "trainer", "train", "--recipe", "A3", "--model", model),
        *("--data", str(images), "--set", overrides, "--device", "cpu", "--workers", str(workers)),
        *("--runs", str(out / "runs"), "--results", str(out / "results")),
    ]


def timms(
    train_py: Path, images: Path, out: Path, model: str, px: int, batch: int, workers: int
) -> list[str]:
    words = (
        f"--train-split train --val-split val --device cpu --model {model} --num-classes 2"
        f" --img-size {px} --crop-pct 0.95 --batch-size {batch} --workers {workers}"
        f" --epochs {EPOCHS} --warmup-epochs 0 --opt lamb --lr 1e-3 --weight-decay 0.02"
        " --bce-loss --bce-target-thresh 0.2 --smoothing 0 --mixup 0.1 --cutmix 1.0"
        " --aa rand-m6-mstd0.5-inc1 --color-jitter 0"
    )
    paths = ["--data-dir", str(images), "--output", str(out / "timm")]
    return [sys.executable, str(train_py), *words.split(), *paths]


def compared(args: argparse.Namespace, files: list[Path], folder: Path) -> Iterator[dict]:
    """One record for each model, size and number of workers."""
    images = image_folder(folder / "images", files, args.train, args.val)
    for model in args.models:
        for px in args.px:
            for workers in args.workers:
                found: dict[str, list[Used]] = {"ours": [], "timm": []}
                for _ in range(args.rounds):
                    for name in args.only:
                        with tempfile.TemporaryDirectory(dir=folder) as made:
                            given = (images, Path(made), model, px, args.batch, workers)
                            command = (
                                ours(*given) if name == "ours" else timms(args.train_py, *given)
                            )
                            found[name].append(used(command, Path(made)))
                            print(model, px, workers, name, found[name][-1], flush=True)
                yield {
                    **{"model": model, "px": px, "workers": workers, "rounds": args.rounds},
                    **summary(found),
                    "versions": provenance.versions(),
                    **{"train": args.train, "val": args.val, "batch": args.batch},
                }


def summary(found: dict[str, list[Used]]) -> dict:
    """Medians of each, and ours to timm's."""
    made: dict = {}
    for what in ("wall_s", "cpu_s", "mem_mib"):
        for name, each in found.items():
            if each:
                made[f"{what}_{name}"] = statistics.median(getattr(one, what) for one in each)
        if all(found.values()):
            made[f"{what}_ratio"] = made[f"{what}_ours"] / made[f"{what}_timm"]
    return made


def stored() -> list[dict]:
    path = BENCH / "whole-runs.json"
    return json.loads(path.read_text())["records"] if path.exists() else []


def table(records: list[dict]) -> str:
    names = [name for name in records[0] if name not in ("versions", "train", "val", "batch")]
    rows = [names, ["---"] * len(names)] + [
        [
            f"{each[name]:.2f}" if isinstance(each[name], float) else str(each[name])
            for name in names
        ]
        for each in records
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-py", type=Path, required=True)
    parser.add_argument("--src", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--px", nargs="+", type=int, default=[224, 32])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--val", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["ours", "timm"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    records = [] if args.dry else stored()
    with tempfile.TemporaryDirectory() as made:
        for one in compared(args, photo_files(args.src, Path(made) / "photos"), Path(made)):
            key = one["model"], one["px"], one["workers"]
            others = [
                each for each in records if key != (each["model"], each["px"], each["workers"])
            ]
            records = [*others, one]
            if not args.dry:
                write("whole-runs", {"records": records}, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
