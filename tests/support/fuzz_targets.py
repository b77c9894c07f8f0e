"""Every reader of what somebody else may have written, with endless damaged inputs for it."""

import hashlib
import io
import itertools
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from support import packing
from support.fuzzed import Mutator
from support.plans import small_plan
from support.rows import ROW
from trainer.ablation.live_table import read_progress
from trainer.ablation.spec import ablation_paths, load_ablation
from trainer.base.names import inside
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.base.terminal import Terminal
from trainer.cli import table_show
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import open_set
from trainer.data.decode import oddities, read_image, train_square
from trainer.data.ffcv.beton_writer import write_beton
from trainer.data.index import open_index
from trainer.data.jpeg import Jpeg, read_for_training
from trainer.data.profile import find_profile
from trainer.engine.state import TrainingState
from trainer.recipe.identity import first_name
from trainer.recipe.load import parse
from trainer.recipe.plan import make_plan
from trainer.recipe.profiles import PROFILES
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import recipe_paths
from trainer.report.compare import row_differences
from trainer.report.curves import read_curves
from trainer.runs.checkpoint import load_checkpoint, save_checkpoint
from trainer.runs.job import Job, plan_of
from trainer.runs.plan_file import write_plan
from trainer.runs.results import read_row, row_path, rows_folder
from trainer.runs.run import TrainingRun
from trainer.runs.run_folder import plan_of_run

OVERRIDES = (
    "epochs=5 loss.name=ce", "lr.peak=5e-3 lr.warmup_epochs=2", "mix={name: mixup, alpha: 0.2}",
    "smoothing=null drop_path=0.1", "augment.rand_augment.magnitude=9",
    "optimizer.name=adamw optimizer.weight_decay=0.05", "batch.images=64 batch.norm_images=16",
    "'model.norm={name: group_norm, groups: 8, eps: 1e-5}'",
    "average={name: ema, decay: 0.99, every_steps: 4}", "image.train_px=64",
)  # fmt: skip


def pages(mutate: Mutator, folder: Path):
    """Recipes: whole recipes, read, folded for a model, planned for the digits."""
    texts = [path.read_text() for path in recipe_paths()]
    path = folder / "recipe.yaml"
    while True:
        text = mutate.text(mutate.chosen(texts))
        if mutate.below(20) == 0:
            path.write_bytes(mutate.bytes(text.encode(errors="surrogatepass")))
        else:
            path.write_text(text, errors="surrogatepass")
        yield lambda: plan_of(Job(str(path), "resnet50")).recipe.to_yaml()


def profiles(mutate: Mutator, folder: Path):
    """Profiles of a user's own, and words of data=."""
    page = (
        "name: mine\nnum_classes: 10\nnum_train: 1000\nnum_val: 100\nmean: [0.5, 0.5, 0.5]\nstd:"
        " [0.2, 0.2, 0.2]\nadapt: {train_px: 32, epochs: 3}\n"
    )
    path = folder / "mine.yaml"
    while True:
        path.write_text(mutate.text(page), errors="surrogatepass")
        name = mutate.chosen((str(path), mutate.text("digits").replace("\0", "")))
        yield lambda: find_profile(name)


def overrides(mutate: Mutator, folder: Path):
    """set=, over recipes that are whole."""
    recipes = [load_recipe(path).for_model("resnet50") for path in recipe_paths()]
    while True:
        recipe, text = mutate.chosen(recipes), mutate.text(mutate.chosen(OVERRIDES))
        yield lambda: make_plan(
            apply_overrides(recipe, text)[0], "resnet50", PROFILES["imagenet-1k"]
        )


def values(mutate: Mutator, folder: Path):
    """YAML text as it is: no recipe that its values would have to fit."""
    while True:
        text = mutate.text(
            mutate.chosen(("{a: 1, b: [x, y]}", "a: 1\nb:\n  - x\n  - {c: 2.5}\n", "5e-3", "'x'"))
        )
        yield lambda: parse(text, "set")


def rows(mutate: Mutator, folder: Path):
    """Rows: read from the store, compared, printed, held against cells."""
    rows_folder(folder).mkdir(exist_ok=True)
    path, data = row_path(folder, ROW.run), json.loads(ROW.as_json())
    data["deviations"] = [{"path": "epochs", "before": "600", "after": "10", "origin": "set"}]
    out = Terminal(file=io.StringIO(), width=120)

    def read():
        row = read_row(folder, ROW.run)
        first_name(row.run), row.as_json(), inside(folder, row.run, "run")
        row_differences(row, ROW), table_show.print_comparison(out, row, ROW, folder)
        out.file.seek(0), out.file.truncate()

    while True:
        path.write_bytes(mutate.json(data))
        yield read


