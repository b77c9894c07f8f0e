"""What somebody else has written can be refused, and no more: SECURITY.md's table, line by line."""

import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from support.plans import small_plan
from support.rows import ROW
from trainer.base.errors import DataError, UserError
from trainer.base.json_text import json_file, json_of
from trainer.base.names import FolderError, check_links, inside, why_no_name
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.base.terminal import Terminal
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.data.datasets import builtin as sets
from trainer.data.decode import BadImage, read_image
from trainer.data.index import open_index
from trainer.distributed import rendezvous
from trainer.distributed.launch import slurm_job
from trainer.models.build import check_model_name
from trainer.recipe import explain
from trainer.recipe.load import ConfigError, load_yaml, parse
from trainer.recipe.overrides import OverrideError, overrides_of
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Recipe, open_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs import lock as claims
from trainer.runs.checkpoint import load_checkpoint, save_checkpoint
from trainer.runs.job import Job, run_job
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.remote_rows import pull_rows
from trainer.runs.results import RowError, read_row, read_row_file, row_path, rows_folder, store_row
from trainer.runs.run_folder import recipe_of
from trainer.tasks import task_of

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "../x",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "a\\b",
    "a\0b",
    "a\x1b[2J",
    "a\nb",
    "\u202etxt",
    "x" * 300,
    "\ud800",
)


def rsb(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rsb")


# ---- names and links


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_elsewhere_is_none(tmp_path, name):
    assert why_no_name(name)
    for path_of in (
        lambda: inside(tmp_path, name, "run"),
        lambda: row_path(tmp_path, name),
        lambda: read_row(tmp_path, name),
    ):
        with pytest.raises(FolderError) as refused:
            path_of()
        assert str(refused.value).isprintable()
    row = json.loads(ROW.as_json())
    for key in ("run", "recipe", "model", "data"):
        path = tmp_path / "row.json"
        path.write_bytes(json.dumps(row | {key: name}).encode())
        with pytest.raises(RowError, match="not a row of this suite"):
            read_row_file(path)
    if not re.fullmatch("[x.]*", name):
        with pytest.raises(UserError):
            check_model_name(f"resnet50.{name}")  # timm looks at what is left of the point


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_a_path_made_of_a_name_lies_in_its_folder(name):
    folder = Path("/nonexistent/runs")
    try:
        path = inside(folder, name, "run")
    except FolderError:
        return
    assert path.parent == folder and path.name == name and os.path.normpath(path) == str(path)


@pytest.mark.parametrize("words", [("eval",), ("verify",)])
@pytest.mark.parametrize("run", ["../secret", "no-such-run", "/etc", "x" * 400])
def test_a_run_that_is_elsewhere_is_one_line(tmp_path, words, run):
    (tmp_path / "secret").mkdir()
    done = rsb(*words, "--run", run, "--runs", tmp_path / "runs")
    assert (
        done.exit_code == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    ), done.output


def test_a_link_that_leads_out_of_the_store_is_not_read(tmp_path):
    store_row(tmp_path / "other", ROW)
    rows_folder(tmp_path / "mine").mkdir(parents=True)
    row_path(tmp_path / "mine", ROW.run).symlink_to(row_path(tmp_path / "other", ROW.run))
    with pytest.raises(FolderError, match="a link that leads out"):
        read_row(tmp_path / "mine", ROW.run)
    shutil.copy(
        row_path(tmp_path / "other", ROW.run), rows_folder(tmp_path / "mine") / "other-name.json"
    )
    with pytest.raises(RowError, match="the row of"):
        read_row(tmp_path / "mine", "other-name")


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "checkpoints"])
def test_a_link_in_a_run_folder_is_refused_before_anything_is_written_through_it(tmp_path, name):
    plan, data = small_plan(overrides="epochs=1"), open_data(small_plan().profile, None)
    given = make_settings("cpu", workers="0", runs=tmp_path / "runs", results=tmp_path / "results")
    folder, secret = given.runs / plan.run_name(data.fingerprint), tmp_path / "secret"
    folder.mkdir(parents=True)
    secret.write_bytes(b"mine") if "." in name else secret.mkdir()
    (folder / name).symlink_to(secret)
    with pytest.raises(FolderError, match=f"{name}: a link that leads out"), StopRequest() as stop:
        run_job(Job("A2", "test_resnet"), plan, given, data, Terminal(file=io.StringIO()), stop)
    assert secret.read_bytes() == b"mine" if secret.is_file() else not list(secret.iterdir())


