"""Does another state of the code train the same bits? A dozen recipes on the digits, 8 steps each.

    golden.py --checkout DIR --python DIR/.venv/bin/python --out before.json   train all
    golden.py --compare before.json after.json                              exit 1 at any difference
    golden.py --checkout DIR --stop-at 4 --keep FOLDER [--only A3 convnext]    leave stopped runs
    golden.py --checkout DIR --resume FOLDER --against before.json             resume copies of them

It knows nothing of the layout of trainer/ but the command line, the files of a run folder and
`trainer.data.order`, so that one copy of it drives two checkouts. Only equal machines with equal
torch, on one thread, can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# 1437 // 352 = 4 steps an epoch, of 4 micro-batches each
SHORT = "epochs=2 batch.images=352 batch.norm_images=88"
GROWING = (
    "image.train_px=64 image.test_px=64 image.growth="
    "{from_px: 32, from_epoch: 0.5, to_epoch: 1.5, multiple_px: 16, updated: per_step}"
)
RECIPES = {
    "A1": ("resnet18", f"{SHORT} augment.random_resized_crop.area=[0.35,1.0]"),
    "A2": ("resnet18", SHORT),
    "A3": ("resnet18", SHORT),
    "convnext": ("convnext_atto", f"{SHORT} mix.images=88"),
    # the last of 4 steps an epoch has 357 images
    "torchvision-v1": (
        "resnet18",
        "epochs=2 batch.images=360 batch.norm_images=120 lr.schedule.every_epochs=1",
    ),
    "torchvision-v2": ("resnet18", SHORT),
    "gn-ws": ("resnet18", f"{SHORT} lr.schedule.every_epochs=1"),
    "bcn": ("resnet18", f"{SHORT} lr.schedule.every_epochs=1"),
    "ffcv-rn18-16": (
        "resnet18",
        f"{SHORT} lr.schedule.points=[[0,1.0e-4],[1,1.0],[2,0.0]] {GROWING}",
    ),
    "mosaic-mild": ("resnet18", f"{SHORT} {GROWING}"),
    "pycls-dds": ("resnet18", SHORT),
    "bit-i1k": ("resnet18", f"{SHORT} lr.warmup_steps=2"),
}
NUM_STEPS = 8
TEXTS = ("title", "source", "assumed", "unconfirmed", "published")
SCORES = ("status", "steps", "top1_pct", "top5_pct", "loss_nats", "other_top1_pct")
EXIT_STOPPED = 75

ORDER = """
import json, sys
from trainer.data.order import step_ids
for line in sys.stdin:
    print(json.dumps([step_ids(*numbers).tolist() for numbers in json.loads(line)]))
"""


def train(
    checkout: Path, python: Path, recipe: str, folder: Path, inject: str = ""
) -> subprocess.CompletedProcess:
    """Run one recipe's command of a checkout, its runs and rows under folder."""
    model, overrides = RECIPES[recipe]
    words = ["train", "--recipe", recipe, "--model", model, "--data", "digits", "--set", overrides]
    words += [
        "--device",
        "cpu",
        "--workers",
        "0",
        "--runs",
        str(folder / "runs"),
        "--results",
        str(folder / "results"),
    ]
    words += ["--inject", inject] if inject else []
    return python_of(checkout, python, ["-m", "trainer", *words])


