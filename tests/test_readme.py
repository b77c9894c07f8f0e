"""What the READMEs say is so: their commands, links, excerpts of files and tables are the project's
own.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import TypeAdapter

from trainer.base.component import registered
from trainer.cli.main import app
from trainer.cli.words import options_of
from trainer.components.augment import Augmentation
from trainer.components.mixing import Mixing
from trainer.components.schedules import Schedule
from trainer.recipe.explain import recipes_table
from trainer.recipe.load import parse_recipe
from trainer.recipe.profiles import Profile
from trainer.runs.job import Job, plan_of

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "recipes/README.md",
        "trainer/README.md",
        "ablations/README.md",
        "results/README.md",
    )
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
GROUP = typer.main.get_command(app)
OWN = {
    "test": {"pytest"},
    "setup": {"ffcv", "torch", "index"},
    "help": {"of"},
    "lint": set(),
    "clean": set(),
}


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.S)


def make_commands() -> list[str]:
    commands = []
    for page, text in TEXTS.items():
        lines = [
            line.partition("  #")[0].strip()
            for block in code_blocks(page, "sh")
            for line in block.splitlines()
        ]
        commands += [line for line in lines if line.startswith("make ")]
        commands += re.findall(r"`(make [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return sorted(set(commands))


@pytest.mark.parametrize("command", make_commands())
def test_every_make_command_names_targets_and_variables_that_exist(command):
    words = shlex.split(command.replace("<", "").replace(">", ""))[1:]
    if words and words[0] in OWN:
        assert {word.partition("=")[0] for word in words[1:]} <= OWN[words[0]]
    else:
        options_of(words, GROUP)  # raises where a word is not the command's
        assert "=" in words[0] or words[0] in GROUP.commands


@pytest.mark.parametrize(
    "command",
    [command for command in make_commands() if "set=" in command and "plugins=" not in command],
)
def test_every_override_shown_fits_its_recipe(command):
    given = dict(word.split("=", 1) for word in shlex.split(command)[1:] if "=" in word)
    plan = plan_of(
        Job(given["recipe"], given.get("model", "resnet50"), "imagenet-1k", overrides=given["set"])
    )
    assert plan.deviations


@pytest.mark.parametrize(
    ("page", "link"),
    [
        (page, link)
        for page, text in TEXTS.items()
        for link in sorted(set(re.findall(r"\]\((?!http)([^)\s]+)\)", text)))
    ],
)
def test_every_link_leads_somewhere(page, link):
    path, _, heading = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        assert heading in {re.sub(r"[^\w\- ]", "", it.lower()).replace(" ", "-") for it in headings}


def test_every_file_that_the_architecture_names_exists():
    """`engine/train.py` and the like in trainer/README.md, from the package or the root."""
    names = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", TEXTS["trainer/README.md"]))
    assert names
    missing = {
        name for name in names if not any((it / name).exists() for it in (ROOT, ROOT / "trainer"))
    }
    assert not missing


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_table_of_recipes_is_current():
    assert recipes_table() in TEXTS["recipes/README.md"]


def test_the_table_of_what_was_measured_is_that_of_the_files():
    spec = importlib.util.spec_from_file_location(
        "readme_table", ROOT / "tests" / "benchmarks" / "readme_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BEGIN + module.table() + module.END in TEXTS["results/README.md"]


def test_the_recipe_shown_is_the_recipe():
    shown = next(block for block in code_blocks("recipes/README.md", "yaml") if "\nname:" in block)
    name = re.search(r"^name: (\w+)$", shown, re.M)[1]
    text = (ROOT / "recipes" / f"{name}.v1.yaml").read_text()
    assert text.startswith(shown.rstrip().removesuffix("# ...").rstrip())


def test_the_recipes_page_has_a_line_of_every_schedule_augmentation_and_mix():
    shown = next(
        block for block in code_blocks("recipes/README.md", "yaml") if "lr.schedule:" in block
    )
    lines = yaml.safe_load(shown)
    kinds = {"lr.schedule": Schedule, "augment": Augmentation, "mix": Mixing}
    assert lines.keys() == kinds.keys()
    for key, kind in kinds.items():
        parts = [TypeAdapter(kind).validate_json(json.dumps(line)) for line in lines[key]]
        ours = {type(part) for part in parts}
        assert ours == {one for one in registered(kind) if one.__module__.startswith("trainer.")}


def test_the_profile_shown_loads():
    shown = next(
        block for block in code_blocks("trainer/README.md", "yaml") if "num_train" in block
    )
    assert parse_recipe(shown, "README.md", Profile)[0].adapt is not None


def test_the_loss_shown_is_one_that_a_plan_takes(tmp_path):
    """The file and the command of "add a loss in five minutes", as they stand there."""
    [shown] = code_blocks("trainer/README.md", "python")
    (tmp_path / "my_losses.py").write_text(shown)
    [command] = [it for it in make_commands() if it.startswith("make plan") and "plugins=" in it]
    given = [word.split("=", 1) for word in shlex.split(command)[2:]]
    flags = [part for name, value in given for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "plan", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "brier" in done.stdout, done.stderr


def test_the_python_shown_parses_and_names_the_api():
    import trainer

    [shown] = code_blocks("README.md", "python")
    compile(shown, "README.md", "exec")
    assert set(re.findall(r"trainer\.(\w+)\(", shown)) <= set(trainer.__all__)


def test_the_test_command_is_the_one_that_ci_calls():
    assert "make test" in TEXTS["CONTRIBUTING.md"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