def test_links_that_stay_are_links(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "b").symlink_to("a/file")
    check_links(tmp_path)
    (tmp_path / "round").symlink_to("round")
    assert inside(tmp_path, "b", "run") == tmp_path / "b"


def test_a_store_behind_a_url_cannot_name_files_elsewhere(tmp_path, monkeypatch):
    class System:
        def cat_file(self, path, start, end):
            return b"x" * (end - start)

    monkeypatch.setattr("trainer.runs.remote_rows._opened", lambda url: (System(), "root/rows"))
    monkeypatch.setattr("trainer.runs.remote_rows._names", lambda url: ["..\\x.json"])
    with pytest.raises(FolderError):
        pull_rows("memory://x", tmp_path / "rows")
    monkeypatch.setattr("trainer.runs.remote_rows._names", lambda url: ["a.json"])
    pull_rows("memory://x", tmp_path / "rows")
    with pytest.raises(RowError, match="of which at most"):
        read_row(tmp_path, "a")


# ---- pages


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: " + "[" * 10_000 + "]" * 10_000,
        "a: " + "{b: " * 10_000 + "}" * 10_000,
        "- " * 10_000 + "x",
        "? " * 10_000 + "x",
        "[" * 10_000,
        'a: !!python/object/apply:os.system ["touch pwned"]',
        "a: !!python/name:os.system",
        "a: !!binary eA==",
        "<<: {a: 1}",
        "a: \u202ex",
        "a: x # \u2066",
    ],
    ids=range(12),
)
def test_a_page_that_is_a_trap_is_one_line_at_once(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "A1.v1.yaml"
    path.write_text(text)
    before_s = time.process_time()
    for read in (
        lambda: open_recipe(path),
        lambda: load_yaml(path, Profile),
        lambda: parse(text, "set"),
    ):
        with pytest.raises(ConfigError) as refused:
            read()
        assert str(refused.value).isprintable() and len(str(refused.value)) < 1000
    with pytest.raises(OverrideError):
        overrides_of(f"mix='{text}'")
    assert time.process_time() - before_s < 5.0 and not (tmp_path / "pwned").exists()


def test_a_page_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "A1.v1.yaml"
    path.touch()
    os.truncate(path, 2**30)
    with pytest.raises(ConfigError, match="at most 256 KiB"):
        open_recipe(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is no file"):
        open_recipe(path)


def test_a_data_set_has_a_name_that_may_stand_in_a_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: ..\nnum_classes: 10\nnum_train: 5\nnum_val: 5\n"
        "mean: [0.5, 0.5, 0.5]\nstd: [0.2, 0.2, 0.2]\n"
    )
    with pytest.raises(ConfigError, match=":1: name"):
        load_yaml(path, Profile)


# ---- rows, JSON


@pytest.mark.parametrize(
    "change",
    [
        {"top1_pct": 1e999},
        {"top1_pct": -1.0},
        {"num_params": 10**40},
        {"num_val_images": 0},
        {"device": "\x1b[2J"},
        {"finished_utc": "now"},
        {"deviations": [{"path": "a", "before": "\x07", "after": "b", "origin": "set"}]},
        {"versions": {"torch": "\x9b2J"}},
        {"top1_pct": True},
    ],
    ids=str,
)
def test_a_row_of_no_number_or_no_text_is_refused(tmp_path, change):
    path = tmp_path / "row.json"
    path.write_text(json.dumps(json.loads(ROW.as_json()) | change))
    with pytest.raises(RowError) as refused:
        read_row_file(path)
    assert "\n" not in str(refused.value) and next(iter(change)) in str(refused.value)


DEEP = "[" * 100_000


def test_json_that_nests_without_end_is_none(tmp_path):
    for text in (DEEP, '{"a":' * 100_000, b"\xff", "", "1" * 5000):
        with pytest.raises(ValueError):
            json_of(text)
    for name in ("plan.json", "row.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match=r"plan.json is damaged"):
        recipe_of(tmp_path)
    with pytest.raises(RowError):
        read_row_file(tmp_path / "row.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="(no file|not a regular file)"):
        json_file(tmp_path / "pipe")
    with pytest.raises(RowError):
        read_row_file(tmp_path / "pipe")


def test_a_claim_that_is_no_claim_is_waited_out(tmp_path):
    (tmp_path / "claim.x").write_text(DEEP)
    assert "unknown machine" in str(claims.owner_of(tmp_path))


# ---- pickles and other programs


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_is_a_program_is_passed_over(tmp_path):
    sprung, lines = tmp_path / "sprung", []
    folder = tmp_path / "checkpoints"
    for step, save in ((1, torch.save), (2, pickle.dump)):
        path = save_checkpoint(folder, step, {})
        with open(path, "wb") as file:
            save({"model": Trap(sprung)}, file)  # torch.save, and a bare pickle
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_checkpoint(folder, lines.append) is None and len(lines) == 2
    assert not sprung.exists()


def test_an_array_that_is_a_program_is_no_image(tmp_path):
    sprung = tmp_path / "sprung"
    np.save(tmp_path / "image.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage):
        read_image(tmp_path / "image.npy")
    assert not sprung.exists()


def test_postscript_is_no_image(tmp_path, monkeypatch):
    ghost = tmp_path / "gs"
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path / 'sprung'}\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "image.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(BadImage, match="EPS is not read"):
        read_image(tmp_path / "image.jpg")
    assert not (tmp_path / "sprung").exists()


def test_a_pipe_is_waited_for_by_nobody(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "train/a/2.jpg")
    with pytest.raises(BadImage, match="(no file|not a regular file)"):
        read_image(tmp_path / "train/a/2.jpg")
    with pytest.raises(DataError, match=r"2.jpg: is a pipe or a device"):
        open_index(tmp_path, "train")


def test_a_few_bytes_do_not_become_all_of_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "_LARGEST_IDX_MIB", 1)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\3" + bytes(2**21)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + bytes(4))
    with pytest.raises(DataError, match="more than 1 MiB"):
        sets._idx_set("mnist", tmp_path, "train")


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "extractall",
    "unsafe_load",
    "full_load",
    "load_all",
}
FORBIDDEN_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "xml",
    "tarfile",
    "zipfile",
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_file_of_the_program_can_run_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            # tarfile lists the members of shards; that nothing is extracted is tested beside them;
            # a process and the one that it forked pickle what they send each other, as
            # multiprocessing does
            # VOC's annotations are XML: what declares entities is refused before it is parsed
            allowed = {
                "shards.py": {"tarfile"}, "messages.py": {"pickle"}, "voc.py": {"xml"}
            }.get(path.name, set())  # fmt: skip
            assert not {name.split(".")[0] for name in names} & (FORBIDDEN_MODULES - allowed), names
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert called not in FORBIDDEN_CALLS and called.rpartition(".")[
            2
        ] not in FORBIDDEN_CALLS - {"compile", "eval"}, called
        assert "shell" not in given, called
        if called == "torch.load":
            assert given.get("weights_only") == "True"
        if called == "np.load":
            assert given.get("allow_pickle") == "False"
        if called.startswith("yaml."):
            safe = {"yaml.dump": ("Dumper", "_Dumper"), "yaml.load": ("Loader", "SafeLoader")}
            word, value = safe[called]
            assert given[word] == value, called


# ---- terminals


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x08\x7f\x9b31m\u202eb\udcff\u2028"


def shown(*things) -> str:
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, color_system=None, width=200)
    for thing in things:
        terminal.print(thing, markup=False)
    return out.getvalue()


