"""make passes on what is written, and refuses what it does not know."""

import os
import re
import shutil

import pytest
import typer

from support.commands import ROOT, make
from trainer.cli.main import app
from trainer.cli.words import help_text


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
    assert sorted(words[3:]) == ["recipe=A1", f"set={value}"]
    assert not (door / "pwned").exists()


@pytest.mark.parametrize("name", ["RSB", "given", "written", "COMMANDS", "SHELL"])
def test_a_variable_of_the_makefile_itself_is_passed_on_as_any_other(door, name):
    done = make(door, f"{name}=import os; os.mkdir('pwned')")
    words = [eval(line) for line in done.stdout.splitlines()]
    assert words[:3] == ["-m", "trainer", "train"] and words[3].startswith(f"{name}=")
    assert not (door / "pwned").exists()


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("exlpain", "explain"),
        ("tests", "test"),
        ("results", "table"),
        ("status", "runs"),
        ("fit", "train"),
        ("qqq;touch pwned", "valid: train plan"),
    ],
)
def test_make_refuses_a_target_that_it_does_not_have_with_the_right_one(door, target, remedy):
    done = make(door, target)
    line = done.stderr.splitlines()[0]
    assert done.returncode == 2 and f"{target}: no such target; " in line and remedy in line
    assert not (door / "pwned").exists()


def test_make_lists_runs_beside_a_folder_of_that_name(door):
    (door / "runs").mkdir()
    done = make(door, "runs", "json=1")
    assert done.stdout.splitlines()[2:] == ["'runs'", "'json=1'"], done.stderr


@pytest.mark.parametrize("has_ready", [True, False])
def test_an_environment_that_is_a_link_is_used_and_not_rebuilt(door, tmp_path, has_ready):
    here = tmp_path / "checkout"
    shutil.copytree(door, here)
    (here / ".venv").rename(tmp_path / "shared")
    (here / ".venv").symlink_to(tmp_path / "shared")
    ready = tmp_path / "shared" / ".ready"
    if has_ready:
        os.utime(ready, (1e9, 1e9))  # older than the lock
    else:
        ready.unlink()
    before = sorted(tmp_path.glob("shared/**/*"))
    for words in (["seed=1"], ["setup"]):
        done = make(here, *words, "PYTHON=false")
        assert done.returncode == 0, done.stderr
    assert "creating" not in done.stderr and sorted(tmp_path.glob("shared/**/*")) == before
    (tmp_path / "shared").rename(tmp_path / "gone")
    done = make(here, "seed=1")
    assert done.returncode == 2 and ".venv is a link" in done.stderr.splitlines()[0]


def test_make_does_not_take_the_environment_for_variables(door):
    done = make(door, model="oops")
    assert done.returncode == 0 and "'train'" in done.stdout and "oops" not in done.stdout


@pytest.mark.parametrize("target", ["lint", "clean", "setup", "test", "help"])
def test_make_refuses_a_variable_that_its_own_targets_do_not_take(door, target):
    done = make(door, target, "seed=1")
    assert done.returncode == 2 and f"seed=: {target} does not take it" in done.stderr


PHONY = {
    word
    for line in (ROOT / "Makefile").read_text().splitlines()
    if line.startswith(("override COMMANDS", "override TARGETS"))
    for word in line.split()
    if word.isidentifier() or "-" in word
} - {"override", "COMMANDS", "TARGETS"}


def test_make_help_lists_every_target_in_80_columns(door):
    shown = make(door, "help").stdout
    assert {"train", "setup", "drill"} <= PHONY <= set(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("target", sorted(PHONY))
def test_help_of_every_target_has_each_variable_that_it_takes(door, target):
    """Of a command the program says it; of any other target make's own refusal names them."""
    done = make(door, "help", f"of={target}")
    assert done.returncode == 0, done.stderr
    commands = typer.main.get_command(app).commands
    words = done.stdout.splitlines()
    if words[:2] == ["'-m'", "'trainer'"]:
        assert words[2:] == [repr(target), "'--help'"] and target in commands
        return
    assert target not in commands and words[0].split()[:2] == ["make", target]
    refused = make(door, target, "no_such=1").stderr
    _, _, valid = refused.partition("does not take it; ")
    assert valid and all(word in done.stdout for word in re.findall(r"\w+=", valid)), refused


def test_help_of_what_make_adds_to_a_command_is_there_too():
    assert " pytest= " in help_text("drill", typer.main.get_command(app), 80)


def test_help_of_a_mistyped_target_names_the_right_one(door):
    for of, remedy in (("setpu", "did you mean setup?"), ("x;touch pwned", "valid: train plan")):
        done = make(door, "help", f"of={of}")
        assert done.returncode == 2 and remedy in done.stderr.splitlines()[0]
    assert not (door / "pwned").exists()
