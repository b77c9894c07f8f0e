"""The command line: options reach the program as text, and an error is one line and exit 2."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import typer
from PIL import Image
from rich.console import Console

from support.commands import ROOT, program, rsb
from trainer.base.errors import UserError
from trainer.base.settings import make_settings, num_cores
from trainer.cli.main import app, run_program
from trainer.cli.words import options_of
from trainer.data.check import DataReport
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
        (["plan", "--set", "train_px=64"], "'train_px' is no key", "use image.train_px"),
        (["plan", "--set", "magnitude=3"], "'magnitude'", "augment.rand_augment.magnitude"),
        (["plan", "--set", "image.peak=1"], "'peak'", "use lr.peak"),
        (["plan", "--set", "lr.peek=1"], "'peek'", "did you mean peak"),
        (["plan", "--recipe", "finetune"], "recipe=finetune", "finetune-adamw or finetune-sgd"),
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
        (["train", "--seed", "abc"], "seed="),
        (["train", "--checkpoint-s", "-1"], "checkpoint"),
        (["train", "--sed", "1"], "sed="),
        (["verify"], "run="),
        (["trian"], "'trian'"),
        (["plan", "--recipe", "A1", "--data", "digit"], "data=digit"),
    ],
)
def test_options_that_cannot_be_parsed_are_one_line_too(words, found):
    done = program(*words)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and found in line and "; " in line


def test_under_make_an_error_of_the_parser_is_about_words(monkeypatch, capsys):
    monkeypatch.setenv("RSB_CALLED_AS", "make")
    monkeypatch.setattr(sys, "argv", ["rsb", "train", "--seed", "abc"])
    assert run_program() == 2
    line = capsys.readouterr().err
    assert "seed=" in line and "make help of=train" in line and "--" not in line


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
    assert line.startswith(f"error: {which}={tmp_path / which}") and "; " in line
    assert which == "runs" or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(("workers", "num_threads"), [("3", 3), ("0", 1), ("auto", num_cores())])
def test_check_data_uses_the_given_number_of_threads(monkeypatch, workers, num_threads):
    taken = []
    monkeypatch.setattr(
        "trainer.cli.data_commands.check_images",
        lambda images, number: taken.append(number) or DataReport(1, (), {}, {"0": 1}),
    )
    assert rsb("check-data", "--workers", workers).exit_code == 0
    assert taken == [num_threads] * 2


def test_a_terminal_of_ascii_gets_other_characters_written_out(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = program("plan", "--recipe", "A3", "--model", "test_resnet")
    assert done.returncode == 0 and not done.stderr and "\\u2581" in done.stdout  # the sparkline


def test_control_characters_of_a_name_are_escaped():
    done = rsb("plan", "--recipe", "A1\x1b[2J")
    assert done.exit_code == 2 and "\x1b" not in done.stderr and "\\x1b" in done.stderr


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
        "A1.v2",
        "A2.v2",
        "A3.v2",
        "convnext.v2",
        "torchvision-v1.v1",
        "torchvision-v2.v3",
    } <= set(done.output.split())


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["recpie=A1"], "recpie=", "recipe="),
        (["train", "epochs=3"], "epochs=", 'set="epochs=3"'),
        (["lr=0.1"], "lr=", 'set="lr.peak=0.1"'),
        (["train", "batch_size=64"], "batch_size=", 'set="batch.images=64"'),
        (["train", "freeze=1"], "freeze=", 'set="model.freeze={all_but: [head]}"'),
        (["train", "resume=1"], "resume=", "command that was stopped"),
        (["train", "nodes=4"], "nodes=", "launch-slurm"),
        (["lr-find", "seed=3"], "seed=", "train"),
        (["ablate", "seeds=5"], "seeds=", "lr-find"),
        (["eval", "loader=pil"], "loader=", "train"),
        (["recipes", "seed=0"], "seed=", "train"),
        (["train", "ablation=x"], "ablation=", "table"),
        (["train", "again=maybe"], "again=maybe", "again=1"),
        (["train", "seed=1", "seed=2"], "seed=", "twice"),
    ],
)
def test_a_word_that_a_command_does_not_take_says_what_to_write(words, found, remedy):
    done = program(*words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and found in line and remedy in line


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("nproc_per_node=4", "gpus=4, or procs=4"),
        ("nproc-per-node=4", "gpus=4, or procs=4"),
        ("numa_binding=node", "numa=node"),
        ("nnodes=2", "launch-slurm nodes=2, or on each machine torchrun --nnodes=2"),
        ("node_rank=1", "torchrun --node-rank=1"),
        ("master_addr=node7", "torchrun --master-addr=node7"),
        ("master_port=29500", "torchrun --master-port=29500"),
        ("rdzv_endpoint=node7:29500", "torchrun --rdzv-endpoint=node7:29500"),
        ("rdzv_backend=c10d", "torchrun --rdzv-backend=c10d"),
        ("standalone=1", "gpus="),
        ("max_restarts=3", "the same command resumes"),
    ],
)
def test_the_words_of_torchrun_are_answered_with_the_right_one(word, right):
    for command in ("train", "lr-find"):
        with pytest.raises(UserError) as refused:
            options_of([command, word], typer.main.get_command(app))
        assert right in str(refused.value)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train", "--numa", "nodes"], "valid: off, node, socket, exclusive, core-complex"),
        (["train", "--numa", "node"], "gpus=2 or more"),
        (["train", "--numa", "node", "--procs", "2"], "numactl"),
        (["lr-find", "--numa", "node", "--procs", "2"], "numactl"),
        (["launch-slurm", "--gpus", "4", "--numa", "node"], "--gpu-bind=single:1"),
    ],
)
def test_a_binding_that_nobody_could_make_is_one_line(words, remedy, tmp_path):
    done = rsb(*words, "--runs", tmp_path)
    assert done.exit_code == 2 and f"numa={words[words.index('--numa') + 1]}" in done.stderr
    assert remedy in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_words_are_options_and_a_value_may_hold_an_equals_sign():
    group = typer.main.get_command(app)
    assert options_of(["recipe=A1", "data_dir=a=b", "set=epochs=5"], group) == [
        "train", "--recipe", "A1", "--data-dir", "a=b", "--set", "epochs=5"
    ]  # fmt: skip
    assert options_of(["train", "--set", "epochs=5", "again=1"], group) == [
        "train", "--set", "epochs=5", "--again"
    ]  # fmt: skip
    assert options_of(["reproduce", "row=x", "anyway=0"], group)[-1] == "--no-anyway"
    assert options_of(["launch-slurm", "nodes=2", "seed=3"], group)[-1] == "3"


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
    env = os.environ | {"RSB_CALLED_AS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["train", "plan", "lr-find", "launch-slurm", "compare"])
def test_make_help_of_a_command_has_the_words_that_make_takes_within_80_columns(
    monkeypatch, capsys, command
):
    monkeypatch.setenv("RSB_CALLED_AS", "make")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["rsb", command, "--help"])
    assert run_program() == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert not re.search(r"--[a-z-]+(?!=)\b(?!=)", text)
    group = typer.main.get_command(app)
    found = re.findall(r"^  (\w+)=(1?) ", text, re.M)
    options = [one for one in group.commands[command].params if not one.hidden]
    assert len(found) == len(options)
    for word, value in found:  # each is taken as it stands
        assert len(options_of([command, f"{word}={value}"], group)) > 1


# Options, and commands with them, whose values are quoted where they are wrong.
GIVEN = [
    *(("train", f"--{name}") for name in (
        "recipe", "model", "data", "data-dir", "set", "seed", "device", "precision", "workers",
        "loader", "bad-images", "inject", "micro-batch", "plugins", "runs", "results", "gpus",
    )),
    ("train", "word"), ("plan", "--set=epochs"), ("plan", "--set=loss.name"), ("eval", "--run"),
    ("ablate", "--ablation"), ("table", "--ablation"), ("reproduce", "--row"), ("lr-find", "--ramp"),
    ("diff", "--b=A1 --a"),
]  # fmt: skip


@pytest.mark.parametrize("text", ["x" * 10_000, "x y" * 3_000], ids=["word", "words"])
@pytest.mark.parametrize("given", GIVEN, ids=" ".join)
def test_an_error_quotes_at_most_200_characters_of_what_was_given(
    monkeypatch, tmp_path, capsys, given, text
):
    monkeypatch.chdir(tmp_path)
    command, option = given
    *others, option = option.split(" ")
    monkeypatch.setattr(sys, "argv", ["rsb", command, *others, f"{option}={text}"])
    with pytest.raises(SystemExit) as ended:
        sys.exit(run_program())
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert max(map(len, re.findall(r"[xy ]+", line))) <= 200, line


def test_a_run_says_what_the_recipes_rule_would_make_of_the_rate():
    plan = plan_of(Job(recipe="nvidia-v15-90", model="test_resnet", overrides="batch.images=128"))
    out = Console(file=io.StringIO(), width=400)
    summary.plan_in_brief(out, plan, make_settings("cpu", workers="0"))
    assert f'set="lr.peak={4 * plan.recipe.lr.peak:g} ' in out.file.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=/no/such/folder"],
        ["plan", "recipe=A9"],
        ["lr-find", "data=digit"],
        ["plan", "set=lr.peak="],
        ["train", "set=lr.peak={name: x"],
        ["plan", "recipe=tests/support/no.yaml"],
        ["plan", "set=train_px=64"],
        ["train", "set=batch_size=64"],
        ["lr-find", "set=lr.schedule.ends=0"],
        ["recipes"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_a_name_that_does_not_exist_is_refused_before_torch_is_imported(words):
    assert not heavy_after(words)


def test_a_folder_without_splits_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "photos" / "dog").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "dog" / "a.png")
    assert not heavy_after(["train", f"data={tmp_path / 'photos'}"])


def heavy_after(words: list[str]) -> list[str]:
    """Which of torch and timm are imported once the program has refused these words."""
    script = (
        "import runpy, sys\n"
        "try: runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('imported', *{'torch', 'timm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    first, *found = done.stdout.splitlines()[-1].split()
    assert first == "imported", done.stderr
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--set", "epochs=3", "--set", "repeats=2"],
        ["plan", "--set=epochs=3", "--set=repeats=2"],
        ["train", "set=epochs=3", "--set", "repeats=2"],
        ["plan", "--recipe", "A1", "recipe=A2"],
        ["train", "--data-dir", "a", "--data_dir", "b"],
        ["train", "--again", "--no-again"],
        ["launch-slurm", "--nodes", "2", "--set", "epochs=3", "--set", "repeats=2"],
    ],
    ids=" ".join,
)
def test_an_option_given_twice_is_refused(words):
    with pytest.raises(UserError, match="is given twice"):
        options_of(words, typer.main.get_command(app))


@pytest.mark.parametrize("words", [["--set", "mix=null --set"], ["--set", "set=1", "--seed", "1"]])
def test_a_value_that_looks_like_an_option_is_none(words):
    assert options_of(["plan", *words], typer.main.get_command(app)) == ["plan", *words]


def test_a_job_file_names_the_device_once(tmp_path):
    for words in (["--device", "cpu"], ["--device=cpu"], []):
        job = tmp_path / "job.sh"
        done = rsb("launch-slurm", "--gpus", "0", *words, "--job", job)
        assert done.exit_code == 0, done.stderr
        assert job.read_text().count("--device") == 1


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("lr=0.01", 'set="lr.peak='),
        ("batch_size=64", 'set="batch.images='),
        ("pretrained=true", "weights="),
        ("warmup_epochs=3", "lr.warmup_epochs"),
    ],
)
def test_other_programs_words_in_set_are_answered_with_the_right_one(given, right):
    done = rsb("plan", "--recipe", "A3", "--model", "resnet18", "--set", given)
    assert done.exit_code == 2 and f"use {right}" in done.output
