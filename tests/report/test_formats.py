"""Markdown, CSV and LaTeX against golden files; every word escaped, LaTeX read by a small parser.

`python tests/report/test_formats.py` rewrites the golden files; read the diff before a commit.
"""

import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.reported import every_case, one_seed
from trainer.report.formats import (
    as_csv,
    as_markdown,
    cell_text,
    format_number,
    markdown_code,
    markdown_text,
)
from trainer.report.latex import as_latex
from trainer.report.view import make_view

GOLDEN = Path(__file__).parent / "golden_tables"
FORMATS = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_case_is_rendered_as_in_its_golden_file(suffix):
    assert FORMATS[suffix](make_view(every_case())) == (GOLDEN / f"every-case.{suffix}").read_text()


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_seed_is_rendered_as_in_its_golden_file(suffix):
    assert FORMATS[suffix](make_view(one_seed())) == (GOLDEN / f"one-seed.{suffix}").read_text()


def test_the_numbers_of_the_golden_file_are_those_of_another_program():
    """Means and deviations by NumPy; empty where there are too few values."""
    lines = {
        line["cell"]: line
        for line in csv.DictReader(io.StringIO((GOLDEN / "every-case.csv").read_text()))
    }
    for name, values in {
        "BCE": [95.8333, 97.2222, 96.1111],
        "CE": [96.3889, 97.5, 97.2222],
        "*failed*": [97.0, 97.1],
    }.items():
        assert [float(lines[name]["mean"]), float(lines[name]["std"])] == pytest.approx(
            [np.mean(values), np.std(values, ddof=1)], rel=1e-6
        )
    assert (
        lines["one"]["std"]
        == lines["one"]["p"]
        == lines["never ran"]["mean"]
        == lines["BCE"]["difference"]
        == ""
    )
    assert (lines["never ran"]["n"], lines["one"]["n"], lines["BCE"]["published"]) == (
        "0",
        "1",
        "79.8",
    )


def test_the_csv_is_read_back_as_it_was_meant():
    lines = list(csv.DictReader(io.StringIO(as_csv(make_view(every_case())))))
    assert [line["cell"] for line in lines] == [one.cell.name for one in every_case().cells]
    assert lines[1]["set"] == "loss={name: ce}"


def test_columns_that_nobody_needs_are_left_out_and_those_asked_for_stay():
    page = as_markdown(make_view(one_seed()))
    head = next(line for line in page.splitlines() if line.startswith("| cell"))
    assert (
        "published" not in head and "p (Holm)" not in head and "±" not in head and "marks" in head
    )
    asked = as_markdown(make_view(every_case(), columns="cell published loss set"))
    assert (
        "| cell | published top-1 % | loss | set |" in asked
        and "| CE |  | CE | `loss={name: ce}` |" in asked
    )
    assert (
        as_csv(make_view(one_seed(), columns="cell mean")).splitlines()[0] == "cell,metric,mean,std"
    )


def test_markdown_shows_every_word_as_it_is():
    """Read back by a Markdown parser: no emphasis, no HTML, no broken line, in a table too."""
    page = as_markdown(make_view(every_case()))
    html = MarkdownIt("commonmark").enable("table").render(page)
    shown = re.sub(r"<!--.*?-->", "", html)
    assert "<b>" not in shown and "CE | 50 % &amp; #1_[a] $x^2$ \\n &lt;b&gt;" in shown
    assert "<em>meant</em>" in shown  # the user's own notes are Markdown
    assert "<em>failed" not in shown and "*failed*" in shown
    for table in re.findall(r"<table>(.*?)</table>", shown, re.S):
        heads = len(re.findall("<th[ >]", table))
        assert all(line.count("<td") in (0, heads) for line in table.split("<tr>"))


@settings(max_examples=150)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30))
def test_any_name_survives_a_markdown_table(text):
    words = " ".join(text.split())
    parser = MarkdownIt("commonmark").enable("table")
    html = parser.render(
        f"| a | b |\n|---|---|\n| {markdown_text(text)} x | {markdown_code(text)} |\n"
    )
    cells = re.findall(r"<td>(.*?)</td>", html, re.S)
    assert len(cells) == 2
    shown = [
        re.sub(r"</?code>", "", one)
        .replace("&quot;", '"')
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
        for one in cells
    ]
    assert shown[0].split() == f"{words} x".split() and shown[1].split() == words.split()


def test_numbers_are_never_minus_zero():
    assert [
        format_number(-0.001, 2),
        format_number(-0.001, 2, "+"),
        format_number(-0.5, 2, "+"),
        format_number(0.5, 2, "+"),
    ] == ["0.00", "+0.00", "-0.50", "+0.50"]


def test_the_words_of_a_line():
    view = make_view(every_case())
    texts = {
        one.cell.name: {column: cell_text(view, one, column) for column in view.columns}
        for one in view.table.cells
    }
    assert texts["BCE"]["mean"] == "96.39 ± 0.73" and texts["BCE"]["difference"] == "base"
    assert (
        texts["one"]["mean"] == "80.00"
        and texts["one"]["n"] == "1 of 3"
        and texts["one"]["difference"] == "-17.22"
    )
    assert (
        texts["never ran"]["mean"] == "no row"
        and texts["never ran"]["train_s"] == ""
        and texts["never ran"]["difference"] == ""
    )
    assert re.fullmatch(r"\+0\.65 \[-?\d\.\d\d, \d\.\d\d\]", texts["CE"]["difference"])
    assert texts["equal"]["marks"] == "" or "interval" in texts["equal"]["marks"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for made in (every_case(), one_seed()):
        for suffix, writer in FORMATS.items():
            (GOLDEN / f"{made.name}.{suffix}").write_text(writer(make_view(made)))