def python_of(
    checkout: Path, python: Path, words: list[str], text: str = ""
) -> subprocess.CompletedProcess:
    """Run a checkout's own Python in it, on one thread."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *words], cwd=checkout, env=environment, input=text, capture_output=True, text=True
    )


def measured(checkout: Path, python: Path, folder: Path) -> dict:
    """All that must be the same, of the one run under folder."""
    import yaml

    (row_path,) = (folder / "results" / "rows").glob("*.json")
    row = json.loads(row_path.read_text())
    run = folder / "runs" / row["run"]
    resolved, plan = (
        yaml.safe_load((run / "recipe.yaml").read_text()),
        json.loads((run / "plan.json").read_text()),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    facts = [
        row["seed"],
        plan["profile"]["num_train"],
        resolved.get("repeats") or 1,
        resolved["batch"]["images"],
    ]
    steps = [[facts[0], step, *facts[1:], plan["steps_per_epoch"]] for step in range(row["steps"])]
    order = python_of(checkout, python, ["-c", ORDER], json.dumps(steps))
    return {
        "run": row["run"],
        "digest": row["digest"],
        "resolved_sha256": digest_of(
            {key: value for key, value in resolved.items() if key not in TEXTS}
        ),
        "weights_sha256": row["weights_sha256"],
        "order_sha256": digest_of(json.loads(order.stdout))
        if order.returncode == 0
        else order.stderr[-300:],
        "num_params": row["num_params"],
        "gmacs": row["gmacs"],
        "data_fingerprint": row["data_fingerprint"],
        "scores": {name: row[name] for name in SCORES},
        "metrics": [
            [value for value in line.values() if isinstance(value, (int, float))] for line in lines
        ],
    }


def digest_of(data) -> str:
    """16 hex digits of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def train_all(checkout: Path, python: Path, names: list[str]) -> dict:
    """What came out of each recipe."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as made:
            done = train(checkout, python, name, Path(made))
            if done.returncode:
                sys.exit(
                    f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
                )
            found[name] = measured(checkout, python, Path(made))
        assert found[name]["scores"]["steps"] == NUM_STEPS, (name, found[name]["scores"])
        print(
            f"{name:15} {found[name]['weights_sha256'][:16]}",
            flush=True,
        )
    return found


def stop_all(checkout: Path, python: Path, names: list[str], step: int, folder: Path) -> None:
    """Leave each recipe's run in a folder of its own, stopped by SIGTERM in a step."""
    for name in names:
        done = train(checkout, python, name, folder / name, inject=f"term@{step}")
        if done.returncode != EXIT_STOPPED:
            sys.exit(
                f"{name}: exit {done.returncode}, not {EXIT_STOPPED}\n"
                f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        print(f"{name:15} {done.stdout.strip().splitlines()[-1]}", flush=True)


def resume_all(checkout: Path, python: Path, folder: Path, expected: dict) -> int:
    """Resume copies of stopped runs; 1 where one ends otherwise and is not refused in one line."""
    is_good = True
    for stopped in sorted(path for path in folder.iterdir() if path.is_dir()):
        name = stopped.name
        with tempfile.TemporaryDirectory() as made:
            copy = Path(shutil.copytree(stopped, Path(made) / name))
            (before,) = [path.name for path in (copy / "runs").iterdir()]
            done = train(checkout, python, name, copy)
            if done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1:
                print(f"{name:15} refused: {done.stderr.strip()}")
                continue
            if done.returncode:
                print(f"{name:15} exit {done.returncode}: {done.stderr.strip()[-1000:]}")
                is_good = False
                continue
            now = measured(checkout, python, copy)
        other = [key for key in expected[name] if now[key] != expected[name][key]]
        was_resumed = now["run"] == before
        is_good &= was_resumed and not other
        how = "resumed" if was_resumed else f"started again as {now['run']}, {before} is left"
        print(
            f"{name:15} {how}: {'the same' if not other else 'not the same: ' + ', '.join(other)}",
            flush=True,
        )
    return 0 if is_good else 1


def compare(a: dict, b: dict, ignored: list[str]) -> int:
    """Print one line for each recipe; 1 where anything differs."""
    is_same = a.keys() == b.keys()
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            print(f"{name:15} only in {'the first' if name in a else 'the second'}")
            continue
        keys = [key for key in a[name].keys() | b[name].keys() if key not in ignored]
        other = sorted(key for key in keys if a[name].get(key) != b[name].get(key))
        is_same &= not other
        weights = a[name]["weights_sha256"][:16]
        print(f"{name:15} {weights}  {'DIFFERENT: ' + ', '.join(other) if other else 'the same'}")
        for key in other:
            print(
                f"    {key}\n"
                f"      {str(a[name].get(key))[:300]}\n      {str(b[name].get(key))[:300]}"
            )
    print("all the same" if is_same else "not the same")
    return 0 if is_same else 1


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--checkout", type=Path)
    words.add_argument("--python", type=Path)
    words.add_argument("--out", type=Path)
    words.add_argument("--only", nargs="*", choices=[*RECIPES], default=[*RECIPES])
    words.add_argument("--compare", nargs=2, type=Path)
    words.add_argument(
        "--ignore", nargs="*", default=[], help="fields that may differ, such as run"
    )
    words.add_argument("--stop-at", type=int, help="stop in this step, 1 the first")
    words.add_argument("--keep", type=Path, help="folder for stopped runs")
    words.add_argument("--resume", type=Path, help="folder of stopped runs")
    words.add_argument(
        "--against", type=Path, help="what undisturbed runs came to, written by --out"
    )
    given = words.parse_args()
    if given.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in given.compare), given.ignore))
    if not given.checkout:
        words.error("--checkout or --compare is needed")
    # not resolved: a link to a venv's python is what makes it that venv's
    checkout, python = (
        given.checkout.resolve(),
        Path(os.path.abspath(given.python or given.checkout / ".venv/bin/python")),
    )
    if given.stop_at:
        stop_all(checkout, python, given.only, given.stop_at, given.keep.resolve())
    elif given.resume:
        sys.exit(
            resume_all(
                checkout, python, given.resume.resolve(), json.loads(given.against.read_text())
            )
        )
    else:
        given.out.write_text(json.dumps(train_all(checkout, python, given.only), indent=1) + "\n")


if __name__ == "__main__":
    main()
