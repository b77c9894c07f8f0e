"""make table, make compare: what they print and store; a mistake is one line and exit 2."""

import json
import shutil
from pathlib import Path

import pytest

from support.commands import door, make, rsb
from support.studies import page, study, table
from support.tabled import stored_row
from trainer.ablation.spec import ablation_paths, load_ablation
from trainer.cli.table_show import FORMATS
from trainer.report.query import make_view
from trainer.report.table_rows import open_table
from trainer.report.tables import METRICS
from trainer.runs.results import read_row_file, store_row

ROOT = Path(__file__).parents[2]


def test_the_table_is_printed_and_stored_in_every_format(study):
    done = table(study)
    assert done.exit_code == 0, done.output
    assert (
        "91.00 ± 1.41" in done.output
        and "base" in done.output
        and "no row: seed 1; n = 1" in done.output
    )
    assert "warning: 1 of 4 runs without a row: CE seed 1" in done.output
    view = make_view(open_table(study[0], study[1], study[2], METRICS["top1"]))
    for suffix, writer in FORMATS.items():
        assert (study[1] / f"two.{suffix}").read_text() == writer(view)
    assert sorted(path.name for path in study[1].iterdir()) == [
        "rows",
        "two.csv",
        "two.html",
        "two.md",
        "two.tex",
    ]


def test_rendering_again_moves_no_byte(study):
    table(study)
    before = {suffix: (study[1] / f"two.{suffix}").read_bytes() for suffix in FORMATS}
    table(study)
    assert before == {suffix: (study[1] / f"two.{suffix}").read_bytes() for suffix in FORMATS}


@pytest.mark.parametrize(
    "words",
    [
        ["--metric", "loss"],
        ["--filter", "n > 1"],
        ["--sort", "-mean"],
        ["--columns", "cell mean"],
        ["--format", "tex"],
    ],
)
def test_a_view_is_printed_and_never_stored(study, words):
    done = table(study, *words)
    assert done.exit_code == 0, done.output
    assert [path.name for path in study[1].iterdir()] == ["rows"]


def test_a_format_is_printed_alone(study):
    lines = table(study, "--format", "csv", "--columns", "cell n mean").output.splitlines()
    assert lines == ["cell,n,metric,mean,std", "BCE,2,top1,91,1.4142136", "CE,1,top1,93.5,"]
    assert table(study, "--format", "md").output.startswith(
        "<!-- Rendered by make table ablation=two"
    )


def test_nothing_is_stored_where_no_run_has_a_row(page, tmp_path):
    done = rsb(
        "table", "--ablation", page, "--results", tmp_path / "results", "--runs", tmp_path / "runs"
    )
    assert done.exit_code == 0 and "make ablate ablation=two runs it" in done.output
    assert not (tmp_path / "results").exists()


def test_why_a_run_failed_is_printed(study):
    from support.tabled import key_of
    from trainer.ablation.failures import store_failure

    other = load_ablation(study[0]).cells[1]
    store_failure(
        study[2],
        key_of(other, 1),
        cell="CE",
        seed=1,
        run=None,
        exit_code=1,
        output=["RuntimeError: [bold]boom[/]"],
    )
    assert "failed: CE seed 1: RuntimeError: [bold]boom[/]" in table(study).output
    assert "failed: seed 1" in (study[1] / "two.md").read_text()


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (
            ["table", "--ablation", "norm-microbatch"],
            "ablation=norm-microbatch",
            "norm-micro-batch",
        ),
        (["table", "--ablation", "activations", "--metric", "top3"], "metric=top3", "top1"),
        (["table", "--ablation", "activations", "--format", "html"], "format=html", "tex"),
        (["table", "--ablation", "activations", "--sort", "acc"], "sort=acc", "mean"),
        (["table", "--ablation", "activations", "--columns", "acc"], "columns=acc", "mean"),
        (["table", "--ablation", "activations", "--filter", "exit()"], "filter=exit()", "; "),
        (["table", "--sort", "mean"], "sort=", "ablation="),
        (["compare", "--a", "x"], "b= not given", "b=<run>"),
        (["compare", "--a", "x", "--b", "y"], "run x", "rows lie in"),
        (["reproduce", "--row", "x"], "run x", "rows lie in"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_found_and_what_would_do(words, found, remedy):
    done = rsb(*words)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and found in line and remedy in line


def test_without_an_ablation_all_are_listed_with_what_they_have(tmp_path, monkeypatch):
    known = load_ablation("norm-micro-batch")
    store_row(tmp_path, stored_row(known.cells[0], 0, 90.0))
    store_row(tmp_path, stored_row(known.cells[0], 1, None))
    monkeypatch.setattr("trainer.cli.table_show.shipped_pages", lambda: [known.path])
    done = rsb("table", "--results", tmp_path, "--runs", tmp_path)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if "norm-micro-batch" in line)
    assert [part.strip() for part in line.split("│")][3:8] == ["12 x 3", "1", "1", "", "34"]


