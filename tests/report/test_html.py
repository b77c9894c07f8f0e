"""The report of an ablation: one page that says what the table says, loads nothing, and lets no
text out of its place.
"""

import base64
import dataclasses
import hashlib
import itertools
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.committed import committed_root
from support.reported import HOSTILE, HOSTILE_NOTES, Page, curves_of, hostile, study
from support.tabled import cell, table_of
from trainer.ablation.spec import ablation_paths
from trainer.report.answer import answer
from trainer.report.curves import find_curves
from trainer.report.formats import cell_text, heading_of, shown_columns
from trainer.report.html import (
    ASSETS,
    as_html,
    cell_lines,
    cell_numbers,
    count_states,
    notes_html,
    result_entries,
    run_table,
    split_overrides,
    store_report,
)
from trainer.report.rows import open_table
from trainer.report.tables import METRICS
from trainer.report.view import make_view
from trainer.runs.results import store_row

RESULTS = committed_root() / "results"


@pytest.fixture(scope="module")
def text():
    table = study()
    return as_html(table, curves_of(table))


def test_the_report_has_all_that_the_table_has(text):
    table, page = study(), Page(text)
    shown_text = " ".join("".join(data for _, data in page.texts).replace("\xa0", " ").split())
    view = make_view(table)
    for column in shown_columns(view):
        assert heading_of(view, column) in shown_text or column == "marks"
        for one in table.cells:
            for part in (
                cell_text(view, one, column).split("; ")
                if column == "marks"
                else [cell_text(view, one, column)]
            ):
                assert part in shown_text, (one.cell.name, column)
    for one in table.cells:
        for result in one.seeds:
            assert not result.row or (
                result.row.run in shown_text and result.reproduce in shown_text
            )
    assert "RuntimeError: out of memory" in shown_text
    assert "10 cells × 3 seeds: 16 finished, 2 diverged, 1 failed, 11 no row." in shown_text


def test_the_exact_text_of_set_is_there_with_what_the_base_does_not_say_marked(text):
    own = re.findall(r'<b class="own">(.*?)</b>', text)
    assert (
        own.count("loss.name=ce") == 2
        and "&#39;loss={name: bce, reduction: sum}&#39;" in own
        and "epochs=10" not in own
    )
    assert re.search(r"<code>epochs=10 <b class=\"own\">loss.name=ce</b></code>", text)
    assert (
        "make recipe=A2 model=resnet18 data=digits seed=0 set=&#34;epochs=10 loss.name=ce&#34;"
        in text
    )


def test_rendering_twice_gives_the_same_bytes_and_tells_no_time(text):
    table = study()
    curves = dict(reversed(curves_of(table).items()))
    assert as_html(table, curves) == text


def test_the_page_is_whole_html_that_a_screen_reader_can_walk(text):
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set(attributes.get(name, ids[0]).split()) <= set(ids), attributes
        assert (
            not attributes.get("href", "#").startswith("#")
            or attributes.get("href", "#results")[1:] in ids
        )
    assert (
        page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == len(page.all("main")) == 1
    )
    assert all(
        attributes.get("scope") in ("col", "row") for attributes in _outside_notes(text).all("th")
    )
    tables = _outside_notes(text)
    assert len(tables.all("table")) == len(tables.all("caption")) == 8
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert (
        all(after - before <= 1 for before, after in itertools.pairwise(levels)) and levels[0] == 1
    )
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("role") == "img" or "overflow" in svg
    assert len([svg for svg in page.all("svg") if svg.get("role") == "img"]) == 2 * (3 + 4) + 4 + 2


def _outside_notes(text):
    return Page(re.sub(r'<div class="notes">.*?</div>', "", text, flags=re.S))


def test_every_row_of_a_table_has_a_cell_for_every_heading(text):
    for table in re.findall(r"<table.*?</table>", _outside_notes_text(text), re.S):
        widths = {
            len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr.*?</tr>", table, re.S)
        }
        assert len(widths) == 1, widths


