"""Tiny sets of images with boxes, as COCO's JSON and VOC's XML have them, and a recipe for them."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.distributed.communicator import alone
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.runs.job import Job, plan_of

MODEL = "test_resnet"
CLASSES = {"bar": (200, 30, 30), "block": (30, 30, 220)}
RECIPE = """\
name: tiny-boxes
version: 1
title: "a detector of coloured rectangles"
source: "these tests"
task:
  name: detection
  detector: {name: retinanet, channels: 16, norm_groups: 4, anchor_px: 16, extra_from: p5, box_loss: l1,
    least_score: 0.05, nms_iou: 0.5, most_found: 20}
epochs: 2
batch: {images: 8, norm_images: 2}
lr: {peak: 2.0e-3, warmup_epochs: 1, warmup_from: 1.0e-4, updated: per_step,
  schedule: {name: cosine, end: 0.0, period: run}}
optimizer: {name: adamw, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.01}
loss: {name: focal, gamma: 2.0, alpha: 0.25, sum_classes: true}
augment:
  - {name: letterbox, scale: [0.8, 1.25], interpolation: bilinear}
  - {name: flip}
image: {train_px: 64, test_px: 64, test_crop_share: 1.0, test_interpolation: bilinear}
"""

DETA = """{name: detection, detector: {name: deta, channels: 32, num_levels: 3, num_heads: 4, num_points: 2,
    hidden_channels: 64, encoder_layers: 1, decoder_layers: 2, norm_groups: 4, num_queries: 30, most_per_box: 4,
    l1_weight: 5.0, giou_weight: 2.0, nms_iou: 0.7, most_found: 20}}"""
DETECTORS = {"retinanet": {}, "deta": {"task": DETA}}  # other lines of RECIPE


def picture(draw, width: int, height: int) -> tuple[Image.Image, list[tuple[list[int], str]]]:
    """Grey noise with one to three rectangles, and where they are."""
    pixels = draw.integers(90, 140, (height, width, 3), dtype=np.uint8)
    boxes = []
    for _ in range(draw.integers(1, 4)):
        name = list(CLASSES)[draw.integers(2)]
        across, down = (24, 10) if name == "bar" else (16, 16)
        left, top = draw.integers(0, width - across), draw.integers(0, height - down)
        pixels[top : top + down, left : left + across] = CLASSES[name]
        boxes.append(([int(left), int(top), across, down], name))
    return Image.fromarray(pixels), boxes


def coco_folder(root: Path, num_train: int = 24, num_val: int = 9) -> Path:
    """instances_{train,val}.json beside images/{train,val}/*.png of 64 x 48 and 48 x 64 px."""
    draw = np.random.default_rng(5)
    for split, number in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        (root / "images" / split).mkdir(parents=True)
        for place in range(number):
            width, height = (64, 48) if place % 2 else (48, 64)
            image, boxes = picture(draw, width, height)
            name = f"{place:03}.png"
            image.save(root / "images" / split / name)
            images.append({"id": place + 7, "file_name": name, "width": width, "height": height})
            for box, called in boxes:
                category = 3 if called == "bar" else 11
                annotations.append(
                    {"id": len(annotations), "image_id": place + 7, "category_id": category}
                    | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                )
        write_coco(root / f"instances_{split}.json", images, annotations)
    return root


def write_coco(path: Path, images: list, annotations: list) -> None:
    categories = [{"id": 11, "name": "block"}, {"id": 3, "name": "bar"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))


def changed(path: Path, change) -> None:
    """Let a function change the data of a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def recipe(folder: Path, **lines: str) -> Path:
    """The file of RECIPE in a folder, with other lines in place of its own."""
    text = RECIPE
    for key, line in lines.items():
        found = re.search(rf"^{key}:.*\n(?: .*\n)*", text, re.MULTILINE)
        text = text.replace(found[0], f"{key}: {line}\n")
    path = folder / "tiny-boxes.v1.yaml"
    path.write_text(text)
    return path


def words(folder: Path, data: Path, workers: int = 0, more: str = "", **lines: str) -> list[str]:
    """Those of a run of RECIPE on a folder of boxes."""
    named = {
        "recipe": recipe(folder, **lines), "model": MODEL, "data": data, "device": "cpu",
        "workers": workers, "checkpoint-s": 0, "runs": folder / "runs",
        "results": folder / "results", "set": more,
    }  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in named.items() if value != "")]


def planned(ranks, recipe_file: str, data: str, overrides: str = ""):
    """The plan of RECIPE for a number of ranks."""
    job = Job(recipe=recipe_file, model=MODEL, data=data, overrides=overrides)
    return plan_of(dataclasses.replace(job, world_size=ranks.world_size))


def steps(ranks, recipe_file: str, data: str, number: int) -> dict:
    """The losses and the weights of some optimizer steps."""
    plan, settings = planned(ranks, recipe_file, data), make_settings("cpu", workers="0")
    state = TrainingState(plan, settings, ranks)
    opened = open_data(plan.profile, Path(data))
    window = opened.train_stream(plan, settings, 0, ranks)
    losses = [train.optimizer_step(state, window, step).item() for step in range(number)]
    return {"losses": losses, "weights": state.model.state_dict()}


def scores(ranks, recipe_file: str, data: str) -> dict:
    """The record of the scores of a freshly drawn model, of this rank's share of small batches."""
    alone_plan = planned(alone(), recipe_file, data)
    settings = make_settings("cpu", workers="0")
    model = TrainingState(alone_plan, settings).model
    val = open_data(alone_plan.profile, Path(data)).val
    stream = alone_plan.recipe.of_task.evaluation_stream(val, alone_plan, 2, 64)
    batches = [stream[number] for number in range(len(stream))]
    return evaluate(alone_plan, settings, model, ranks.share(batches), ranks=ranks).record()