def indexes(mutate: Mutator, folder: Path):
    """The cached index of an image folder: whatever lies there, the folder's own files are found."""
    root = folder / "photos"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(3):
                (root / split / name / f"{number}.jpg").write_bytes(b"x" * number)
    for place, _, _ in os.walk(root):
        os.utime(place, (1e9, 1e9))
    found = open_index(root, "train")
    expected = [found.path(i) for i in range(found.num_images)]
    files = {
        path: path.read_bytes()
        for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("train*")
        if path.is_file()
    }

    def read():
        again = open_index(root, "train")
        assert [
            again.path(i) for i in range(again.num_images)
        ] == expected and again.labels.tolist() == [0, 0, 0, 1, 1, 1]

    while True:
        damaged = mutate.chosen(sorted(files))
        for path, content in files.items():
            is_json = path.suffix == ".json"
            path.write_bytes(
                (mutate.json(json.loads(content)) if is_json else mutate.bytes(content))
                if path == damaged
                else content
            )
        yield read


def checkpoints(mutate: Mutator, folder: Path):
    """Checkpoints with a checksum that fits: somebody else's, not a disk's, damage."""
    state = {
        "weights": torch.arange(6.0).reshape(2, 3),
        "progress": {"step": 3, "scores": {"model": {"num_top1": 3}}},
        "none": None,
    }
    path = save_checkpoint(folder / "checkpoints", 3, state)
    content = path.read_bytes()
    while True:
        damaged = mutate.bytes(content)
        path.write_bytes(damaged)
        path.with_suffix(".sha256").write_text(hashlib.sha256(damaged).hexdigest())
        yield lambda: load_checkpoint(path.parent, lambda line: None)


def states(mutate: Mutator, folder: Path):
    """Checkpoints that open, but hold another state than the run's."""
    state = TrainingState(small_plan(), make_settings("cpu", workers="0"))
    run = TrainingRun(folder / "run", state, Console(), StopRequest())
    saved = _lists(run.state_dict())

    def resumed():
        run.resume()
        state.progress.step + state.progress.loss_steps

    while True:
        (folder / "run").mkdir(exist_ok=True)
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        save_checkpoint(folder / "run" / "checkpoints", 3, mutate.tree(saved))
        yield resumed


def _lists(data):
    """Plain data that a mutator knows its way in; tensors stay."""
    if isinstance(data, dict):
        return {key: _lists(part) for key, part in data.items()}
    return [_lists(part) for part in data] if isinstance(data, (list, tuple)) else data