def _outside_notes_text(text):
    return re.sub(r'<div class="notes">.*?</div>', "", text, flags=re.S)


def test_nothing_but_the_pages_own_style_and_script_is_allowed(text):
    page = Page(text)
    (policy,) = [
        one["content"]
        for one in page.all("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    ]
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert (
        policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    )
    assert all(
        not {"src", "srcset", "style", "data", "action"} & set(attributes)
        for _, attributes in page.elements
    )
    assert not [
        tag
        for tag, _ in page.elements
        if tag in ("link", "img", "iframe", "object", "base", "form", "use", "image")
    ]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)


def test_a_hostile_text_stays_a_text():
    table = hostile()
    text = as_html(table, curves_of(table))
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("title")) == 1
    assert not page.all("img")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert "javascript:" not in attributes.get("href", "").lower()
        assert not re.match(r"[a-z]+:", attributes.get("href", "")) or attributes[
            "href"
        ].startswith("http")
    named = [data for tag, data in page.texts if tag in ("bdi", "th", "td", "dd")]
    coded = [data for tag, data in page.texts if tag in ("code", "b")]
    for hostile_text in HOSTILE:
        assert hostile_text in named, "as it is, and set apart from the direction of its neighbours"
        assert any(hostile_text in one for one in coded)


def test_what_is_no_character_of_a_page_is_replaced():
    table = table_of({cell("base", is_base=True): {0: 90.0}}, seeds=(0,))
    text = as_html(dataclasses.replace(table, title="a\x00b\x1b[31m\ud800\r"), {})
    assert "a\ufffdb\ufffd[31m\ufffd\ufffd" in text
    assert not set(text) & set("\x00\x1b\r") and text.encode()


def test_notes_are_markdown_without_html_of_their_own():
    assert notes_html("## A\n\n**b** [c](https://example.org/?a=1&b=2)\n\n|x|\n|-|\n|1|\n") == (
        '<h3>A</h3>\n<p><strong>b</strong> <a href="https://example.org/?a=1&amp;b=2">c</a></p>\n'
        "<table>\n<thead>\n<tr>\n<th>x</th>\n</tr>\n</thead>\n<tbody>\n<tr>\n<td>1</td>\n</tr>\n</tbody>\n</table>\n"
    )
    page = Page(notes_html(HOSTILE_NOTES))
    assert {tag for tag, _ in page.elements} <= {"h2", "p", "a"}
    assert {one["href"] for one in page.all("a")} == {
        "http://example.org/b.png"
    }  # to be followed, not fetched


@pytest.mark.parametrize("metric", ["top5", "loss", "ema"])
def test_other_metrics_and_nearly_empty_tables_have_a_page_too(metric):
    base, other = cell("base", is_base=True), cell("other")
    for values in (
        {base: {}, other: {}},
        {base: {0: 90.0}, other: {}},
        {base: {0: None}},
        {base: {0: 90.0, 1: 90.0}, other: {0: 90.0, 1: 90.0}},
    ):
        table = table_of(values, metric=metric)
        page = Page(as_html(table, curves_of(table)))
        assert table.metric.heading in {data for _, data in page.texts}


def test_the_answer_comes_first_and_says_what_differs_beyond_chance(text):
    base, better = cell("base", is_base=True), cell("better")
    worse, same, alone = cell("worse"), cell("same"), cell("alone")
    table = table_of(
        {
            base: {0: 90.0, 1: 92.0, 2: 91.0},
            better: {0: 95.0, 1: 97.1, 2: 96.0},
            worse: {0: 80.0, 1: 82.1, 2: 81.0},
            same: {0: 91.0, 1: 91.5, 2: 91.0},
            alone: {0: 99.0},
        }
    )
    lines = answer(table)
    assert "alone (99.00" in lines[0]
    assert (
        lines[1].startswith("better") and "better (+5.03)" in lines[1] and "base (91.00" in lines[1]
    )
    assert lines[2].startswith("worse") and "worse (-9.97)" in lines[2] and "same" not in lines[2]
    assert "1 cell may be chance" in lines[3] and "1 cell without" in lines[4]
    ids = re.findall(r'<section id="(\w+)"', text)
    assert ids[:2] == ["answer", "results"]
    assert answer(table_of({base: {}}))[0] == "no run has a score yet."


