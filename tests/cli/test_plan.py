"""What plan and explain show."""

import hashlib
import re

import pytest
import timm
import torch

from support.commands import rsb
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe


def test_the_plan_has_steps_images_rates_batch_and_deviations():
    done = rsb("plan", "--recipe", "A1", "--data", "imagenet-1k")
    assert done.exit_code == 0
    for fact in (
        "375,000 = 600 epochs x 625",
        "768,000,000",
        "426,667 of 1,281,167",
        "4 micro-batches x 512",
    ):
        assert fact in done.output, fact
    assert (
        "4.999e-03" in done.output
    )  # epoch 5: 1e-6 + (5e-3 - 1e-6) / 2 * (1 + cos(pi * 5 / 600)), already below the peak
    assert "deviations  none" in done.output and "whole run is warm-up" not in done.output
    assert "whole run is warm-up" in rsb("plan", "--recipe", "A1", "--set", "epochs=1").output
    small = rsb("plan", "--recipe", "A1", "--set", "batch.images=128 batch.norm_images=64")
    assert "deviation  epochs: 600 ->" in small.output and "2 micro-batches x 64" in small.output
    assert "lr.peak stays 0.005, which is for 2,048 images a step, here 128" in small.output
    ruled = rsb(
        "plan", "--recipe", "torchvision-v1", "--set", "batch.images=256 batch.norm_images=64"
    )
    assert (
        "linear rule would make it" in ruled.output
    )  # the rate is not scaled behind the reader's back


@pytest.mark.parametrize(("model", "family"), [("test_resnet", ""), ("test_byobnet", "byobnet")])
def test_the_plan_says_of_a_family_that_it_is_untested(model, family):
    done = rsb("plan", "--recipe", "A3", "--model", model)
    lines = [line for line in done.output.splitlines() if "untested" in line]
    assert done.exit_code == 0 and len(lines) == bool(family)
    assert all(family in line for line in lines)


def test_the_plan_estimates_time_memory_and_cores_for_gpus_that_are_not_here(tmp_path):
    words = ("plan", "--recipe", "A1", "--data", "imagenet-1k", "--results", tmp_path)
    text = " ".join(rsb(*words, "--gpus", "8").output.split())
    assert "8 GPUs, bf16" in text and "at least" in text and "A100" in text  # no row: published
    assert "activations of 256 images" in text and "5 a GPU, 40 in all" in text
    half = float(re.search(r"activations of 256 images at once ([\d.]+)", text)[1])
    text = " ".join(rsb(*words, "--gpus", "8", "--precision", "float32").output.split())
    whole = float(re.search(r"activations of 256 images at once ([\d.]+)", text)[1])
    assert 1.8 < whole / half < 2.0 and "gpu=1" in text  # nothing is known of its speed
    wrong = rsb(*words, "--gpus", "8", "--precision", "bf17")
    assert wrong.exit_code == 2 and "bf16" in wrong.stderr


def test_the_plan_of_images_in_memory_wants_no_cores_and_has_the_majority_class(tmp_path):
    words = ("plan", "--recipe", "A3", "--model", "test_resnet", "--results", tmp_path)
    text = " ".join(rsb(*words).output.split())
    assert "this machine's CPU" in text and "majority class: top-1 10.0 %" in text
    assert "bench recipe=A3 model=test_resnet data=digits" in text
    assert " cores " not in rsb(*words, "--gpus", "1").output


def test_explain_names_the_origin_of_every_value():
    done = rsb("explain", "--recipe", "A3", "--data", "digits", "--set", "lr.peak=3e-3")
    assert done.exit_code == 0
    for path, origin in (
        ("optimizer.weight_decay", "recipe"),
        ("optimizer.eps", "assumed"),
        ("image.train_px", "profile"),
        ("lr.peak", "override"),
    ):
        (line,) = [line for line in done.output.splitlines() if f" {path} " in line]
        assert origin in line, line
    left_open = [line for line in done.output.splitlines() if line.startswith("not confirmed: ")]
    assert len(left_open) == len(load_recipe(find_recipe("A3")).unconfirmed)


GROUP_NORM = "model.norm={name: group_norm, groups: 32, eps: 1e-5}"


@pytest.mark.parametrize("command", ["explain", "plan"])
def test_replaced_modules_are_shown(command):
    done = rsb(command, "--recipe", "A2", "--model", "resnet18", "--set", GROUP_NORM)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("replaced ")]
    assert "norm: bn1, layer1.0.bn1" in line
    assert "20 BatchNorm2d -> GroupNorm" in line
    assert "replaced " not in rsb(command, "--recipe", "A2", "--model", "resnet18").stdout


@pytest.mark.parametrize("command", ["explain", "plan", "train"])
def test_a_replacement_without_a_match_is_refused_before_any_image_is_read(command, monkeypatch):
    def opened(*_):
        raise AssertionError("images were opened")

    monkeypatch.setattr("trainer.runs.start.open_data", opened)
    done = rsb(
        command,
        "--recipe",
        "A2",
        "--model",
        "convnext_atto",
        "--set",
        "model.convolution={name: self_calibrated, stages: 4, pooling: 4}",
    )
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: model.convolution: ConvNeXt"), line


def test_the_choice_of_auto_is_shown_with_its_reason():
    done = rsb("plan", "--recipe", "A2", "--model", "resnet18", "--set", "model.stem={name: auto}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("auto ")]
    assert "stem" in line and "32 px" in line


def test_the_plan_counts_the_model():
    """25,557,032 weights and 4.089 G multiply-adds: the numbers of resnet50 in timm's and
    torchvision's own tables.
    """
    done = rsb("plan", "--recipe", "A2", "--model", "resnet50", "--data", "imagenet-1k")
    assert "25,557,032 parameters, 4.089 G multiply-adds an image of 224 px" in done.stdout


def test_explain_says_how_off_is_written():
    assert "key=null" in rsb("explain", "--recipe", "A1").stdout


def test_a_plan_for_several_ranks_shares_the_micro_batches_or_says_that_it_cannot():
    done = rsb("plan", "--recipe", "A1", "--data", "imagenet-1k", "--gpus", "4")
    assert "4 ranks x 1 micro-batch x 512 images" in done.output
    done = rsb("plan", "--recipe", "A1", "--data", "imagenet-1k", "--gpus", "8")
    assert "8 ranks x 1 micro-batch x 256 images, 512 shared by 2 ranks" in done.output
    done = rsb("plan", "--recipe", "A1", "--data", "imagenet-1k", "--gpus", "4096")
    assert done.exit_code == 2 and "4096 ranks" in done.stderr


def test_weights_are_recorded_with_their_digest_and_set_comes_after_them(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "resnet18.pth"
    torch.save({"state_dict": timm.create_model("resnet18").state_dict()}, path)
    words = ["plan", "--recipe", "A3", "--model", "resnet18", "--weights", path]
    done = rsb(*words, "--set", "model.pretrained.head=new")
    assert done.exit_code == 0, done.output
    assert hashlib.sha256(path.read_bytes()).hexdigest() in done.output.replace("\n", "")
    assert "model.pretrained.head: kept -> new" in done.output
    path.write_bytes(b"")
    done = rsb(*words)
    assert done.exit_code == 2 and str(path) in done.stderr and done.stderr.count("\n") == 1
