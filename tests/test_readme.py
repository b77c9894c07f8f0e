"""The README says what is: its commands, links, pages and tables are the project's own."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.recipe.explain import recipes_table
from trainer.recipe.load import parse_page
from trainer.recipe.profiles import Profile
from trainer.runs.job import Job, plan_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(
    next(line for line in MAKEFILE.splitlines() if line.startswith(".PHONY:")).split()[1:]
)
VARIABLES = set(" ".join(re.findall(r"^(?:TRAIN_)?VARIABLES := (.*)$", MAKEFILE, re.M)).split())


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def make_commands() -> list[str]:
    lines = [
        line.partition("#")[0].strip() for block in code_blocks("sh") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("make")] + re.findall(
        r"`(make [^`]*)`", README
    )


@pytest.mark.parametrize("command", make_commands())
def test_every_make_command_names_targets_and_variables_that_exist(command):
    for word in shlex.split(command.replace("<", "").replace(">", ""))[1:]:
        name, equals, _ = word.partition("=")
        assert name in (VARIABLES if equals else TARGETS), word


@pytest.mark.parametrize(
    "command", [command for command in make_commands() if "set=" in command and "=…" not in command]
)
def test_every_departure_shown_fits_its_page(command):
    given = dict(word.split("=", 1) for word in shlex.split(command)[1:])
    plan = plan_of(Job(given["recipe"], given["model"], "imagenet-1k", overrides=given["set"]))
    assert plan.deviations


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_the_table_of_recipes_is_current():
    assert recipes_table("recipes/") in README


def test_the_table_of_what_was_measured_is_that_of_the_files():
    spec = importlib.util.spec_from_file_location(
        "readme_table", ROOT / "tests" / "benchmarks" / "readme_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BEGIN + module.table() + module.END in README


def test_the_page_shown_is_the_page():
    shown = next(block for block in code_blocks("yaml") if "optimizer" in block)
    name = re.search(r"^name: (\w+)$", shown, re.M)[1]
    page = (ROOT / "recipes" / f"{name}.v1.yaml").read_text()
    assert page.startswith(shown.rstrip().removesuffix("# ...").rstrip())


def test_the_plan_of_a_swapped_part_is_what_make_plan_prints():
    """Every line of the excerpt, in its order."""
    shown = next(block for block in code_blocks("text") if block.startswith("$ make plan"))
    command, *lines = shown.splitlines()
    words = [word.split("=", 1) for word in shlex.split(command)[3:]]
    done = CliRunner().invoke(
        app, ["plan", *(part for name, value in words for part in (f"--{name}", value))]
    )
    assert done.exit_code == 0, done.output
    printed = iter([line.rstrip() for line in done.stdout.splitlines()])
    assert all(line in printed for line in lines if line != "...")


def test_the_profile_shown_loads():
    shown = next(block for block in code_blocks("yaml") if "num_train" in block)
    assert parse_page(shown, "README.md", Profile)[0].adapt is not None


def test_the_test_command_is_the_one_that_ci_calls():
    assert "make test" in README and "make test" in (ROOT / ".ci" / "run").read_text()
