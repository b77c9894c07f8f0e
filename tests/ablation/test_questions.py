"""An ablation without its plans: the same from the cache as from the page, and never an old one."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.studies import PAGE
from trainer.ablation import questions
from trainer.ablation.cells import plan_of_cell
from trainer.ablation.questions import open_question, question_of, shipped_ablations
from trainer.ablation.spec import load_ablation
from trainer.base.cache import cache_folder
from trainer.base.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def page(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(PAGE)
    return path


@pytest.fixture()
def loaded(monkeypatch):
    """How often pages are worked out."""
    count = []
    monkeypatch.setattr(
        "trainer.ablation.spec.load_ablation",
        lambda source: count.append(source) or load_ablation(source),
    )
    return count


def test_the_cache_says_what_the_page_says(page, loaded):
    first, second = open_question(page), open_question(page)
    assert len(loaded) == 1 and first == second
    ablation = load_ablation(page)
    assert (first.name, first.title, first.question, first.source, first.seeds) == (
        "two",
        "Two",
        "Which of two?",
        "none",
        (0, 1),
    )
    assert first.cells == ablation.cells and all(cell.plan is None for cell in first.cells)
    assert first.identities == {
        (cell.name, seed): plan_of_cell(cell, seed).identity
        for cell in ablation.cells
        for seed in (0, 1)
    }


def test_a_page_that_has_changed_is_worked_out_anew(page, loaded):
    before = open_question(page)
    page.write_text(PAGE.replace("seeds: [0, 1]", "seeds: [0, 2]"))
    assert open_question(page).seeds == (0, 2) and before.seeds == (0, 1) and len(loaded) == 2


def test_so_is_one_whose_recipes_or_cache_version_have_changed(page, loaded, tmp_path, monkeypatch):
    open_question(page)
    monkeypatch.setattr(questions, "CACHE_VERSION", questions.CACHE_VERSION + 1)
    open_question(page)
    assert len(loaded) == 2
    (tmp_path / "A2.v1.yaml").write_text("epochs: 7")
    monkeypatch.setattr(questions, "shipped_folder", lambda name: tmp_path)
    open_question(page)
    assert len(loaded) == 3


def test_the_cache_version_is_raised_with_every_change_of_the_keys():
    """Caches made by an older version of the code must not be read for another key of the same run.

    Where this fails, keys have changed: raise CACHE_VERSION and write both numbers here.
    """
    question = question_of(load_ablation("activations"))
    places = [(cell.name, seed) for cell in question.cells for seed in question.seeds]
    keys = [question.identities[place].key for place in places]
    digest = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:12]
    assert (questions.CACHE_VERSION, digest) == (4, "3848f2204b69")


def test_a_question_knows_the_word_that_opens_it_again(page, monkeypatch):
    monkeypatch.chdir(page.parent)
    for word, expected in (
        ("two.yaml", "two.yaml"),
        (str(page), str(page)),
        ("activations", "activations"),
        (shipped_ablations()[0], shipped_ablations()[0].stem),
    ):
        assert open_question(word).word == expected
        assert open_question(open_question(word).word).name == open_question(word).name


def test_a_damaged_cache_is_none(page, loaded):
    expected = open_question(page)
    (record,) = (cache_folder() / "questions").iterdir()
    for number, content in enumerate(["{", "[]", '{"name": "two"}']):
        record.write_text(content)
        assert open_question(page) == expected and len(loaded) == 2 + number
        assert json.loads(record.read_text())["name"] == "two"


def test_a_cache_that_cannot_be_written_is_no_hindrance(page, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_question(page).name == "two"


def test_a_page_with_files_of_its_own_is_never_cached(page, loaded, tmp_path):
    profile = tmp_path / "own.yaml"
    profile.write_text(
        "name: own\nnum_classes: 5\nnum_train: 300\nnum_val: 60\n"
        "mean: [0.5, 0.5, 0.5]\nstd: [0.3, 0.3, 0.3]\n"
        "adapt: {batch_images: 32, epochs: 3, train_px: 32, test_px: 32}\n"
    )
    page.write_text(PAGE.replace("data: [digits]", f"data: [{profile}]"))
    open_question(page), open_question(page)
    assert len(loaded) == 2 and not (cache_folder() / "questions").exists()


def test_a_page_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="ablation=nobody: unknown ablation"):
        open_question("nobody")


def test_the_shipped_ablations_are_all_there():
    assert {"norm-micro-batch", "rsb-loss", "activations"} <= {
        path.stem for path in shipped_ablations()
    }


def test_a_cached_table_needs_no_torch(page, tmp_path):
    """Seconds and most of a gigabyte: neither torch nor timm may come in by another door."""
    open_question(page)
    words = [
        "table",
        "--ablation",
        str(page),
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path),
        "--filter",
        "n >= 0",
    ]
    script = (
        f"import sys; from trainer.cli.main import app; app({words!r}, standalone_mode=False); "
        "bad = {'torch', 'timm', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "print(bad); sys.exit(bool(bad))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "BCE" in done.stdout, done.stdout + done.stderr
