"""The report in a real Chromium: silent, alone, sorted and searched by mouse and by keys, readable
everywhere.
"""

import json
import os
import time
from pathlib import Path

import pytest

from support.browser import Browser, chromium
from support.reported import HOSTILE, curves_of, hostile, large, study
from trainer.report.html import as_html


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports as files, by name."""
    folder = tmp_path_factory.mktemp("reports")
    for name, table in (("study", study()), ("hostile", hostile())):
        (folder / f"{name}.html").write_text(as_html(table, curves_of(table)))
    return {path.stem: path for path in folder.iterdir()}


def names(tab, table=0):
    """The cells' names as they are shown, of one of the page's sortable tables."""
    rows = f"Array.from(document.querySelectorAll('table[data-table]')[{table}].tBodies[0].rows)"
    return tab.js(
        f"{rows}.filter((row) => row.getClientRects().length).map((row) => (row.querySelector('th"
        " bdi') || row.querySelector('th')).textContent.split(' (')[0])"
    )


RUNS = 4  # the number of the table of runs: after those of results and costs, of two groups


def open_folded(tab):
    tab.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")


HEADER = "table[data-table] th:nth-child(4)"  # top-1 of the first table


@pytest.mark.parametrize("name", ["study", "hostile"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_logs_nothing_and_requests_nothing(browser, pages, name, dark):
    with browser.open(pages[name], dark=dark) as tab:
        assert tab.requests == [pages[name].resolve().as_uri()]
        assert tab.errors == []
        assert tab.js("typeof window.hacked") == "undefined"
        dark_ground = "rgb(20, 23, 28)"
        assert (tab.js("getComputedStyle(document.body).backgroundColor") == dark_ground) is dark
        if name == "hostile":
            shown = tab.js(
                "Array.from(document.querySelectorAll('table[data-table=results] tbody th > bdi'),"
                " (one) => one.textContent)"
            )
            assert shown == [text.replace("\r", "") for text in HOSTILE]


def test_a_request_would_be_seen_and_is_forbidden(browser, pages, tmp_path):
    """What the two tests above rely on: that an error is an error here, and that the policy holds."""
    text = (
        pages["study"]
        .read_text()
        .replace(
            "<main>", '<img src="http://127.0.0.1:9/a.png"><script>window.hacked = 1</script><main>'
        )
    )
    (tmp_path / "other.html").write_text(text)
    with browser.open(tmp_path / "other.html") as tab:
        assert tab.js("typeof window.hacked") == "undefined"
        assert sum("Content Security Policy" in error for error in tab.errors) >= 2


def test_a_click_on_a_heading_sorts(browser, pages):
    with browser.open(pages["study"]) as tab:
        page_order = ["BCE", "CE", "sum", "focal", "none"]
        assert names(tab) == page_order
        seen = []
        for _ in range(3):
            tab.click(f"{HEADER} button")
            seen.append(
                (
                    names(tab),
                    tab.js(f"document.querySelector('{HEADER}').getAttribute('aria-sort')"),
                    tab.js("document.querySelector('[data-count=results]').textContent"),
                )
            )
        assert seen == [
            (["focal", "BCE", "sum", "CE", "none"], "ascending", "sorted by top-1 %, ascending"),
            (
                ["CE", "sum", "BCE", "focal", "none"],
                "descending",
                "sorted by top-1 %, descending",
            ),  # no value: last in both
            (page_order, None, "in the original order"),
        ]
        tab.click("table[data-table] th:nth-child(2) button")
        assert (
            names(tab) == ["BCE", "CE", "focal", "none", "sum"]
            and names(tab, table=1) == page_order
        )
        tab.click(f"{HEADER} button")
        assert tab.js("document.querySelectorAll('[aria-sort]').length") == 1
        assert tab.errors == []


def test_keys_alone_reach_the_results_sort_and_search_them(browser, pages):
    with browser.open(pages["study"]) as tab:
        tab.press("Tab")
        assert tab.js("document.activeElement.className") == "skip"
        assert tab.js("document.activeElement.getBoundingClientRect().left") >= 0, (
            "the skip link is seen when it has the focus"
        )
        tab.press("Enter")
        assert tab.js("document.activeElement.id") == "results"
        tab.press("Tab")
        assert tab.js("document.activeElement.id") == "search-results"
        tab.write("Resnet18 seed")
        assert (names(tab), names(tab, table=1)) == (
            ["sum", "focal"],
            [],
        )  # seeds stand in the marks
        assert (
            tab.js("document.querySelector('[data-count=results]').textContent") == "2 of 10 shown"
        )
        for _ in range(5):  # the table's own region, then number, cell, n, top-1
            tab.press("Tab")
        assert tab.js("document.activeElement.textContent") == "top-1 %"
        assert tab.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.press("Enter")
        assert names(tab) == ["focal", "sum"]
        tab.press("Space")
        assert names(tab) == ["sum", "focal"]


def test_runs_are_searched_by_anything_in_their_row(browser, pages):
    with browser.open(pages["study"]) as tab:
        tab.js("location.hash = '#runs'")  # a link to a folded part opens it
        tab.js("new Promise((done) => setTimeout(done, 50))")
        assert tab.js("document.querySelector('#runs details').open")
        tab.js("document.getElementById('search-runs').focus()")
        tab.write("out of memory")
        assert (
            names(tab, table=RUNS) == ["focal"]
            and tab.js("document.querySelector('[data-count=runs]').textContent") == "1 of 30 shown"
        )
        tab.write(" and nothing else")
        assert names(tab, table=RUNS) == []


def test_the_theme_is_switched_and_named(browser, pages):
    with browser.open(pages["study"]) as tab:
        ground = "getComputedStyle(document.body).backgroundColor"
        seen = []
        for _ in range(3):
            seen.append((tab.js("document.getElementById('theme').textContent"), tab.js(ground)))
            tab.click("#theme")
        light, dark = (("Dark colours", "rgb(255, 255, 255)"), ("Light colours", "rgb(20, 23, 28)"))
        assert seen == [light, dark, light]


def test_a_point_has_its_cell_as_tooltip(browser, pages):
    with browser.open(pages["study"]) as tab:
        assert tab.js("document.getElementById('tip').hidden")
        tab.click("#costs .point.front[data-tip]")
        assert tab.js("document.getElementById('tip').checkVisibility()")
        assert tab.js("document.getElementById('tip').textContent") in (
            "BCE (resnet18): 91.00 ± 1.00, 50 s",
            "CE (resnet18): 94.07 ± 1.05, 57 s",
        )


def test_without_script_the_report_is_complete(browser, pages):
    with browser.open(pages["study"], script=False) as tab:
        assert names(tab) == ["BCE", "CE", "sum", "focal", "none"]
        assert tab.js("document.querySelector('.controls').checkVisibility()") is False
        assert (
            tab.js("document.querySelectorAll('table button').length") == 0
            and tab.js("document.getElementById('theme').checkVisibility()") is False
        )
        assert tab.js("document.querySelectorAll('polyline.mean').length") == 14
        assert tab.errors == []


def test_a_curve_tells_its_values_where_the_pointer_is(browser, pages):
    with browser.open(pages["study"]) as tab:
        tab.click("#curves svg[data-hover] polyline[data-values]")
        assert tab.js("document.getElementById('tip').checkVisibility()")
        name, _, rest = tab.js("document.getElementById('tip').textContent").partition(": ")
        line = f"document.querySelector('#curves polyline[data-name=\"{name}\"]').dataset.values"
        found = [
            f"{mean} ({low} to {high}) at epoch {epoch}"
            if low != high
            else f"{mean} at epoch {epoch}"
            for epoch, mean, low, high in (part.split(" ") for part in tab.js(line).split(";"))
        ]
        assert rest in found


COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("*.html"))


@pytest.mark.parametrize(
    "path", [None, *COMMITTED], ids=lambda path: path.stem if path else "study"
)
def test_the_runs_fit_a_window_of_1280_pixels(browser, pages, path):
    with browser.open(path or pages["study"]) as tab:
        open_folded(tab)
        box = "document.querySelector('#runs .scroll')"
        assert tab.js(f"{box}.scrollWidth - {box}.clientWidth") <= 0


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_committed_page_is_wider_than_a_phone(browser, path):
    with browser.open(path, width_px=390) as tab:
        open_folded(tab)
        assert tab.js("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("width_px", [360, 390, 900, 1280, 1920])
def test_no_page_is_wider_than_its_window_and_no_text_too_small(browser, pages, width_px):
    with browser.open(pages["study"], width_px=width_px) as tab:
        open_folded(tab)
        assert tab.js("document.documentElement.scrollWidth") == width_px
        smallest_px = """Math.min(...Array.from(document.querySelectorAll('svg text'), (text) => {
            const matrix = text.getScreenCTM();
            return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
        }))"""
        assert tab.js(smallest_px) >= 9
        plots = tab.js(
            "Array.from(document.querySelectorAll('.forest .plot'), (one) =>"
            " Math.round(one.getBoundingClientRect().width))"
        )
        assert max(plots) - min(plots) <= 1 and min(plots) > 0.4 * min(width_px, 1280), (
            "ticks stand over the lines they belong to"
        )


@pytest.mark.parametrize("width_px", [360, 1280])
def test_a_screen_reader_finds_named_tables_and_how_they_are_sorted(browser, pages, width_px):
    with browser.open(pages["study"], width_px=width_px) as tab:
        open_folded(tab)
        tab.click(f"{HEADER} button")
        nodes = tab("Accessibility.getFullAXTree")["nodes"]
        found = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]
        tables = [name for role, name in found if role == "table"]
        assert {"resnet18 on digits", "What each cell changes"} <= set(tables) and tables.count(
            ""
        ) == 1  # the one in the notes has no caption
        assert sum(name.startswith("Difference to BCE") for name in tables) == 2
        assert ("columnheader", "top-1 %") in found and ("rowheader", "BCE (resnet18)") in found
        pictures = [name for role, name in found if role == "image"]
        assert (
            len(set(pictures)) == 16 + 4
            and "Top-1 of val by epoch: resnet18 on digits 1 BCE (resnet18) 3 seeds" in pictures
        )
        assert ("searchbox", "Show cells with") in found and ("status", "") in found
        assert tab.js(f"document.querySelector('{HEADER}').ariaSort") == "ascending"


def test_a_printed_page_is_light_whole_and_without_controls(browser, pages):
    with browser.open(pages["study"], dark=True, print_media=True) as tab:
        assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for selector in ("nav", ".controls", "#theme"):
            assert tab.js(f"document.querySelector('{selector}').checkVisibility()") is False
        assert (
            tab.js(
                "Array.from(document.querySelectorAll('.scroll'), (one) =>"
                " getComputedStyle(one).overflowX)[0]"
            )
            == "visible"
        )
        heights = tab.js(
            "Array.from(document.querySelectorAll('details'), (one) => one.offsetHeight"
            " - one.querySelector('summary').offsetHeight)"
        )
        assert len(heights) > 5 and min(heights) > 10, "what is folded on the screen is printed"


def test_2000_rows_are_one_page_of_bounded_size(browser, tmp_path):
    table = large()
    started_s = time.monotonic()
    text = as_html(table, {})
    rendered_s = time.monotonic() - started_s
    path = tmp_path / "large.html"
    path.write_text(text)
    assert sum(len(one.rows) for one in table.cells) == 2000
    assert len(text.encode()) < 2.5 * 2**20
    with browser.open(path) as tab:
        open_folded(tab)
        timing = json.loads(tab.js("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
        assert (
            tab.js("document.querySelectorAll('table[data-table=runs] > tbody > tr').length")
            == 2000
        )
        assert tab.js("document.querySelectorAll('*').length") < 45_000
        sort_ms = tab.js(
            "(() => { const start = performance.now();"
            " document.querySelector('table[data-table=runs] th:nth-child(4) button').click();"
            " document.body.offsetHeight; return performance.now() - start; })()"
        )
        assert names(tab, table=2)[:1] == tab.js(
            "[document.querySelector('table[data-table=runs] tbody th').textContent]"
        )
        assert tab.errors == []
    print(
        f"2000 rows: {len(text.encode()) / 2**20:.2f} MiB, rendered in {rendered_s:.2f} s, open"
        f" after {timing['loadEventEnd']:.0f} ms, sorted in {sort_ms:.0f} ms"
    )


def test_where_no_chromium_is_the_test_is_skipped_and_ci_fails(monkeypatch):
    monkeypatch.setattr("support.browser.shutil.which", lambda name: None)
    monkeypatch.delitem(os.environ, "RSB_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium here: apt-get install"):
        chromium()
    monkeypatch.setenv("RSB_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium here: apt-get install"):
        chromium()
