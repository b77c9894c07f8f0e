"""`data` and `parity` on the command line: what a user sees of ffcv."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.built import needs_ffcv

needs_ffcv()

from trainer.cli.main import app
from trainer.data.ffcv import stream as ffcv_stream

SET = "batch.images=8 batch.norm_images=4 image.train_px=32 image.test_px=32"


def rsb(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def photos(tmp_path):
    """An image folder of smooth JPEGs, as photos are: 16 + 8 of two classes."""
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for split, num_images in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(num_images):
                small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                small.resize(
                    tuple(rng.integers(40, 90, 2).tolist()), Image.Resampling.BICUBIC
                ).save(root / split / name / f"{i}.jpg")
    return root


def parity(photos, folder, results, *more):
    done = rsb(
        "parity",
        "--data",
        photos,
        "--data-dir",
        folder,
        "--set",
        SET,
        "--images",
        20,
        "--results",
        results,
        *more,
    )
    found = (
        [json.loads(path.read_text()) for path in (results / "parity").glob("*.json")]
        if results.exists()
        else []
    )
    return done, found[0] if found else None


def test_parity_on_whole_and_on_shrunk_images(photos, tmp_path):
    assert rsb("data", "--data", photos, "--out", tmp_path / "whole").exit_code == 0
    done, whole = parity(photos, tmp_path / "whole", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert (
        whole["allowed"]["train_levels"] == 0
        and whole["found"]["train_levels"] == whole["found"]["val_levels"] == 0
    )
    assert (
        whole["found"]["train_images"] >= 20
        and whole["found"]["val_images"] == 8
        and whole["source"] == whole["beton"]
    )
    # the default torch loader decodes otherwise: close, and not the same; another filter is further
    # away
    assert (
        0 < whole["found"]["torch_levels"] < whole["found"]["inter_area_levels"]
        and whole["allowed"]["torch_levels"] == 3.0
    )
    assert (
        "INTER_AREA" in whole["resize"]
        and "INTER_AREA" in done.output
        and "antialiased bicubic" in done.output
    )
    assert f"data_fingerprint {whole['beton'][:12]}" in done.output
    assert (
        rsb(
            "data",
            "--data",
            photos,
            "--out",
            tmp_path / "small",
            "--max-side",
            48,
            "--jpeg-share",
            0.5,
        ).exit_code
        == 0
    )
    done, small = parity(photos, tmp_path / "small", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert (
        0 < small["found"]["train_levels"] < small["allowed"]["train_levels"]
        and small["source"] != small["beton"]
    )
    assert 0 < small["found"]["edge_px"] <= 0.5
    assert (
        0
        < small["found"]["torch_levels"]
        <= small["allowed"]["torch_levels"]
        == small["allowed"]["train_levels"] + 3.0
    )


def test_parity_fails_where_one_box_or_one_flip_is_another(photos, tmp_path, monkeypatch):
    assert rsb("data", "--data", photos, "--out", tmp_path / "whole").exit_code == 0

    def rows(self, ids, shown, side, real=ffcv_stream.FfcvStream.rows):
        made = real(self, ids, shown, side)
        made[0, -2] ^= 1  # flipped
        return made

    monkeypatch.setattr(ffcv_stream.FfcvStream, "rows", rows)
    done, found = parity(photos, tmp_path / "whole", tmp_path / "a")
    assert done.exit_code == 1 and not found["is_within"] and "NOT within" in done.output


def test_parity_and_data_say_what_is_missing(photos, tmp_path):
    done, _ = parity(photos, tmp_path, tmp_path / "a")
    assert done.exit_code == 2 and "holds no train.beton and val.beton" in done.output
    done = rsb("data", "--data", "digits")
    assert done.exit_code == 2 and "out=<folder>" in done.output
    rsb("data", "--data", photos, "--out", tmp_path / "whole")
    shutil.copy(photos / "val" / "cat" / "0.jpg", photos / "train" / "dog" / "9.jpg")
    done, _ = parity(photos, tmp_path / "whole", tmp_path / "a")
    assert done.exit_code == 2 and "train" in done.output
