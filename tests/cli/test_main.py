"""The command line: options reach the program as text, and an error is one line and exit 2."""

import io
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from support.commands import ROOT, make, program, rsb
from trainer.base.settings import make_settings, num_cores
from trainer.runs import summary
from trainer.runs.job import Job, plan_of


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["plan", "--recipe", "A9"], "recipe=A9", "A1.v1"),
        (["plan", "--model", "resnet5O"], "model=resnet5O", "resnet50"),
        (["plan", "--data", "digit"], "data=digit", "digits"),
        (["plan", "--set", "epoch=5"], "epoch", "epochs"),
        (["plan", "--set", "loss.name=bcee"], "bcee", "bce"),
        (["plan", "--set", "lr.peak=no"], "lr.peak=no", "false"),
        (["plan", "--seed", "-1"], "seed=-1", "seed=0"),
        (["train", "--device", "tpu"], "device=tpu", "cuda"),
        (["train", "--precision", "bf61"], "precision=bf61", "bf16"),
        (["train", "--precision", "fp16", "--device", "cpu"], "fp16", "float32"),
        (["train", "--workers", "many"], "workers=many", "auto"),
        (["train", "--loader", "dali"], "loader=dali", "torch"),
        (["train", "--bad-images", "ignore"], "bad_images=ignore", "skip"),
        (["train", "--set", "batch.images=96000"], "batch.images", "; "),
        (["eval", "--run", "no-such-run"], "no-such-run", "run"),
        (["diff", "--a", "A1", "--b", "A"], "recipe=A", "A1"),
        (["diff", "--a", "A1"], "b= not given", "a=A1 b=A3"),
        (["plan", "--set", "drop_path=off"], "off is written null", "drop_path=null"),
        (["plan", "--set", "drop_path=0"], "drop_path is 0", "drop_path=null"),
        (["matrix", "--models", "resnet5O"], "models=resnet5O", "resnet50"),
        (["matrix", "--recipes", "A9"], "recipe=A9", "A1.v1"),
        (["check-data", "--workers", "many"], "workers=many", "auto"),
        (["check-data", "--data", "/no/such/folder"], "/no/such/folder", "; "),
    ],
)
def test_an_error_is_one_line_with_the_value_and_a_remedy(words, found, remedy):
    done = rsb(*words)
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert found in lines[0] and remedy in lines[0]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train", "--seed", "abc"], "--seed"),
        (["train", "--checkpoint-s", "-1"], "checkpoint"),
        (["train", "--sed", "1"], "--sed"),
        (["eval"], "--run"),
        (["trian"], "'trian'"),
        (["plan", "--recipe", "A1", "--data", "digit"], "data=digit"),
    ],
)
def test_options_that_cannot_be_parsed_are_one_line_too(words, found):
    done = program(*words)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and found in line and "; " in line


def test_the_program_ends_with_its_commands_exit_code(tmp_path):
    assert program("train", "--help").returncode == 0
    for label in "ab":
        image = tmp_path / "train" / label / "1.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"no image")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    done = program("check-data", "--data", tmp_path)
    assert done.returncode == 1 and "not sound" in done.stdout, done.stderr


def test_without_a_command_the_help_is_shown_and_no_error_line():
    done = program()
    assert "check-data" in done.stdout + done.stderr and "error:" not in done.stderr


@pytest.mark.parametrize("which", ["runs", "results"])
def test_a_folder_that_cannot_be_written_is_found_before_the_training(tmp_path, which):
    (tmp_path / which).touch()
    done = rsb(
        "train", "--device", "cpu", "--runs", tmp_path / "runs", "--results", tmp_path / "results"
    )
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {which}: cannot write into {tmp_path / which}") and "; " in line
    assert which == "runs" or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(("workers", "num_threads"), [("3", 3), ("0", 1), ("auto", num_cores())])
def test_check_data_uses_the_given_number_of_threads(monkeypatch, workers, num_threads):
    taken = []
    monkeypatch.setattr(
        "trainer.runs.summary.data_reports",
        lambda out, data, check, number: taken.append(number) or True,
    )
    assert rsb("check-data", "--workers", workers).exit_code == 0
    assert taken == [num_threads]


def test_control_characters_of_a_name_are_escaped():
    done = rsb("plan", "--recipe", "A1\x1b[2J")
    assert done.exit_code == 2 and "\x1b" not in done.stderr and "\\x1b" in done.stderr


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
    assert "lr.peak stays 0.005: the recipe has no rule" in small.output
    ruled = rsb(
        "plan", "--recipe", "torchvision-v1", "--set", "batch.images=256 batch.norm_images=64"
    )
    assert (
        "linear rule would make it" in ruled.output
    )  # the rate is not scaled behind the reader's back


