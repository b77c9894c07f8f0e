"""Published scores as data: which recipe made which public weights, and what timm measures."""

import pytest
import timm

from trainer.base.errors import UserError
from trainer.recipe.published import (
    measured_again,
    newest_path,
    published_scores,
    score_of_weights,
    scores_of_model,
)

OWN = [score for score in published_scores() if not score.measured_by]
AGAIN = [score for score in published_scores() if score.measured_by]


def test_what_is_measured_again_are_weights_of_a_recipe_by_timm():
    known = {score.weights: score for score in OWN if score.weights}
    assert len(known) == len([score for score in OWN if score.weights]) > 60
    assert {score.weights for score in AGAIN} == known.keys()
    for score in AGAIN:
        assert (score.recipe, score.model, score.measured_by) == (
            known[score.weights].recipe, known[score.weights].model, "timm",
        )  # fmt: skip
        assert "pytorch-image-models" in score.source and score.test_px


def test_public_weights_are_timms_and_of_their_model():
    for name in {score.weights for score in OWN if score.weights}:
        model, _, tag = name.partition(".")
        assert tag and timm.is_model_pretrained(name), name
        assert model in {score.model for score in OWN if score.weights == name}


def test_timm_measures_about_what_the_sources_state_at_the_same_size():
    """Weights beside the wrong recipe would be off by whole points."""
    known = {score.weights: score for score in OWN if score.weights}
    for score in AGAIN:
        stated = known[score.weights]
        if score.dataset == "imagenet-1k" and score.test_px == stated.test_px:
            assert abs(score.top1_pct - stated.top1_pct) < 0.3, score.weights


def test_one_weights_row_of_timm():
    found = measured_again("resnet50.a1_in1k")
    again = {(score.dataset, score.test_px): score.top1_pct for score in found}
    assert again["imagenet-1k", 224] == 80.382 and again["imagenet-1k", 288] == 81.24
    assert again["imagenet-real", 224] == 85.712 and again["imagenet-v2", 224] == 68.47
    assert again["imagenet-a", 224] == 9.973 and again["imagenet-r", 224] == 40.417
    assert again["imagenet-sketch", 224] == 29.641


@pytest.mark.parametrize(
    ("weights", "recipe"),
    [
        ("resnet50.a1_in1k", "A1.v2"),
        ("timm:resnet50.a3_in1k", "A3.v2"),
        ("resnet50.tv_in1k", "torchvision-v1.v1"),
        ("resnext101_64x4d.tv_in1k", "torchvision-v2.v3"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "swin.v1"),
        ("convnext_tiny.fb_in1k", "convnext.v2"),
        ("levit_128s.fb_dist_in1k", "levit.v1"),
    ],
)
def test_public_weights_name_their_recipe(weights, recipe):
    assert newest_path(score_of_weights(weights).recipe).stem == recipe


@pytest.mark.parametrize(
    ("weights", "near"),
    [
        ("resnet50.c1_in1k", "resnet50.a1_in1k"),
        ("resnet50", "resnet50.a2_in1k"),
        ("resnet50x.a1_in1k", "resnet50.a1_in1k"),
        ("mobilenetv2_100.ra_in1k", ""),
    ],
)
def test_weights_of_no_recipe_are_said_to_be_so(weights, near):
    with pytest.raises(UserError) as refused:
        score_of_weights(weights)
    assert near in str(refused.value)


def test_recipes_of_a_model_are_in_the_order_of_their_scores():
    scores = scores_of_model("resnet50.a1_in1k")
    assert [score.top1_pct for score in scores] == sorted(
        (score.top1_pct for score in scores), reverse=True
    )
    assert {"A1", "A2", "A3", "torchvision-v2", "ffcv-rn50-88"} <= {one.recipe for one in scores}
    hours = {one.recipe: one.gpu_hours for one in scores}
    assert (hours["A1"], hours["A3"], hours["gn-ws"]) == (440, 60, None)


def test_a_model_without_scores_is_refused_with_the_nearest():
    with pytest.raises(UserError) as refused:
        scores_of_model("resnet51")
    assert "resnet50" in str(refused.value)