def test_nothing_printed_moves_a_terminal():
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    text = shown(HOSTILE, table)
    assert not any(mark in text for mark in "\x1b\x07\r\x08\x7f\x9b\u202e\udcff\u2028")
    assert text.count("\\x1b]0;owned") == 4 and "\\udcff" in text
    assert shown("a\nb\u00a0ü ✓ 漢") == "a\nb\u00a0ü ✓ 漢\n"


def test_a_file_named_to_harm_is_shown_not_obeyed(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"no image")
    (tmp_path / "train/a" / "\x1b]0;owned\x07[bold].jpg").write_bytes(b"no image")
    (tmp_path / "train/b" / os.fsdecode(b"\xff\x9b.jpg")).write_bytes(b"no image")
    done = rsb("check-data", "--data", tmp_path)
    assert done.exit_code == 1, done.output
    assert "\\x1b]0;owned\\x07[bold].jpg" in re.sub(r"[│\s]", "", done.output)
    assert "\x1b" not in done.output and "\x9b" not in done.output


def test_a_page_cannot_set_what_is_printed(tmp_path):
    path = tmp_path / "A3.v1.yaml"
    text = (
        find_recipe("A3.v1")
        .read_text()
        .replace("source: ", 'source: "[/bold][link=file:///x]y[/link]" #', 1)
    )
    path.write_text(text)
    page, positions = open_recipe(path)
    assert isinstance(page, Recipe)
    table = explain.explain_table(
        explain.explain_rows(page, positions, page.for_model("resnet50"), "resnet50"),
        f"A3: {page.source}",
    )
    assert "[/bold][link=file:///x]y[/link]" in shown(table)