def test_explain_names_the_origin_of_every_value():
    done = rsb("explain", "--recipe", "A3", "--data", "digits", "--set", "lr.peak=3e-3")
    assert done.exit_code == 0
    for path, origin in (
        ("optimizer.weight_decay", "page"),
        ("optimizer.eps", "assumed"),
        ("image.train_px", "profile"),
        ("lr.peak", "override"),
    ):
        (line,) = [line for line in done.output.splitlines() if f" {path} " in line]
        assert origin in line, line


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


def test_diff_shows_the_values_that_differ():
    done = rsb("diff", "--a", "A1", "--b", "A2")
    shown = {
        line.split("│")[1].strip() for line in done.output.splitlines() if line.count("│") >= 4
    }
    assert {
        "epochs",
        "smoothing",
        "loss.threshold",
        "optimizer.weight_decay",
        "mix.mixup_alpha",
    } <= shown
    assert "lr.peak" not in shown  # the same in both


def test_the_recipes_are_listed():
    done = rsb("recipes")
    assert done.exit_code == 0
    assert {
        "A1.v1",
        "A2.v1",
        "A3.v1",
        "convnext.v2",
        "torchvision-v1.v1",
        "torchvision-v2.v1",
    } <= set(done.output.split())


@pytest.mark.parametrize(
    "value",
    [
        "epochs=5 loss.name=ce",
        "a'b",
        'a"b',
        "a;touch pwned",
        "$(shell touch pwned)",
        "$(touch pwned)",
        "`touch pwned`",
        "${HOME}",
        "a\\b",
        "*",
        "a&b|c>d",
        "#x",
        "--help",
        "ü ✓",
    ],
)
def test_make_passes_any_value_as_text(door, value):
    done = make(door, f"set={value}", "recipe=A1")
    assert done.returncode == 0, done.stderr
    words = [eval(line) for line in done.stdout.splitlines()]
    assert words[:3] == ["-m", "trainer", "train"]
    assert dict(zip(words[3::2], words[4::2], strict=True)) == {"--recipe": "A1", "--set": value}
    assert not (door / "pwned").exists()


def test_make_refuses_a_variable_that_it_does_not_know(door):
    done = make(door, "recpie=A1")
    assert done.returncode == 2 and "recpie=: no such variable; did you mean recipe?" in done.stderr


@pytest.mark.parametrize("name", ["nearest", "first"])
def test_make_takes_no_internal_variable_from_the_command_line(door, name):
    done = make(door, f"{name}=import os; os.mkdir('pwned')")
    assert done.returncode == 2 and f"{name}=: no such variable; there are recipe" in done.stderr
    assert not (door / "pwned").exists()


@pytest.mark.parametrize(
    ("target", "remedy"),
    [("exlpain", "did you mean explain?"), ("qqq;touch pwned", "there are train plan")],
)
def test_make_refuses_a_target_that_it_does_not_have_with_the_nearest(door, target, remedy):
    done = make(door, target)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"{target}: no such target; {remedy}" in line
    assert not (door / "pwned").exists()


def test_make_does_not_take_the_environment_for_variables(door):
    done = make(door, model="oops")
    assert done.returncode == 0 and "'train'" in done.stdout and "oops" not in done.stdout


@pytest.mark.parametrize(("again", "is_passed"), [("1", True), ("0", False)])
def test_again_is_a_switch(door, again, is_passed):
    assert ("'--again'" in make(door, f"again={again}").stdout) is is_passed


def test_make_help_lists_every_target_and_variable(door):
    text = (ROOT / "Makefile").read_text()
    done = make(door, "help")
    listed = done.stdout.split()
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    variables = next(
        line for line in text.splitlines() if line.startswith("TRAIN_VARIABLES :=")
    ).split()[2:]
    assert set(phony) | set(variables) | {"a,b", "run", "models,recipes", "pytest"} <= set(listed)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--sed", "1"],
        ["trian"],
        ["plan", "--seed", "x"],
        ["ablate", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_mistyped_options_answer_before_anything_heavy_is_imported(words):
    script = (
        "import runpy, sys\n"
        "try: runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        # not pydantic: Typer itself may import it to parse options
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout + done.stderr


def test_a_run_says_what_the_recipes_rule_would_make_of_the_rate():
    plan = plan_of(Job(recipe="nvidia-v15-90", model="test_resnet", overrides="batch.images=128"))
    out = Console(file=io.StringIO(), width=160)
    summary.plan_in_brief(out, plan, make_settings("cpu", workers="0"))
    assert f'set="lr.peak={4 * plan.recipe.lr.peak:g}"' in out.file.getvalue()
