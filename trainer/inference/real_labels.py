"""ImageNet's validation images by their reassessed labels (ReaL): an image may have several right
classes, or none, and then it does not count.

Source: Beyer et al. 2020, arXiv:2006.07159; its real.json has a list of classes for each image, in
the order of the images' numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trainer.base.errors import DataError, UserError
from trainer.base.json_text import json_file
from trainer.inference.quality import Judged

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_NUM_CLASSES = 1000


def read_real(path: Path) -> list[list[int]]:
    """The classes of each image. Raises UserError for what is no such file."""
    try:
        found = json_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"real={path}: cannot be read ({error})", "use real=real.json") from None
    is_one = isinstance(found, list) and all(
        isinstance(each, list) and all(type(one) is int and 0 <= one < _NUM_CLASSES for one in each)
        for each in found
    )
    if not is_one:
        raise UserError(f"real={path}: not a list of lists of classes", "use ReaL's real.json")
    return found


def real_top1(judged: Judged, names: Sequence[str], real: list[list[int]]) -> tuple[int, int]:
    """(images whose answer is among their labels, images that have any). names: of the images
    judged, each with its number in it as ImageNet has it.

    Raises DataError for an image without a number, or one that the labels do not reach to.
    """
    if len(judged.classes) != _NUM_CLASSES:
        raise DataError(
            f"real=: labels of ImageNet's {_NUM_CLASSES} classes, the model has"
            f" {len(judged.classes)}",
            "leave real= out",
        )
    right = number = 0
    for name, predicted in zip(names, judged.predicted.tolist(), strict=True):
        found = _NUMBER.search(name)
        if found is None or not 0 < int(found[1]) <= len(real):
            raise DataError(
                f"{name}: no ILSVRC2012_val_<number> of the {len(real)} in real=",
                "use ImageNet's validation images by their own names",
            )
        labels = real[int(found[1]) - 1]
        number += bool(labels)
        right += predicted in labels
    return right, number
