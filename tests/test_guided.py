"""The readers of somebody else's bytes, with inputs that atheris leads into lines not yet reached."""

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support import packing
from support.fuzz_targets import image_file
from trainer.recipe.shipped import recipe_paths

HERE = Path(__file__).parent
NUM_IN_DRILL = 5_000
FIRST = {
    "images": lambda: [
        image_file("JPEG", "RGB"),
        image_file("JPEG", "CMYK"),
        image_file("PNG", "RGBA"),
        image_file("GIF", "P"),
        image_file("TIFF", "RGB"),
        image_file("PPM", "RGB"),
    ],
    "tars": lambda: [_shard()],
    "yamls": lambda: [path.read_bytes()[:1000] for path in recipe_paths()[:5]],
}


def _shard() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in {
            "a/0.jpg": image_file("JPEG", "RGB"),
            "a/0.cls": b"1",
            "a/1.png": image_file("PNG", "RGB"),
            "a/1.json": b'{"label": 0}',
        }.items():
            packing.add(tar, name, content)
    return held.getvalue()


@pytest.fixture(autouse=True)
def _atheris():
    if importlib.util.find_spec("atheris") is None:
        sentence = (
            "no atheris here: it comes with the extra test on Linux on x86-64, Python 3.11 to 3.13"
        )
        (
            pytest.fail(sentence, pytrace=False)
            if os.environ.get("RSB_CI") == "1"
            else pytest.skip(sentence)
        )


def guided(reader: str, number: int, folder: Path) -> None:
    first = folder / "first"
    first.mkdir()
    for place, content in enumerate(FIRST[reader]()):
        (first / str(place)).write_bytes(content)
    words = [
        sys.executable,
        str(HERE / "support" / "guided.py"),
        reader,
        f"-atheris_runs={number}",
        "-seed=1",
        # the largest image that PIL admits, 179 megapixels, takes 1.5 GB beside the program's own
        "-rss_limit_mb=3072",
        str(first),
    ]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"Done {number} in" in done.stderr, done.stderr[-3000:]
    assert " cov: " in done.stderr and len(list(first.iterdir())) > len(FIRST[reader]()), (
        "nothing new was reached"
    )


@pytest.mark.parametrize("reader", ["images", "tars"])
def test_some_guided_inputs(reader, tmp_path):
    guided(reader, 300, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize("reader", FIRST)
def test_many_guided_inputs(reader, tmp_path):
    guided(reader, NUM_IN_DRILL, tmp_path)