@pytest.mark.parametrize("part", ["cells", "runs"])
def test_long_tables_are_folded(text, part):
    section = text[text.index(f'<section id="{part}"') :]
    assert section.index("<details>") < section.index("<table") < section.index("</details>")


def test_rows_of_another_store_are_linked_there(tmp_path):
    table = table_of({cell("base", is_base=True): {0: 90.0, 1: 91.0}}, seeds=(0, 1))
    first, second = table.cells[0].rows
    store_row(tmp_path / "a", first)
    store_row(tmp_path / "b c", second)
    store_report([tmp_path / "a", tmp_path / "b c"], table)
    page = Page((tmp_path / "a" / "norms.html").read_text())
    links = [one["href"] for one in page.all("a")]
    assert {f"rows/{first.run}.json", f"../b%20c/rows/{second.run}.json"} <= set(links)


def test_missing_curves_are_named(text):
    assert "No curves for 3 of the 18 rows: <bdi>A2.v1-resnet18-digits-s0-" in text
    assert "No curves for any of the 18 rows." in as_html(study(), {})
    assert "No run has a row yet." in as_html(table_of({cell("base", is_base=True): {}}), {})


def test_the_report_is_stored_beside_the_rows_and_renders_again_from_them_alone(tmp_path):
    table = study()
    assert [path.name for path in store_report(tmp_path, table)] == ["norms.html"]
    first = (tmp_path / "norms.html").read_bytes()
    store_report(tmp_path, table)
    assert (tmp_path / "norms.html").read_bytes() == first == as_html(table, {}).encode()
    assert store_report(tmp_path / "none", table_of({cell("base", is_base=True): {}})) == []
    assert not (tmp_path / "none").exists()


REPORTS = [path.stem for path in ablation_paths() if (RESULTS / f"{path.stem}.html").exists()]


@pytest.mark.parametrize("name", REPORTS)
def test_the_committed_reports_are_what_their_rows_render(name, tmp_path):
    """Without run folders and data sets, as on a fresh clone."""
    table = open_table(name, RESULTS, tmp_path, METRICS["top1"])
    found = as_html(table, find_curves(RESULTS, table))
    assert (RESULTS / f"{name}.html").read_text() == found, f"make table ablation={name}"


# ---- what stands in its tables


def test_numbers_are_sorted_by_their_value_and_what_is_absent_has_no_key():
    entries = result_entries(make_view(study()))
    mean = entries["CE (resnet18)"]["mean"]
    assert float(mean.key) == pytest.approx(94.0666667) and mean.text == "94.07 ± 1.05"
    absent = entries["none (resnet18)"]["mean"]
    assert (absent.text, absent.key, absent.is_absent, mean.is_absent) == (
        "no row",
        "",
        True,
        False,
    )
    base = entries["BCE (resnet18)"]["difference"]
    assert (base.text, base.key) == ("base", "")
    assert cell_numbers(study())["none (convnext_atto)"] == 10
    assert "marks" not in entries["CE (resnet18)"]


def test_an_override_is_a_cells_own_where_its_base_differs():
    lines = cell_lines(study())
    assert [[text for text, is_own in line.overrides if is_own] for line in lines[:3]] == [
        [], ["loss.name=ce"], ["'loss={name: bce, reduction: sum}'"],
    ]  # fmt: skip
    assert [line.left_out for line in lines[:3]] == [(), (), ("loss.name=bce",)]
    assert (
        lines[1].command
        == 'make recipe=A2 model=resnet18 data=digits seed=0 set="epochs=10 loss.name=ce"'
    )


