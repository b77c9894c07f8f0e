"""A run that starts from given weights: killed and resumed to the same bits, and its parent named."""

import dataclasses
import hashlib
import json
import re
import signal

import pytest
import safetensors.torch
import timm
import torch
import yaml

import trainer
from support import forked
from support.commands import rsb
from support.endings import ending
from support.plans import small_set
from trainer.base.errors import UserError
from trainer.lr_finder.api import train_command
from trainer.lr_finder.ramp import RATE, Scalar
from trainer.models.trained import given_weights
from trainer.recipe.profiles import PROFILES
from trainer.runs import job
from trainer.runs.job import Job, plan_of


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "test_resnet.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return path


def test_killed_while_it_fine_tunes_it_ends_the_same(tmp_path, weights):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = [f"--weights={weights}"]
    assert forked.end_of([*forked.words(whole), *more])[0] == 0
    for step in (5, 13):
        code, printed = forked.end_of([*forked.words(killed), *more], "step", step)
        assert code == -signal.SIGKILL, printed
    code, printed = forked.end_of([*forked.words(killed), *more])
    assert code == 0 and f"resumed after step 13 of {forked.NUM_STEPS}" in printed, printed
    assert ending(killed) == ending(whole)
    pretrained = ending(whole)["row"]["resolved_recipe"]["model"]["pretrained"]
    assert pretrained["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ending(whole)["row"]["parent"] is None


def test_a_run_trained_on_as_a_new_one_names_its_parent(tmp_path):
    first = forked.words(tmp_path)
    assert forked.end_of(first)[0] == 0
    (row,) = (json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*.json"))
    code, printed = forked.end_of([*first, f"--weights={row['run']}", "--seed=1"])
    assert code == 0, printed
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*")}
    (child,) = (one for name, one in rows.items() if name != row["run"])
    assert (child["parent"], child["parent_sha256"]) == (row["run"], row["weights_sha256"])
    assert child["weights_sha256"] != row["weights_sha256"]


def beside(folder, **facts):
    """Weights of test_resnet with a config.json as timm and a run write it."""
    folder.mkdir()
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    config = {"architecture": "test_resnet", "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_from(word, overrides="", data="digits", model="test_resnet"):
    given = given_weights(str(word), model, word.parent)
    return plan_of(Job("A2", model, data, overrides=small_set(overrides), weights=given))


def test_images_are_normalized_as_the_weights_were_trained(tmp_path):
    """As timm's own fine-tuning does; recorded, and another run than with the data's own."""
    own = beside(tmp_path / "own", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    plan = plan_from(own)
    assert (plan.profile.mean, plan.profile.std) == ((0.5,) * 3, (0.25,) * 3)
    changes = {one.path: one.after for one in plan.deviations}
    assert (changes["image.mean"], changes["image.std"]) == ((0.5,) * 3, (0.25,) * 3)
    of_data = plan_from(own, "image.mean=null image.std=null")
    assert of_data.profile == PROFILES["digits"]
    assert not {"image.mean", "image.std"} & {one.path for one in of_data.deviations}
    assert plan.identity.key != of_data.identity.key
    given = plan_from(own, "'image.mean=[0.1, 0.2, 0.3]' 'image.std=[1.0, 1.0, 1.0]'")
    assert given.profile.mean == (0.1, 0.2, 0.3)


def test_a_file_alone_is_normalized_as_timm_says_of_its_model(weights):
    assert plan_from(weights).profile.mean == timm.get_pretrained_cfg("test_resnet").mean
    assert given_weights(str(weights), "resnet18", weights.parent).std == (0.229, 0.224, 0.225)
    model = "tf_efficientnet_lite0"
    assert given_weights(str(weights), model, weights.parent).mean == (0.5, 0.5, 0.5)


def test_nothing_deviates_where_weights_and_data_agree(tmp_path):
    digits = PROFILES["digits"]
    own = beside(tmp_path / "own", mean=list(digits.mean), std=list(digits.std))
    plan = plan_from(own)
    assert plan.recipe.image.mean is None and plan.profile == digits


def test_weights_of_colour_say_nothing_of_grey_images(weights):
    assert plan_from(weights, data="digits-grey").profile == PROFILES["digits-grey"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("'image.mean=[0.5, 0.5]' 'image.std=[0.5, 0.5]'", "2 numbers"),
        ("'image.mean=[0.5, 0.5, 0.5]'", "mean stands without std"),
        ("'image.mean=[0.5]' 'image.std=[0.5, 0.5]'", "one per channel"),
    ],
)
def test_a_mean_that_does_not_fit_is_refused(given, found):
    with pytest.raises(UserError, match=found):
        plan_of(Job("A2", "test_resnet", overrides=small_set(given)))


@pytest.mark.parametrize(("profiles", "with_weights", "without"), [(100, 30, 100), (9, 9, 9)])
def test_a_profile_makes_no_fine_tuning_longer(weights, tmp_path, profiles, with_weights, without):
    own = tmp_path / "own.yaml"
    facts = PROFILES["digits"].model_dump(mode="json", include={"num_classes", "mean", "std"})
    adapt = {"train_px": 32, "test_px": 32, "epochs": profiles, "batch_images": 16}
    sizes = {"num_train": 1437, "num_val": 360}
    own.write_text(yaml.safe_dump({"name": "own", **facts, **sizes, "adapt": adapt}))
    given = given_weights(str(weights), "test_resnet", weights.parent)
    asked = Job("finetune-adamw", "test_resnet", str(own), weights=given)
    assert plan_of(asked).recipe.epochs == with_weights
    assert plan_of(dataclasses.replace(asked, weights=None)).recipe.epochs == without


def test_a_run_says_by_what_its_images_are_normalized(weights):
    words = ["plan", "--recipe", "A2", "--model", "test_resnet", "--set", small_set()]
    note = 'set="image.mean=null image.std=null"'
    assert note in rsb(*words, "--weights", weights).output
    assert note not in rsb(*words).output


def test_what_is_printed_has_no_word_twice(weights):
    """Neither a refusal's set= nor the learning-rate finder's command repeats what weights= says."""
    with pytest.raises(UserError) as refused:
        plan_from(weights, "batch.images=30")
    (printed,) = re.findall(r'set="([^"]*)"', str(refused.value))
    assert "batch.norm_images" in printed and "model.pretrained" not in printed
    given = given_weights(str(weights), "test_resnet", weights.parent)
    asked = Job("A2", "test_resnet", overrides=small_set(), weights=given)
    made = train_command(asked, plan_of(asked).recipe, Scalar(RATE, 5e-3), 1e-3)
    assert f"weights={weights}" in made and "model.pretrained" not in made
    assert "image.mean" not in made
    estimate = rsb("plan", "--recipe", "A2", "--model", "test_resnet", "--weights", weights).output
    assert "sha256:" in estimate  # among the deviations
    assert "model.pretrained.sha256=" not in estimate.replace("\n", "")


def test_from_python_they_are_given_as_on_the_command_line(weights):
    made = trainer.plan("A2", "test_resnet", set=small_set(), weights=weights)
    assert made.recipe.digest == plan_from(weights).recipe.digest


@pytest.mark.parametrize("label", ["file", "sha256"])
def test_other_weights_in_set_are_refused_beside_weights(weights, label):
    with pytest.raises(UserError, match=f"model.pretrained.{label} is set twice"):
        plan_from(weights, f"model.pretrained.{label}=x")


@pytest.mark.parametrize("is_word", [True, False])
def test_a_recipe_that_is_expected_starts_from_the_same_weights(weights, monkeypatch, is_word):
    """Given by weights=, or by set=."""
    given = given_weights(str(weights), "test_resnet", weights.parent)
    start = f"model.pretrained.file={weights} model.pretrained.sha256={given.sha256}"
    asked = Job(
        "A2",
        "test_resnet",
        overrides=small_set("" if is_word else start),
        weights=given if is_word else None,
    )
    seen = []

    def chosen(results, plan, data, expect, is_needed, plan_of_recipe):
        seen.append(plan_of_recipe("A3"))
        return None, ""

    monkeypatch.setattr(job, "expected_curve", chosen)
    job._expected(asked, plan_of(asked), Settings(), None, None)
    assert seen[0].recipe.model.pretrained.sha256 == given.sha256
    assert seen[0].recipe.name == "A3"


class Settings:
    results, expect, stop_if = None, "A3", ""
