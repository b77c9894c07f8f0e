"""What stands beside an exported model: how to show it an image, and a script that does."""

from __future__ import annotations

from typing import Any

from trainer.components.crops import evaluation_size
from trainer.data.image_folder import EXTENSIONS
from trainer.inference.classifier import Classifier
from trainer.inference.export.formats import INPUT, OUTPUT, Format
from trainer.models.trained import num_logits

_SCRIPT = '''\
"""Classify images: python use.py <photo or folder> ...   Needs {needs}, numpy and pillow."""
import json, sys
from pathlib import Path

KINDS = {kinds}
files = []
for path in map(Path, sys.argv[1:]):
    inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in KINDS)
    files += inside if path.is_dir() else [path]
if not files:
    print("usage: python use.py <photo or folder of photos> ...", file=sys.stderr)
    sys.exit(2)

import numpy as np
import {needs}
from PIL import Image

facts = json.loads((Path(__file__).parent / "preprocessing.json").read_text("utf-8"))
mean, std = (255 * np.array(facts[name], np.float32)[:, None, None] for name in ("mean", "std"))
side, path = facts["size_px"], str(Path(__file__).parent / facts["file"])
{opened}
{resize}
bad = []
for file in files:
    try:
        image = Image.open(file)
        image.load()
    except OSError as error:
        print(f"{{file}}: cannot be read as an image ({{error}})", file=sys.stderr)
        bad.append(file)
        continue
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("RGB"){to_grey}
    size = {size}
    image = resized(image, *size)
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32)
    pixels = (pixels.reshape(side, side, -1).transpose(2, 0, 1) - mean) / std
    logits = {run}
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = (-shares).argsort()[:5]
    print(file, *(f"{{facts['classes'][k]}} {{shares[k]:.4f}}" for k in best), sep="  ")
if bad:
    sys.exit(1)
'''

_SMOOTHED = """
def resized(image, width, height):
    return image.resize((width, height), Image.Resampling.{name})
"""

_NOT_SMOOTHED = '''
def resized(image, width, height):
    """Bilinear between the four nearest pixels, whose share is that of their centres."""
    pixels = np.asarray(image, np.float64).reshape(image.height, image.width, -1)
    for axis, size in enumerate((height, width)):
        last = pixels.shape[axis] - 1
        places = ((np.arange(size) + 0.5) * (last + 1) / size - 0.5).clip(0, last)
        first = places.astype(int)
        share = (places - first).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        second = pixels.take(np.minimum(first + 1, last), axis)
        pixels = (1 - share) * pixels.take(first, axis) + share * second
    return Image.fromarray(np.rint(pixels).astype(np.uint8).squeeze())
'''

_SIZES = {
    "center": '[int(facts["resize_px"] * length / min(image.size)) for length in image.size]',
    "squash": '[facts["resize_px"]] * 2',
}

# image files by extension: what pillow opens of what predict takes
KINDS = tuple(one for one in EXTENSIONS if one != ".npy")
_TO_GREY = {1: '.convert("L")', 3: ""}


def preprocessing(classifier: Classifier, form: Format, file: str) -> dict[str, Any]:
    """The facts of preprocessing.json: the shorter side is resized to resize_px, the middle square
    of size_px is kept (a model that gives maps takes any other of that size too); then
    (pixels / 255 - mean) / std of each channel.
    """
    image, number = classifier.image, len(classifier.classes) or num_logits(classifier.model)
    sides = [image.test_px] * 2 if classifier.gives_maps else []
    return {
        "file": file,
        "format": form.name,
        "model": classifier.name,
        "weights_sha256": classifier.weights_sha256,
        "input": {"name": INPUT, "shape": ["batch", image.channels, image.test_px, image.test_px]},
        "output": {"name": OUTPUT, "shape": ["batch", number, *sides]},
        "size_px": image.test_px,
        "resize_px": evaluation_size(image.test_px, image.crop_share),
        "crop_share": image.crop_share,
        "crop_mode": image.crop_mode,
        "interpolation": image.interpolation,
        "mean": list(image.mean),
        "std": list(image.std),
        "classes": [classifier.class_name(one) for one in range(number)],
    }


def use_script(classifier: Classifier, form: Format) -> str | None:
    """A script that classifies image files without this package; None for images of channels that
    no image file has, or with a border, and for classes of pixels.
    """
    image = classifier.image
    if classifier.gives_maps or image.channels not in _TO_GREY or image.crop_mode not in _SIZES:
        return None
    is_smoothed = image.interpolation != "bilinear_no_antialias"
    resize = _SMOOTHED.format(name=image.interpolation.upper()) if is_smoothed else _NOT_SMOOTHED
    return _SCRIPT.format(
        kinds=KINDS,
        needs=form.use_needs,
        opened=form.use_open,
        resize=resize,
        size=_SIZES[image.crop_mode],
        to_grey=_TO_GREY[image.channels],
        run=form.use_run,
    )
