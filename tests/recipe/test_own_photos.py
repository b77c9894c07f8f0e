"""A small folder of the user's own: what does not fit is said at once, with one set= that does."""

import re

import numpy as np
import pytest
from PIL import Image

from trainer.base.errors import UserError
from trainer.recipe.shipped import recipe_paths
from trainer.runs.job import Job, plan_of

NAMES = [path.stem for path in recipe_paths()]
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
    assert caught.value.fix == {
        "lr.warmup_epochs": 2,
        "batch.images": 182,
        "batch.norm_images": 182,
    }