@given(
    st.lists(
        st.sampled_from(
            ["epochs=1", "'a={b: c, d: e}'", "x=[1, 2]", 'y="p q"', "z='", "w=}", "", "]{"]
        )
    ).map(" ".join)
)
def test_pieces_joined_are_the_text(text):
    assert " ".join(split_overrides(text)) == text


def test_pieces_are_those_of_a_shell_where_no_bracket_is_bare():
    text = "epochs=1 'mix={name: mixup, alpha: 0.2}' lr.peak=0.1"
    assert [shlex.split(piece)[0] for piece in split_overrides(text)] == shlex.split(text)
    assert (
        split_overrides("a=[1, 2] b={c: d, e: f}") == ("a=[1, 2]", "b={c: d, e: f}")
        and split_overrides("") == ()
    )


def test_what_all_rows_share_is_listed_once_and_the_rest_in_columns():
    table = study()
    runs = run_table(table)
    common = dict(runs.common)
    assert (
        common["epochs"] == "10"
        and "fingerprint ffffffffffff" in common["data"]
        and common["precision"] == "float32"
    )
    assert runs.headings == ("model",) and len(runs.lines) == 30
    assert len(common) + len(runs.headings) == 21  # every fact, once
    first = runs.lines[0]
    assert first.facts == ("resnet18",) and first.address == f"rows/{first.result.row.run}.json"
    assert first.result.reproduce == f"make reproduce row={first.result.row.run}"
    failed = next(line for line in runs.lines if line.result.state == "failed")
    assert (failed.facts, failed.address, failed.score.is_absent) == (("",), "", True)


def test_one_row_alone_has_nothing_in_common_with_others():
    runs = run_table(table_of({cell("base", is_base=True): {0: 90.0}}, seeds=(0,)))
    assert runs.common == () and len(runs.headings) == 21
    assert run_table(table_of({cell("base", is_base=True): {}})).headings == ()


def test_an_address_stays_within_the_store():
    runs = run_table(
        table_of({cell("base", is_base=True): {0: 90.0}}, base={"run": "../../etc/passwd?#'"})
    )
    assert runs.lines[0].address == "rows/..%2F..%2Fetc%2Fpasswd%3F%23%27.json"


def test_runs_are_counted_by_state():
    assert count_states(study()) == (
        ("finished", 16),
        ("diverged", 2),
        ("failed", 1),
        ("no row", 11),
    )


# ---- colours


COLOURS = dict(
    re.findall(
        r"--([a-z-]+): light-dark\((#[0-9a-f]{6}, #[0-9a-f]{6})\)",
        (ASSETS / "style.css").read_text(),
    )
)


def contrast(a: str, b: str) -> float:
    """Of two colours. Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return sum(
            weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("front", "grounds", "least"),
    [
        ("text", ("ground", "raised", "warn-ground", "own-ground"), 4.5),
        ("quiet", ("ground", "raised"), 4.5),
        ("link", ("ground", "raised", "warn-ground"), 4.5),
        ("warn", ("ground", "raised", "warn-ground"), 4.5),
        ("main", ("ground", "raised"), 3),
        ("edge", ("ground",), 3),
    ],
)
def test_colours_have_the_contrast_that_readers_need(mode, front, grounds, least):
    for ground in grounds:
        assert (
            contrast(COLOURS[front].split(", ")[mode], COLOURS[ground].split(", ")[mode]) >= least
        )


def test_a_full_design_has_its_effects_on_the_page_and_others_have_no_such_section():
    cells = {
        cell(f"{a} {b}", levels=(("loss", a), ("mix", b)), is_base=a + b == "BCEon"): {
            seed: 90 + seed * len(a) + (a == "CE") * (b == "off") * (4 + seed) for seed in range(3)
        }
        for a in ("BCE", "CE")
        for b in ("on", "off")
    }
    page = as_html(table_of(cells), {})
    Page(page)
    assert 'id="factors"' in page and "(CE − BCE) at off − at on" in page
    assert "loss × mix" in page and 'id="factors"' not in as_html(study(), {})