def test_two_runs_side_by_side_with_their_curves(study, tmp_path):
    a, b = (read_row_file(path) for path in sorted((study[1] / "rows").glob("*-s0-*.json")))
    for one, top1_pct in ((a, 30.0), (b, 60.0)):
        (study[2] / one.run).mkdir(parents=True)
        points = [
            {"epoch": epoch, "weights": "model", "top1_pct": top1_pct * epoch} for epoch in (0.5, 1)
        ]
        (study[2] / one.run / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in points)
        )
    done = rsb("compare", "--a", a.run, "--b", b.run, "--results", study[1], "--runs", study[2])
    assert done.exit_code == 0, done.output
    assert (
        "loss.name" in done.output
        and "top-1 %" in done.output
        and "3.5" in done.output
        and "epochs" not in done.output
    )
    assert (
        "val top-1 % (a, b; * where they meet)" in done.output
        and "training loss" not in done.output
    )
    shutil.rmtree(study[2] / b.run)
    assert (
        "b has no curves here"
        in rsb(
            "compare", "--a", a.run, "--b", b.run, "--results", study[1], "--runs", study[2]
        ).output
    )
    same = rsb("compare", "--a", a.run, "--b", a.run, "--results", study[1], "--runs", study[2])
    assert "differ in their names and dates alone" in same.output


# ---- committed tables


STUDIES = [
    path.stem for path in ablation_paths() if (ROOT / "results" / f"{path.stem}.md").exists()
]


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_tables_are_what_their_rows_render(name, tmp_path):
    """Without run folders and data sets, as on a fresh clone; a committed study has no failed run."""
    view = make_view(open_table(name, ROOT / "results", tmp_path, METRICS["top1"]))
    for suffix, writer in FORMATS.items():
        assert (ROOT / "results" / f"{name}.{suffix}").read_text() == writer(view), (
            f"make table ablation={name}"
        )


# ---- the Makefile


def test_make_passes_the_words_of_a_table(door):
    words = {
        "ablation": "norms",
        "metric": "loss",
        "sort": "-mean cell",
        "columns": "cell n",
        "filter": 'mean > 90 and "$(touch pwned)" in cell',
        "format": "md",
    }
    done = make(door, "table", *(f"{name}={value}" for name, value in words.items()))
    assert done.returncode == 0, done.stderr
    passed = [eval(line) for line in done.stdout.splitlines()]
    assert passed[:3] == ["-m", "trainer", "table"]
    assert dict(zip(passed[3::2], passed[4::2], strict=True)) == {
        f"--{name}": value for name, value in words.items()
    }
    assert not (door / "pwned").exists()


@pytest.mark.parametrize(("anyway", "is_passed"), [("1", True), ("0", False)])
def test_make_reproduces_a_row(door, anyway, is_passed):
    passed = make(door, "reproduce", "row=A1.v1-x", f"anyway={anyway}").stdout
    assert "'--row'" in passed and ("'--anyway'" in passed) is is_passed
