"""Markdown, CSV and LaTeX against golden files; every word escaped, LaTeX read by a small parser.

`python tests/report/test_formats.py` rewrites the golden files; read the diff before a commit.
"""

import csv
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.tabled import cell, table_of
from trainer.report.formats import (
    as_csv,
    as_latex,
    as_markdown,
    cell_text,
    format_number,
    latex_text,
    markdown_code,
    markdown_text,
)
from trainer.report.view import make_view

GOLDEN = Path(__file__).parent / "golden_tables"
FORMATS = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


def every_case():
    """Two groups; n = 3, 2, 1 and 0; diverged, failed, missing; equal values; a published score;
    names that bite.
    """
    small, large = "resnet18 on digits", "resnet50 on digits"
    cells = {
        cell("BCE", small, is_base=True, levels=(("loss", "BCE"),), published=79.8, published_source="RSB, Table 1 (resnet50, ImageNet-1k)"): {0: 95.8333, 1: 97.2222, 2: 96.1111},
        cell("CE", small, "loss={name: ce}", levels=(("loss", "CE"),)): {0: 96.3889, 1: 97.5, 2: 97.2222},
        cell("CE | 50 % & #1_[a] $x^2$ \\n <b>", small, "mix=null"): {0: 90.0, 1: None, 2: 91.0},
        cell("equal", small, "smoothing=0.1"): {0: 96.3889, 1: 97.7778, 2: 96.6667},
        cell("one", small, "epochs=3"): {1: 80.0}, cell("never ran", small, "epochs=5"): {},
        cell("-β → Ω", large, is_base=True): {0: 98.0, 1: 98.5, 2: 98.2},
        cell("*failed*", large, "`epochs`=4"): {0: 97.0, 2: 97.1},
    }  # fmt: skip
    facts = {"CE": {"device": "another processor"}, "one": {"epochs": 3}}
    table = table_of(cells, errors={("*failed*", 1): "RuntimeError: out of memory"}, **facts)
    return replace(
        table,
        title="Loss & norms: 100 % of it",
        name="every-case",
        notes="What was *meant* by it.\n\n- a list",
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_case_is_rendered_as_in_its_golden_file(suffix):
    assert FORMATS[suffix](make_view(every_case())) == (GOLDEN / f"every-case.{suffix}").read_text()


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_seed_is_rendered_as_in_its_golden_file(suffix):
    assert FORMATS[suffix](make_view(one_seed())) == (GOLDEN / f"one-seed.{suffix}").read_text()


def one_seed():
    values = {
        cell("base", is_base=True): {0: 95.8333},
        cell("swish", overrides="model.activation={name: swish}"): {0: 96.1111},
    }
    return replace(table_of(values, seeds=(0,)), name="one-seed")


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


# ---- LaTeX, read by rules of its own


def latex_problems(text: str) -> list[str]:
    """What a compiler would stop at: braces, environments, math, lines of the table, bare special
    signs.
    """
    problems, stack, depth, in_math = [], [], 0, False
    for line in text.splitlines():
        for token in re.findall(
            r"\\(?:begin|end)\{\w+\}(?:\{[^}]*\})?|\\[a-zA-Z]+|\\.|%.*|[{}$&#^_~]|[^\\{}$&#^_~%]+",
            line,
        ):
            if token.startswith("%"):
                break
            if begun := re.match(r"\\begin\{(\w+)\}(?:\{([^}]*)\})?", token):
                stack.append((begun[1], len(begun[2] or "")))
            elif ended := re.match(r"\\end\{(\w+)\}", token):
                if not stack or stack.pop()[0] != ended[1]:
                    problems.append(f"{token} closes nothing")
            elif token in "{}":
                depth += 1 if token == "{" else -1
                problems += ["a } too many"] * (depth < 0)
            elif token == "$":
                in_math = not in_math
            elif (
                token in ("#", "~")
                or (token in "^_" and not in_math)
                or (token == "&" and (not stack or stack[-1][0] != "tabular"))
            ):
                problems.append(f"bare {token}: {line}")
            elif not token.isascii() and not re.fullmatch(
                r"[\x20-\x7eà-ÿÀ-ßœčćłńřšśžźŒČĆŁŃŘŠŚŽŹ]+", token
            ):
                problems.append(f"not in the fonts: {token}")
        problems += [f"open at the end of its line: {line}"] * (depth != 0 or in_math)
        if stack and stack[-1][0] == "tabular" and line.endswith(r"\\"):
            spanned = re.match(r"\\multicolumn\{(\d+)\}", line)
            found = int(spanned[1]) if spanned else 1 + len(re.findall(r"(?<!\\)&", line))
            problems += [f"{found} columns: {line}"] * (found != stack[-1][1])
            problems += [f"an argument of \\\\: {line}"] * line.startswith(("[", "*"))
    return problems + [f"{name} stays open" for name, _ in stack]


@pytest.mark.parametrize("columns", ["", "cell set marks n group loss"])
def test_the_latex_is_one_that_compiles(columns):
    for table in (every_case(), one_seed()):
        page = as_latex(make_view(table, columns=columns if table.name == "every-case" else ""))
        assert latex_problems(page) == []
        for word in (
            r"\toprule",
            r"\midrule",
            r"\bottomrule",
            r"\begin{table}",
            r"\caption{",
            r"\label{tab:",
        ):
            assert word in page
        assert "\\\\\n" in page and "booktabs" in page


@pytest.mark.parametrize(
    "broken",
    [r"\begin{table}", r"\begin{a}\end{b}", "a_b", "50 % of }", "{", "a & b", "#1", "$x", "x^2", "\\begin{tabular}{ll}\na \\\\\n\\end{tabular}", "\\begin{tabular}{l}\n[a] \\\\\n\\end{tabular}", "Ω", "\\end{table}"],
)  # fmt: skip
def test_the_parser_sees_what_does_not_compile(broken):
    assert latex_problems(broken) or broken == "50 % of }"  # a comment hides the rest of its line


READ_BACK = {
    r"\textbackslash{}": "\\", r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&", r"\%": "%",
    r"\#": "#", r"\_": "_", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", r"\char34{}": '"', "{`}": "`",
    "'{}": "'", "{[}": "[", "{*}": "*", "-{}": "-",
}  # fmt: skip


@settings(max_examples=150)
@given(st.text(st.characters(max_codepoint=126), max_size=40))
def test_any_name_survives_latex(text):
    """Read back sign by sign; and as one cell of a table it compiles."""
    found = latex_text(text)
    tokens = sorted(READ_BACK, key=len, reverse=True)
    read = re.sub("|".join(map(re.escape, tokens)), lambda token: READ_BACK[token[0]], found)
    printable = "".join(
        mark if mark.isprintable() else f"[U+{ord(mark):04X}]" for mark in " ".join(text.split())
    )
    assert read == printable
    assert latex_problems("\\begin{tabular}{ll}\n" + found + " & a \\\\\n\\end{tabular}") == []


def test_letters_that_the_fonts_lack_become_their_code_point():
    assert latex_text("Ω é ≥ 中") == r"{[}U+03A9] é $\geq$ [U+4E2D]"
    assert latex_text("a\nb\x1b[2J") == "a b[U+001B][2J"


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
