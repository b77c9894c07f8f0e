"""The order of an epoch and the opening of an index at ImageNet-21k's size: seconds and MiB.

python tests/benchmarks/bench_scale.py [--images 14000000] [--classes 21841] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from written import write

from trainer.base import provenance
from trainer.base.cache import cache_folder
from trainer.data.index import _LAYOUT, ARRAYS, fingerprint_of, open_index, store_index
from trainer.data.order import _permutation, micro_batch_ids

NAME = b"n00000000/n00000000_000000.JPEG"


def synthetic(num_images: int, num_classes: int) -> dict[str, np.ndarray]:
    """The arrays of an index of so many files."""
    offsets = np.arange(num_images + 1, dtype=np.int64) * len(NAME)
    labels = (np.arange(num_images, dtype=np.int64) * num_classes // num_images).astype(np.int32)
    columns = (
        np.tile(np.frombuffer(NAME, np.uint8), num_images),
        offsets,
        labels,
        np.full(num_images, 110_000, np.int64),
    )
    return dict(zip(ARRAYS, columns, strict=True))


def stored(root: Path, num_images: int, num_classes: int) -> None:
    """An image folder's class folders, without their files, and the cached index of what would be
    in them.
    """
    import hashlib

    classes = tuple(f"n{number:08}" for number in range(num_classes))
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            os.utime(root / split / name, (1e9, 1e9))
        os.utime(root / split, (1e9, 1e9))
    arrays = synthetic(num_images, num_classes)
    stamps = {name: 10**18 for name in (".", *classes)}
    facts = {
        "layout": _LAYOUT,
        "folder": os.path.abspath(root / "train"),
        "classes": classes,
        "stamps": stamps,
        "ignored": {},
    }
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    store_index(
        arrays | {"times": np.zeros(num_images, np.int64)},
        facts | {"fingerprint": fingerprint_of(arrays)},
        cache_folder() / "index" / name / "train.json",
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def seconds(call: Callable[[int], object], num_rounds: int) -> list[float]:
    """Seconds of each call."""
    taken = []
    for number in range(num_rounds):
        before = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - before)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    before_mib = peak_mib()

    def order(epoch: int) -> None:
        _permutation.cache_clear()
        micro_batch_ids(0, epoch * 10, 0, given.images, 3, given.images // 10, 1, 10, True)

    order_s = seconds(order, 3)
    order_mib = peak_mib() - before_mib
    _permutation.cache_clear()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder + "/cache"
        stored(Path(folder) / "data", given.images, given.classes)
        opening_s = seconds(
            lambda _: open_index(Path(folder) / "data", "train", check_files=False), 3
        )
    facts = {"benchmark": "scale", "device": provenance.device_name("cpu"), "num_images": given.images, "num_classes": given.classes,
             "order_s": round(statistics.median(order_s), 3), "order_peak_mib": round(order_mib, 1),
             "opening_s": round(statistics.median(opening_s), 3)}  # fmt: skip
    print(json.dumps(facts, indent=2))
    if not given.dry:
        write("scale", facts)


if __name__ == "__main__":
    main()