def images(mutate: Mutator, folder: Path):
    """Image files of every kind, in every number of channels."""
    written = [
        image_file(*kind)
        for kind in (
            ("JPEG", "RGB"),
            ("JPEG", "CMYK"),
            ("PNG", "RGBA"),
            ("PNG", "I;16"),
            ("WEBP", "RGB"),
            ("BMP", "RGB"),
            ("GIF", "P"),
            ("TIFF", "RGB"),
            ("PPM", "RGB"),
            ("EPS", "RGB"),
        )
    ]
    array = io.BytesIO()
    np.save(array, np.zeros((9, 8, 4), np.uint8))
    written.append(array.getvalue())
    path = folder / "image.jpg"
    while True:
        path.write_bytes(mutate.bytes(mutate.chosen(written)))
        channels = mutate.chosen((1, 3, 4))

        def read():
            image = read_image(path, channels)
            (
                train_square(image, (0, 0, 2, 2), Image.Resampling.BILINEAR, 4),
                oddities(path, channels),
            )
            lazy = read_for_training(path, channels)
            if isinstance(lazy, Jpeg) and lazy.width * lazy.height < 10**6:
                lazy.square((0, 0, lazy.height // 2 + 1, lazy.width), Image.Resampling.BILINEAR, 4)

        yield read


def image_file(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    image = Image.fromarray(pixels[:, :, :3])
    image = (
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def ablations(mutate: Mutator, folder: Path):
    """Recipes of ablations."""
    texts = {path.name: text for path in ablation_paths() if len(text := path.read_text()) < 5000}
    while True:
        name = mutate.chosen(sorted(texts))
        path = folder / name
        path.write_text(mutate.text(texts[name]), errors="surrogatepass")
        yield lambda: load_ablation(path)


def run_folders(mutate: Mutator, folder: Path):
    """What a run left: its plan, its recipe, its curves."""
    job, run = Job("A2", "test_resnet"), folder / "run"
    write_plan(run, job, plan_of(job))
    lines = [
        {"step": 10, "epoch": 0.2, "loss_nats": 0.7, "lr": 0.01},
        {"step": 45, "epoch": 1, "weights": "model", "top1_pct": 12.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {path: path.read_bytes() for path in run.iterdir()}

    def read():
        read_progress(run)
        plan_of_run(run)
        read_curves(run, ROW)

    while True:
        damaged = mutate.chosen(sorted(files))
        for path, content in files.items():
            path.write_bytes(
                content
                if path != damaged
                else (
                    mutate.json(json.loads(content))
                    if path.suffix == ".json"
                    else mutate.bytes(content)
                )
            )
        yield read


def idx_files(mutate: Mutator, folder: Path):
    """The files that MNIST comes in, packed and not."""
    import gzip

    profile = PROFILES["mnist"].model_copy(update={"num_train": 3, "num_val": 3})
    contents = {
        "images-idx3": struct.pack(">4B3i", 0, 0, 8, 3, 3, 4, 4) + bytes(range(48)),
        "labels-idx1": struct.pack(">4Bi", 0, 0, 8, 1, 3) + bytes([1, 2, 3]),
    }
    while True:
        packed = mutate.below(2)
        damaged = mutate.chosen(sorted(contents))
        for old in folder.glob("train-*"):
            old.unlink()
        for name, content in contents.items():
            content = gzip.compress(content) if packed else content
            path = folder / f"train-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(mutate.bytes(content) if name == damaged else content)

        def read():
            found = open_set(profile, folder, "train")
            assert found.labels.max() < 10 and found.read(2).size

        yield read


def _photos(root: Path) -> Path:
    """An image folder of two classes: six and two small images."""
    for split, number in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for place in range(number):
                (root / split / name / f"{name}{place}.png").write_bytes(image_file("PNG", "RGB"))
    return root


def _read_damaged(mutate: Mutator, out: Path, read):
    """One file of a folder damaged at a time, never the same time of change, so that nothing is
    found in the cache.
    """
    files = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for number in itertools.count():
        damaged = mutate.chosen(sorted(files))
        for path, content in files.items():
            path.write_bytes(mutate.bytes(content) if path == damaged else content)
            os.utime(path, (1e9 + number, 1e9 + number))
        yield read


def _all_read(profile, root: Path, in_beton: bool = False) -> None:
    for images in (opened := open_data(profile, root, in_beton)).train, opened.val:
        for place in range(min(images.num_images, 3)):
            images.read(place)


def tars(mutate: Mutator, folder: Path):
    """Shards of a WebDataset."""
    root = packing.into_tars(_photos(folder / "photos"), folder / "shards")
    yield from _read_damaged(mutate, root, lambda: _all_read(find_profile(str(root)), root))


def parquets(mutate: Mutator, folder: Path):
    """Parquet files as the Hub lays them out."""
    root = packing.into_parquet(_photos(folder / "photos"), folder / "tables", ["a", "b"])
    yield from _read_damaged(mutate, root, lambda: _all_read(find_profile(str(root)), root))


def betons(mutate: Mutator, folder: Path):
    """The .beton files of ffcv with the facts beside them."""
    root, out = _photos(folder / "photos"), folder / "betons"
    profile = find_profile(str(root))
    for split in ("train", "val"):
        write_beton(open_set(profile, root, split), out, split, profile)
    yield from _read_damaged(mutate, out, lambda: _all_read(profile, out, in_beton=True))


def names(mutate: Mutator, folder: Path):
    """Names of runs, cells and recipes, as paths and on a terminal."""
    out = Terminal(file=io.StringIO(), width=100)

    def read(name):
        out.file.seek(0), out.file.truncate()
        out.print(name, markup=False)
        shown = out.file.getvalue()
        assert (
            all(mark.isprintable() or mark in "\n" or mark.isspace() for mark in shown)
            and "\x1b" not in shown
        ), shown
        path = inside(folder, name, "run")
        assert (
            path.parent == folder
            and path.resolve().parent == folder.resolve()
            and row_path(folder, name).parent == rows_folder(folder)
        )

    while True:
        name = mutate.text(
            mutate.chosen(("A1.v1-resnet50-digits-s0-abcdef", "a", "norm-micro-batch", ".."))
        )
        yield lambda: read(name)


# How many of 20,000: as many as each is worth, and cheap.
TARGETS = {
    pages: 2500, profiles: 1000, overrides: 3000, values: 2000, rows: 3300, indexes: 1000,
    checkpoints: 1500, states: 100, images: 2500, ablations: 400, run_folders: 500, idx_files: 800,
    names: 500, tars: 550, parquets: 250, betons: 100,
}  # fmt: skip
