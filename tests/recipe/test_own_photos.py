"""A small folder of the user's own: what does not fit is said at once, with one set= that does."""

import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trainer.base.errors import UserError
from trainer.cli.main import app
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import recipe_paths
from trainer.runs.job import Job, plan_of

NAMES = [path.stem for path in recipe_paths() if load_recipe(path).task is None]
FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """182 photos of 5 classes for training, 45 for validation."""
    root = tmp_path_factory.mktemp("own") / "photos"
    for split, number in (("train", 182), ("val", 45)):
        for i in range(number):
            folder = root / split / FLOWERS[i % 5]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "given",
    ["", "epochs=2", "batch.images=32", "epochs=1 batch.images=50", "epochs=3 smoothing=null"],
)
def test_the_set_that_is_printed_is_accepted_by_every_recipe(photos, given):
    refused = 0
    for name in NAMES:
        try:
            plan_of(Job(name, "resnet18", str(photos), overrides=given))
        except UserError as error:
            refused += 1
            [printed] = re.findall(r'set="([^"]*)"', str(error))
            plan = plan_of(Job(name, "resnet18", str(photos), overrides=printed))
            assert set(given.split()) <= set(printed.split())
            assert not plan.recipe.batch.drop_last or plan.recipe.batch.images <= 182
    assert refused


def test_all_that_is_refused_stands_in_one_line(photos):
    """A batch that has no such norm sample, a warm-up longer than the run, too few images."""
    with pytest.raises(UserError) as caught:
        plan_of(Job("A3", "resnet18", str(photos), overrides="epochs=2"))
    assert "lr.warmup_epochs 5" in str(caught.value) and "182 training images" in str(caught.value)
    assert f"check-data data={photos}" in caught.value.hint  # a profile suits every recipe
    assert caught.value.fix == {
        "lr.warmup_epochs": 1,
        "batch.images": 182,
        "batch.norm_images": 182,
    }


@pytest.mark.parametrize("num_epochs", [1, 2, 3])
def test_a_short_run_on_an_own_profile_is_refused_with_one_remedy(photos, tmp_path, num_epochs):
    """The remedy runs, and leaves steps after the warm-up."""
    path = tmp_path / "photos.yaml"
    adapt = "adapt: {epochs: 100, warmup_epochs: 5, batch_images: 16}"
    lines = ["name: photos", "num_classes: 5", "num_train: 182", "num_val: 45"]
    lines += ["mean: [0.5, 0.5, 0.5]", "std: [0.2, 0.2, 0.2]", adapt]
    path.write_text("\n".join(lines) + "\n")
    words = ["plan", "--recipe", "A3", "--model", "resnet18", "--data", str(path)]
    words += ["--data-dir", str(photos)]

    done = CliRunner().invoke(app, [*words, "--set", f"epochs={num_epochs}"])

    assert done.exit_code == 2 and done.stderr.count("use ") == 1
    [printed] = re.findall(r'set="([^"]*)"', done.stderr)
    plan = plan_of(Job("A3", "resnet18", str(path), photos, overrides=printed))
    assert plan.recipe.epochs == num_epochs and plan.num_warmup_steps < plan.num_steps
