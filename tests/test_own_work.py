"""A user's own rows, recipes, ablations and runs beside the project's fail none of its tests."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from support.committed import ROOT, committed_root

# those that read what is committed
READERS = (
    "tests/runs/test_results.py::test_every_stored_row_is_told_of_with_its_score",
    "tests/recipe/test_roadmap.py::test_the_pages_stand_in_the_order_of_the_table",
    "tests/recipe/test_explain.py::test_every_page_has_a_row_and_every_score_a_place",
    "tests/tools/test_matrix.py::test_the_matrix_has_every_recipe_and_every_model",
    "tests/ablation/test_shipped_ablations.py::test_the_readme_lists_every_page",
    "tests/ablation/test_shipped_ablations.py::test_the_shipped_questions_are_these",
    "tests/cli/test_table.py::test_the_committed_tables_are_what_their_rows_render",
    "tests/test_readme.py::test_the_table_of_recipes_is_current",
)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing but the project's files, as far as those tests need them."""
    made = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("trainer", "tests"):
        shutil.copytree(ROOT / folder, made / folder, ignore=ignore)
    shutil.copytree(committed_root(), made, dirs_exist_ok=True)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml"):
        shutil.copy(
            ROOT / name, made
        )  # not .git, which in a worktree is a file with another's path
    shutil.copytree(ROOT / ".ci", made / ".ci")
    shutil.copy(ROOT / ".gitignore", made)
    for words in (["init", "-q"], ["add", "."], ["add", "-f", "results"]):
        subprocess.run(["git", *words], cwd=made, check=True, capture_output=True)
    return made


def test_own_work_fails_no_test(checkout):
    row = json.loads(next(iter(sorted((checkout / "results/rows").glob("*.json")))).read_text())
    row |= {"run": "own-run", "recipe": "mine", "digest": "0" * 12, "top1_pct": 12.34}
    (checkout / "results/rows/own-run.json").write_text(json.dumps(row))
    recipe = (checkout / "recipes/A3.v1.yaml").read_text()
    own = recipe.replace("name: A3", "name: roadmap-mine")
    (checkout / "recipes/roadmap-mine.v1.yaml").write_text(own)
    ablation = (checkout / "ablations/rsb-mixing.yaml").read_text()
    (checkout / "ablations/mine.yaml").write_text(ablation.replace("rsb-mixing", "mine"))
    (checkout / "runs/some-run").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *READERS],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    command = ["git", "status", "--porcelain", "--", "results", "runs"]
    status = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert not [line for line in status.stdout.splitlines() if line.startswith("??")]


@pytest.mark.parametrize(
    "path",
    [
        "results/mine.md",
        "results/mine-effects.svg",
        "predictions.csv",
        "predictions.sheet.png",
        "quality/index.html",
        "runs/mine/plan.json",
    ],
)
def test_what_the_readmes_commands_write_is_ignored(checkout, path):
    done = subprocess.run(["git", "check-ignore", "-q", path], cwd=checkout)
    assert done.returncode == 0