def test_an_error_of_a_rank_is_text(capsys):
    rendezvous._print_error(HOSTILE)
    assert "\x1b" not in capsys.readouterr().err


def test_a_class_may_have_any_name_that_a_folder_may_have(tmp_path):
    classes, targets = ["$^$ $\\frac{$", "\x1b]0;t\x07", "\udcff\u202e", "\n[bold]"], torch.eye(4)
    task = task_of(small_plan(), make_settings("cpu", workers="0"))
    draw_first_batch(tmp_path / "first.png", torch.zeros(4, 3, 8, 8), targets, task, classes)
    assert (tmp_path / "first.png").stat().st_size > 1000


# ---- shells


WORDS = (
    "a'; touch pwned #",
    "$(touch pwned)",
    "`touch pwned`",
    "a\n#SBATCH --wrap=x\ntouch pwned",
    '"; touch pwned; "',
    "--x",
)


def test_a_job_file_runs_no_word_of_a_user(tmp_path):
    """bash runs the file, with an srun that tells what it was given."""
    (tmp_path / "srun").write_text(
        '#!/bin/sh\nshift 2\nfor word in "$@"; do printf "%s\\0" "$word"; done\n'
    )
    (tmp_path / "srun").chmod(0o755)
    job = tmp_path / "job.sh"
    job.write_text(slurm_job(["train", *WORDS], "name", 1, 0, 1, 1.0))
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", job], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split("\0")[4:-1]) == WORDS
    assert not list(tmp_path.rglob("pwned")) and not (Path.cwd() / "pwned").exists()


def test_flags_for_pytest_are_words_not_commands(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PYTEST_ADDOPTS"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    words = "-k 'a or b'; touch pwned $(touch pwned)"
    done = subprocess.run(
        ["make", "test", f"pytest={words}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith(words), done.stderr
    assert not (tmp_path / "pwned").exists()
