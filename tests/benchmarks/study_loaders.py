"""Does the loader change what a model learns? The same runs by the torch loader and by ffcv; writes
results/loaders.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/study_loaders.py --src <image folder> [--seeds 5]
    [--loaders "torch ffcv"]

--src: a folder of small JPEGs in 10 classes, as CIFAR-10 is. To be started in a clean checkout, as
every row says whether it was one. Resumable: a run that has its row is skipped. The rows lie in
results/loaders/<loader>/rows: a run has the same name whoever reads its images. --page only writes
the page.

The test is of equivalence (Schuirmann 1987, two one-sided t tests at 5 %): the 90 % interval of the
mean difference between two runs of one seed must lie within the spread over seeds, which is the
range of the torch loader's scores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).parents[2]
LOADERS = ("torch", "ffcv")
NUM_TRAIN_PER_CLASS, NUM_VAL_PER_CLASS = 500, 500
PROFILE = """\
name: cifar10-tenth
num_classes: 10
num_train: {train}
num_val: {val}
mean: [0.4914, 0.4822, 0.4465]
std: [0.2470, 0.2435, 0.2616]
native_px: 32
adapt: {{train_px: 32, test_px: 32, test_crop_share: 1.0, epochs: 5, warmup_epochs: 1, batch_images: 128}}
"""


def prepared(src: Path, folder: Path) -> None:
    """A part of the images under folder/images, as links, with its profile and its .beton files."""
    for split, most in (("train", NUM_TRAIN_PER_CLASS), ("val", NUM_VAL_PER_CLASS)):
        for of_class in sorted(path for path in (src / split).iterdir() if path.is_dir()):
            to = folder / "images" / split / of_class.name
            to.mkdir(parents=True, exist_ok=True)
            for path in sorted(of_class.iterdir())[:most]:
                if not (to / path.name).exists():
                    (to / path.name).symlink_to(path.resolve())
    train, val = (len(list((folder / "images" / split).glob("*/*"))) for split in ("train", "val"))
    (folder / "profile.yaml").write_text(PROFILE.format(train=train, val=val))
    program("data", data=folder / "profile.yaml", src=folder / "images", out=folder / "beton")


def program(command: str, **words: object) -> None:
    """A command of the program with its words; raises CalledProcessError where it fails."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-m", "trainer", command, *given],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def train(loader: str, seed: int, folder: Path, results: Path) -> None:
    """The run of a loader and a seed; its row goes to the loader's own store."""
    images = folder / ("beton" if loader == "ffcv" else "images")
    words = {
        "recipe": "A3",
        "model": "resnet18",
        "data": folder / "profile.yaml",
        "data_dir": images,
        "seed": seed,
        "loader": loader,
    }
    program(
        "train",
        **words,
        device="cpu",
        workers=0,
        runs=folder / "runs" / loader,
        results=results / "loaders" / loader,
    )


def rows_of(results: Path, loader: str) -> dict[int, dict]:
    """The rows of a loader, by seed."""
    rows = [
        json.loads(path.read_text())
        for path in sorted((results / "loaders" / loader / "rows").glob("*.json"))
    ]
    assert all(
        row["loader"].partition(",")[0] == loader for row in rows
    )  # "torch, simplejpeg 1.9": with its decoder
    return {row["seed"]: row for row in rows}


def page(results: Path) -> str:
    """The table, the differences and their test, in words."""
    torch_rows, ffcv_rows = (rows_of(results, loader) for loader in LOADERS)
    seeds = sorted(torch_rows.keys() & ffcv_rows.keys())
    lines = [
        "| seed | torch, top-1 % | ffcv, top-1 % | ffcv - torch | run |",
        "|---|---|---|---|---|",
    ]
    for seed in seeds:
        ours, theirs = torch_rows[seed], ffcv_rows[seed]
        far = theirs["top1_pct"] - ours["top1_pct"]
        lines.append(
            f"| {seed} | {ours['top1_pct']:.2f} | {theirs['top1_pct']:.2f} | {far:+.2f} |"
            f" `{ours['run']}` |"
        )
    scores, others = (
        [rows[seed]["top1_pct"] for seed in seeds] for rows in (torch_rows, ffcv_rows)
    )
    return WORDS.format(
        table="\n".join(lines),
        verdict=verdict(scores, others),
        num_val=torch_rows[seeds[0]]["num_val_images"],
        num_seeds=len(seeds),
    )


def verdict(scores: list[float], others: list[float]) -> str:
    """The 90 % interval of the mean difference beside the spread over seeds, and what follows."""
    differences = [other - score for score, other in zip(scores, others, strict=True)]
    mean, spread = statistics.mean(differences), max(scores) - min(scores)
    half = (
        stats.t.ppf(0.95, len(differences) - 1)
        * statistics.stdev(differences)
        / len(differences) ** 0.5
    )
    is_equivalent = max(abs(mean - half), abs(mean + half)) < spread
    return (
        f"Mean difference {mean:+.2f} points, 90 % interval {mean - half:+.2f} to"
        f" {mean + half:+.2f}; the torch loader's scores span {spread:.2f} points"
        f" ({min(scores):.2f} to {max(scores):.2f}), ffcv's {max(others) - min(others):.2f}. The"
        f" interval lies {'within' if is_equivalent else '**not** within'} the spread over seeds:"
        f" the two are {'' if is_equivalent else '**not** '}shown to be equivalent at 5 %."
    )


WORDS = """\
# Does the loader change what a model learns?

Each seed was trained twice, by the torch loader from JPEG files (libjpeg-turbo) and by ffcv from a `.beton` of the same files: 500
CIFAR-10 images per class, {num_val:,} to score, resnet18, A3 adapted, 5 epochs of 32 px. Both read the same images in the same order with the same boxes; what
differs is how a JPEG becomes pixels (half a grey level in the mean), and what training makes of that. So short a training has low scores: it is the difference that is asked for.

{table}

{verdict}

Written by `python tests/benchmarks/study_loaders.py --src <cifar10> --seeds {num_seeds}`; rows in [loaders/torch](loaders/torch/rows) and [loaders/ffcv](loaders/ffcv/rows).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/loaders"),
        help="folder of the images, the .beton files and the runs",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loaders", default=" ".join(LOADERS), help="only these")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    if not given.page:
        prepared(given.src, given.work.resolve())
        for seed in range(given.seeds):
            for loader in given.loaders.split():
                if seed not in rows_of(given.results, loader):
                    train(loader, seed, given.work.resolve(), given.results.resolve())
    if all(len(rows_of(given.results, loader)) > 1 for loader in LOADERS):
        (given.results / "loaders.md").write_text(page(given.results))


if __name__ == "__main__":
    main()
