"""`recipes model=` and `which`: which recipe to use, and of which recipe public weights are."""

import pytest
import timm
import torch

from support.commands import rsb
from trainer.cli.recipe_choice import multiply_adds
from trainer.models.build import gmacs
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe


def cells(output):
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def test_recipes_of_a_model_say_score_length_sizes_and_cost():
    done = rsb("recipes", "--model", "resnet18")
    assert done.exit_code == 0
    head, *rows = cells(done.output.replace("┃", "│"))
    shown = {row[0].removesuffix(" *"): dict(zip(head, row, strict=True)) for row in rows if row[0]}
    a1, ffcv = shown["A1.v2"], shown["ffcv-rn18-16.v1"]
    assert (a1["top-1 %"], a1["epochs"], a1["px"]) == ("71.5", "600", "224/224")
    assert (a1["timm"], a1["V2"], a1["GPU hours"]) == ("71.50 at 224", "59.3", "")
    assert (ffcv["GPU hours"], ffcv["timm"], ffcv["px"]) == ("0.58 A100", "", "192/256")
    assert float(ffcv["MACs"]) < float(a1["MACs"]) / 20
    names = list(shown)
    assert names.index("ffcv-rn18-88.v1") < names.index("A1.v2") < names.index("A3.v2")


def test_cost_is_epochs_times_images_times_multiply_adds():
    with torch.device("meta"):
        resnet18 = timm.create_model("resnet18")
    plain = load_recipe(find_recipe("A3"))
    expected = 100 * (1_281_167 // 2048 * 2048) * gmacs(resnet18, 3, 160) * 1e9
    assert multiply_adds(plain, "resnet18", "imagenet-1k") == pytest.approx(expected)


def test_public_weights_name_their_recipe():
    done = rsb("which", "--weights", "resnet50.a1_in1k")
    assert done.exit_code == 0
    for text in ("A1.v2", "80.4 %", "80.382 % at 224 px", "81.24 % at 288 px", "recipe=A1.v2"):
        assert text in done.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["which", "--weights", "resnet50.c1_in1k"], "resnet50.a1_in1k"),
        (["which"], "weights="),
        (["recipes", "--model", "resnet51"], "resnet50"),
    ],
)
def test_what_is_not_known_is_one_line(words, found):
    done = rsb(*words)
    assert done.exit_code == 2 and done.output.strip().count("\n") == 0
    assert found in done.output
