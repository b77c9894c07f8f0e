"""A small folder of images with masks: coloured rectangles on a background, the class of each by
its colour.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from support import ranked
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.runs.job import Job, plan_of

CLASSES = ("ground", "red", "green")
COLOURS = np.array([(40, 40, 40), (220, 40, 40), (40, 220, 40)], np.uint8)
IGNORED = 255


def picture(seed: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] and its mask [H, W]: two rectangles, a strip that is not scored."""
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2):
        top, left = random.integers(0, height - 20), random.integers(0, width - 20)
        mask[top : top + 20, left : left + 20] = label
    image = COLOURS[mask] + random.integers(0, 30, mask.shape, dtype=np.uint8)[..., None]
    mask[:2] = IGNORED
    return image, mask


def write_masked(root: Path, num_train: int = 12, num_val: int = 4, is_split_first=False) -> Path:
    """images/<split>/…, masks/<split>/… and classes.txt; or <split>/images/… ."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, number, first in (("train", num_train, 0), ("val", num_val, 1000)):
        kinds = {kind: root / kind / split for kind in ("images", "masks")}
        if is_split_first:
            kinds = {kind: root / split / kind for kind in kinds}
        for folder in kinds.values():
            folder.mkdir(parents=True)
        for i in range(number):
            image, mask = picture(first + i)
            Image.fromarray(image).save(kinds["images"] / f"{i:03}.png")
            Image.fromarray(mask).save(kinds["masks"] / f"{i:03}.png")
    return root


def write_tables(root: Path, folder: Path, columns=("image", "mask"), **more) -> Path:
    """The images and masks of such a folder as `datasets` saves them, in the order of their names,
    and its classes.txt. more: features of further columns, each with one value for all rows.
    """
    import datasets

    features = {column: datasets.Image() for column in columns}
    features |= {name: feature for name, (feature, _) in more.items()}
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {
                column: {"bytes": path.read_bytes(), "path": path.name}
                for column, path in zip(
                    columns, (image, folder / "masks" / split / image.name), strict=True
                )
            }
            | {name: value for name, (_, value) in more.items()}
            for image in sorted((folder / "images" / split).iterdir())
        ]
        splits[name] = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(root), num_shards=dict.fromkeys(splits, 2))
    (root / "classes.txt").write_text((folder / "classes.txt").read_text())
    return root


RECIPE = """\
name: small-segmentation
version: 1
title: "a small recipe for tests"
source: "none"
task: {name: segmentation, head: {name: fcn, dropout: 0.1}, output_stride: 8, aux_weight: 0.4}
epochs: 2
batch: {images: 4, norm_images: 2}
lr: {peak: 0.02, updated: per_step, schedule: {name: polynomial, power: 0.9, end: 0.0, period: run}}
optimizer: {name: sgd, momentum: 0.9, weight_decay: 1.0e-4}
loss: {name: ce}
augment:
  - {name: scale_crop, scale: [0.5, 2.0], share: 0.9, interpolation: bilinear}
  - {name: flip}
  - {name: color_jitter, brightness: 0.2, contrast: 0.2, saturation: 0.2}
image: {train_px: 40, test_px: 48, test_crop_share: 1.0, test_interpolation: bilinear}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "small-segmentation.v1.yaml"
    path.write_text(text)
    return path


def masked_steps(ranks, root: str, folder: str, number: int, window: str) -> dict:
    """Some optimizer steps in float64 of four micro-batches each, shared by ranks, and the scores
    of a pass that they share.
    """
    recipe = Path(folder) / "small-segmentation.v1.yaml"
    overrides = f"batch.images=8 batch.norm_images=2 {window}"
    job = Job(str(recipe), "test_resnet", root, overrides=overrides, world_size=ranks.world_size)
    plan, settings = plan_of(job), make_settings("cpu", workers="0")
    data = open_data(plan.profile, Path(root))
    with ranked.in_float64():
        state = TrainingState(plan, settings, ranks)
        stream = data.train_stream(plan, settings, 0, ranks)
        losses = [train.optimizer_step(state, stream, step).item() for step in range(number)]
        scores = evaluate(
            plan, settings, state.model, data.val_batches(plan, settings, ranks), ranks=ranks
        )
    weights = {name: weight.detach() for name, weight in state.model.named_parameters()}
    return {"losses": losses, "weights": weights, "scores": scores.record()}
