"""Components from a file of the user's own: loaded, recorded, carried to every process, and held
against a row.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from trainer.runs.results import read_row_file

EXTRAS = Path(__file__).parents[1] / "support" / "extras.py"
SMALL = "epochs=2 image.train_px=32 image.test_px=32 batch.images=32 batch.norm_images=32"
OURS = {
    "loss": {"name": "brier"},
    "lr.schedule": {"name": "trapezoid", "flat_epochs": 1.0, "end": 1.0e-6},
    "optimizer": {"name": "adagrad", "weight_decay": 1.0e-4},
    "model": {"norm": {"name": "one_group", "eps": 1.0e-5}},
    "mix": {"name": "half_mix", "partner": "rolled"},
    "augment": [
        {
            "name": "random_resized_crop",
            "area": [0.9, 1.0],
            "aspect": [0.75, 1.3333],
            "interpolation": "bilinear",
        },
        {"name": "invert", "share": 0.5},
    ],
}


def rsb(folder: Path, *words, **variables):
    """A command in a process of its own, as these change what all of a process knows."""
    environment = {key: value for key, value in os.environ.items() if key != "RSB_PLUGINS"}
    command = [sys.executable, "-m", "trainer", *map(str, words)]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def plugin(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_components_of_a_users_own_train_ablate_and_reproduce(tmp_path):
    """All kinds at once; in forked cells with loader processes, which get the classes by their
    names.
    """
    shutil.copy(EXTRAS, tmp_path / "extras.py")
    cells = [{"name": "ours", "set": OURS}, {"name": "plain"}]
    page = {
        "name": "own",
        "title": "t",
        "question": "q",
        "source": "s",
        "recipe": "A2",
        "models": ["test_resnet"],
        "data": ["digits", "stripes"],
        "seeds": [0],
        "design": {"name": "listed", "cells": cells},
    }
    page["budget"] = {"epochs": 1}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(page))
    done = rsb(
        tmp_path,
        "ablate",
        "--ablation",
        "own.yaml",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--plugins",
        "extras.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [read_row_file(path) for path in (tmp_path / "results" / "rows").glob("*.json")]
    assert {row.data for row in rows} == {"digits", "stripes"} and len(rows) == 4
    (sha256,) = {row.plugins["extras.py"] for row in rows}
    assert len(sha256) == 64
    row = next(row for row in rows if row.data == "digits" and "ours" in row.cell)
    again = ["reproduce", "--row", row.run, "--device", "cpu"]
    done = rsb(tmp_path, *again, "--plugins", "extras.py")
    assert done.returncode == 0 and "bit-identical" in done.stdout, done.stdout + done.stderr

    (tmp_path / "extras.py").write_text(EXTRAS.read_text() + "# changed\n")
    for words, found in (
        (["--plugins", "extras.py"], sha256[:12]),
        ([], "extras.py is not loaded"),
    ):
        done = rsb(tmp_path, *again, *words)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and found in line and "anyway=1" in line


def test_a_plan_of_ranks_and_a_job_file_know_the_plugin(tmp_path):
    shutil.copy(EXTRAS, tmp_path / "extras.py")
    common = [
        "--recipe",
        "A2",
        "--model",
        "test_resnet",
        "--data",
        "stripes",
        "--plugins",
        "extras.py",
    ]
    done = rsb(
        tmp_path,
        "train",
        *common,
        "--set",
        "epochs=1 loss={name: brier} batch.norm_images=8",
        "--procs",
        "2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = rsb(tmp_path, "launch-slurm", *common, "--gpus", "0", "--set", "loss={name: brier}")
    assert done.returncode == 0 and "--plugins extras.py" in (tmp_path / "job.sh").read_text()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch\nx = (\n", "mine.py:2: SyntaxError"),
        ("x = 1\ndef f():\n    raise KeyError('boo')\nf()\n", "mine.py:3: KeyError: 'boo'"),
        ("import no_such_module\n", "mine.py:1: ModuleNotFoundError"),
        (
            "from typing import Literal\nfrom trainer.components.schedules import Schedule\n"
            "class S(Schedule):\n    name: Literal['s'] = 's'\n    def at(self, *given): ...\n",
            "mine.py:3: trainer.base.plugins.mine.S: a schedule needs scaled_by, scaled_to",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line_with_its_place(tmp_path, text, found):
    plugin(tmp_path, text)
    done = rsb(tmp_path, "recipes", "--plugins", "mine.py")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {found}")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("nowhere.py", "plugins=nowhere.py: there is no such Python file"),
        ("my-own.py", "plugins=my-own.py: cannot be the name of a module"),
        ("mine.py,other/mine.py", "has the same name"),
    ],
)
def test_a_path_that_is_no_plugin_is_refused(tmp_path, given, found):
    (tmp_path / "other").mkdir()
    for name in ("my-own.py", "mine.py", "other/mine.py"):
        plugin(tmp_path, "x = 1\n", name)
    done = rsb(tmp_path, "recipes", "--plugins", given)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and found in line


def test_a_package_brings_plugins_by_an_entry_point(tmp_path):
    package = tmp_path / "more_losses-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: more-losses\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[rsb.plugins]\nall = more_losses\n")
    plugin(tmp_path, EXTRAS.read_text(), "more_losses.py")
    words = [
        "--recipe",
        "A2",
        "--model",
        "test_resnet",
        "--data",
        "stripes",
        "--set",
        "loss={name: brier} epochs=1",
    ]
    done = rsb(tmp_path, "train", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results" / "rows").glob("*.json")
    assert list(read_row_file(path).plugins) == ["more-losses:all"]


FORMAT = """
import pickle, sys
from pathlib import Path
from trainer.data.datasets.packed import open_files
from trainer.base.plugins import load_plugins

