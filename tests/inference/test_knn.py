"""Votes of the nearest are a plain loop's, and any run's features are scored by them."""

import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from support.autoencoded import MODEL, write_recipe
from trainer.cli.main import app
from trainer.inference.knn import votes


def test_votes_are_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    known = torch.randn(40, 6, generator=random, dtype=torch.float64)
    asked = torch.randn(7, 6, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 4, (40,), generator=random)
    found = votes(asked, known, labels, 9, 4)
    for row, one in enumerate(asked.tolist()):
        cosines = []
        for other, label in zip(known.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            cosines.append((dot / math.hypot(*one) / math.hypot(*other), label))
        expected = [0.0] * 4
        for cosine, label in sorted(cosines, reverse=True)[:9]:
            expected[label] += math.exp(cosine / 0.07)
        assert found[row].tolist() == pytest.approx(expected, rel=1e-9)


def rsb(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of a masked autoencoder and of a classifier, on the digits: (folder, names)."""
    folder, small = tmp_path_factory.mktemp("runs"), "batch.images=480 batch.norm_images=120"
    where = ("--runs", folder / "runs", "--results", folder / "results", "--device", "cpu")
    for recipe, model in ((write_recipe(folder), MODEL), ("A3", "test_resnet")):
        more = (
            "epochs=1" if model == MODEL else "epochs=1 lr.warmup_epochs=null lr.warmup_from=null"
        )
        words = ("train", "--recipe", recipe, "--model", model, "--data", "digits")
        code, text = rsb(*words, "--set", f"{small} {more}", "--workers", "0", *where)
        assert code == 0, text
    return where, sorted(path.name for path in Path(folder / "runs").iterdir() if path.is_dir())


def test_features_of_any_run_are_scored(runs):
    where, names = runs
    assert len(names) == 2
    for name in names:
        code, text = rsb("eval", "--run", name, "--knn", "20", "--workers", "0", *where)
        assert code == 0, text
        # raw pixels of the digits would do: any features are far above the tenth of guessing
        assert float(re.search(r"top-1 ([\d.]+) %", text)[1]) > 40
        assert "20 nearest of 1,437 training images" in text and "of 360 images" in text


def test_what_cannot_be_is_refused(runs):
    where, names = runs
    for words, said in (
        (("--run", names[0], "--knn", "5000"), "1437 training images"),
        (("--run", names[0], "--knn", "5", "--test-px", "64"), "run= alone"),
        (
            (
                "--knn",
                "5",
            ),
            "run= alone",
        ),
    ):
        code, text = rsb("eval", *words, *where)
        assert code == 2 and said in text, text
