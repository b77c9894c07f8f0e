"""LaTeX read by a small parser, and by LaTeX itself where it is: every word escaped, no table wider
than a paper's column.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.reported import every_case, one_seed, study
from support.tabled import cell, table_of
from trainer.report.latex import as_latex, latex_text
from trainer.report.view import make_view

ROOT = Path(__file__).parents[2]

# ---- LaTeX, read by rules of its own


def latex_problems(text: str) -> list[str]:
    """What a compiler would stop at: braces, environments, math, lines of the table, bare special
    signs.
    """
    problems, stack, depth, in_math = [], [], 0, False
    for line in text.splitlines():
        if line.startswith(r"\begin{tabular"):
            spec = re.sub(r"[@>]\{(?:[^{}]|\{[^{}]*\})*\}", "", line)
            stack.append((line[7 : line.index("}")], len(re.findall("[lrX]", spec.split("{")[-1]))))
            continue
        for token in re.findall(
            r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|%.*|[{}$&#^_~]|[^\\{}$&#^_~%]+",
            line,
        ):
            if token.startswith("%"):
                break
            if begun := re.match(r"\\begin\{([a-z*]+)\}", token):
                stack.append((begun[1], 0))
            elif ended := re.match(r"\\end\{([a-z*]+)\}", token):
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
                or (token == "&" and (not stack or not stack[-1][0].startswith("tabular")))
            ):
                problems.append(f"bare {token}: {line}")
            elif not token.isascii() and not re.fullmatch(
                r"[\x20-\x7eà-ÿÀ-ßœčćłńřšśžźŒČĆŁŃŘŠŚŽŹ]+", token
            ):
                problems.append(f"not in the fonts: {token}")
        problems += [f"open at the end of its line: {line}"] * (depth != 0 or in_math)
        if stack and stack[-1][0].startswith("tabular") and line.endswith(r"\\"):
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


# ---- what LaTeX itself says

LONG = "gn-ws with weight_standardization/and=a:very.long.name_that_no_column_has"


def wide():
    """Long names of cells, groups, levels and runs: nothing of it may leave the column."""
    cells = {
        cell(
            f"{LONG} {place}",
            f"{LONG}{group} on digits",
            overrides=f"'model.activation={{name: {'x' * 60}}}'",
            levels=(("model.norm", LONG), ("lr", "low")),
            is_base=place == 0,
            published=78.1,
            published_source=LONG,
        ): {0: 90.0 + place, 1: 91.5 + 2 * place, 2: 30.0}
        for group in range(2)
        for place in range(3)
    }
    return table_of(
        cells, **{one.name: {"commit": str(7**place * 10**30)} for place, one in enumerate(cells)}
    )


def full_design():
    """Two factors of two levels, three seeds each."""
    cells = {
        cell(f"{loss}, {mix}", "digits", levels=(("loss", loss), ("mixing", mix)), is_base=i == 0):
        {seed: 90.0 + 2 * i + seed * (1 + i % 2) for seed in range(3)}
        for i, (loss, mix) in enumerate((a, b) for a in ("BCE", "CE") for b in ("Mixup", "none"))
    }  # fmt: skip
    return table_of(cells)


def overfull(texts, folder) -> list[str]:
    """What LaTeX says of tables in a column of 5.5 inches: boxes that are too wide, errors."""
    document = [
        r"\documentclass{article}",
        r"\usepackage{booktabs,tabularx}",
        r"\usepackage[textwidth=5.5in]{geometry}",
        r"\begin{document}",
    ]
    for number, text in enumerate(texts):
        (folder / f"table{number}.tex").write_text(text)
        document.append(rf"\input{{table{number}}}\clearpage")
    (folder / "paper.tex").write_text("\n".join([*document, r"\end{document}"]))
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=120)
    log = (folder / "paper.log").read_text(errors="replace")
    problems = re.findall(r"^(?:Overfull \\hbox|!).*", log, re.M)
    return problems + [f"exit {done.returncode}"] * (done.returncode != 0)


needs_latex = pytest.mark.skipif(
    shutil.which("pdflatex") is None,
    reason="no LaTeX here: apt-get install texlive-latex-recommended",
)


@needs_latex
def test_no_table_is_wider_than_a_papers_column(tmp_path):
    views = [make_view(table) for table in (every_case(), one_seed(), study(), wide())]
    asked = (
        "cell set marks n group loss",
        "n mean difference p",
        "group cell model.norm lr set",
        "n",
    )
    tables = (every_case(), study(), wide(), wide())
    views += [make_view(table, columns=names) for table, names in zip(tables, asked, strict=True)]
    assert overfull(map(as_latex, views), tmp_path) == []


@needs_latex
def test_no_committed_table_is_wider_than_a_papers_column(tmp_path):
    texts = [path.read_text() for path in sorted((ROOT / "results").glob("*.tex"))]
    assert texts and overfull(texts, tmp_path) == []


@needs_latex
def test_a_box_that_is_too_wide_would_be_seen(tmp_path):
    wide_row = " & ".join(["0.123456789"] * 9)
    text = rf"\begin{{tabular}}{{{'r' * 9}}}{wide_row}\end{{tabular}}"
    assert len(overfull([text], tmp_path)) == 1


def test_notes_are_about_columns_that_are_shown():
    whole, some = (as_latex(make_view(every_case(), columns=names)) for names in ("", "cell mean"))
    for word in ("Differences are", "Seeds needed", "Published"):
        assert word in whole and word not in some
    assert "Top-1" in some


def test_one_seed_is_said_to_be_one_in_print():
    base, other = cell("BCE", is_base=True), cell("CE")
    one, two = (
        as_latex(make_view(table_of({base: {0: 90.0, **more}, other: {0: 93.0, **more}})))
        for more in ({}, {1: 91.5})
    )
    printed = [line for line in one.splitlines() if not line.startswith("%")]
    assert any("no interval" in line for line in printed) and "no interval" not in two


def test_times_that_compare_nothing_are_no_columns_unless_asked_for():
    busy = {"load_per_core": 2.0, "step_s": 1.0}
    names = cell("base", is_base=True), cell("other")
    table = table_of({one: {0: 90.0, 1: 91.0} for one in names}, (0, 1), base=busy, other=busy)

    def shown(columns=""):
        lines = as_latex(make_view(table, columns=columns)).splitlines()
        return "\n".join(line for line in lines if not line.startswith("%"))

    assert "images/s" not in shown() and "compare nothing" not in shown() and "MiB" in shown()
    assert "images/s" in shown("cell images_per_s") and "compare nothing" in shown(
        "cell images_per_s"
    )


def test_a_dash_and_a_quote_stay_what_they_are_while_two_hyphens_become_no_dash():
    assert "-" not in latex_text("58–73 — “so”") and "'" not in latex_text("“so”")
    assert "--" not in latex_text("58--73") and "''" not in latex_text("''")


def test_the_float_holds_effects_and_short_notes_and_the_rest_are_comments():
    table = full_design()
    page = as_latex(make_view(table))
    shown = "\n".join(line for line in page.splitlines() if not line.startswith("%"))
    notes = shown.split(r"\raggedright" + "\n")[-1]
    assert table.effects and "Main effects and interactions" in shown
    for effect in table.effects:
        assert latex_text(effect.factors) in shown
    assert len(notes.split()) < 80 and len(page.split()) > len(shown.split()) + 80
    assert latex_problems(page) == []


@needs_latex
def test_a_table_with_effects_is_no_wider_than_a_papers_column(tmp_path):
    assert overfull([as_latex(make_view(full_design()))], tmp_path) == []