load_plugins(sys.argv[1])
index = open_files(Path(sys.argv[2]), "train")
sys.stdout.buffer.write(pickle.dumps(index))
"""


def test_a_format_of_files_is_read_here_and_in_a_process_that_has_loaded_nothing(tmp_path):
    for split, num_images in (("train", 12), ("val", 4)):
        images = np.arange(num_images, dtype=np.uint8)[:, None, None] * np.ones((1, 9, 9), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(num_images) % 2)
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    sent = subprocess.run(
        [sys.executable, "-c", FORMAT, EXTRAS, tmp_path],
        env=variables,
        capture_output=True,
        timeout=120,
    )
    assert sent.returncode == 0, sent.stderr.decode()
    read = (
        "import io, pickle, sys; from PIL import Image; index = pickle.load(sys.stdin.buffer);"
        "images = [Image.open(io.BytesIO(index.path(i).read_bytes())) for i in range(12)]\n"
        "print(index.num_images, [image.getpixel((0, 0)) for image in images])"
    )
    there = variables | {"RSB_PLUGINS": str(EXTRAS)}
    found = subprocess.run(
        [sys.executable, "-c", read], input=sent.stdout, env=there, capture_output=True, timeout=120
    )
    assert found.stdout.decode().strip() == "12 [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]", (
        found.stderr.decode()
    )


def test_a_changed_plugin_makes_another_run_and_the_stopped_one_is_kept(tmp_path):
    """Its mathematics may be another: the steps of the two never end in one row."""
    shutil.copy(EXTRAS, tmp_path / "extras.py")
    words = ["train", "--recipe", "A2", "--model", "test_resnet", "--data", "stripes"]
    words += ["--plugins", "extras.py", "--checkpoint-s", "0"]
    words += ["--set", "epochs=2 loss={name: brier}"]
    assert rsb(tmp_path, *words, "--inject", "term@3").returncode == 75
    before = EXTRAS.read_text()
    (tmp_path / "extras.py").write_text(before + "# changed\n")
    assert rsb(tmp_path, *words).returncode == 0
    (tmp_path / "extras.py").write_text(before)
    resumed = rsb(tmp_path, *words)
    assert resumed.returncode == 0 and "resumed after step 3" in resumed.stderr + resumed.stdout
    rows = [read_row_file(path) for path in (tmp_path / "results" / "rows").glob("*.json")]
    assert len({row.plugins["extras.py"] for row in rows}) == 2 and all(row.bitwise for row in rows)
