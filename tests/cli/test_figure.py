"""make figure: files that a paper can take, of the right size; a mistake is one line and exit 2."""

import json
import re
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.commands import rsb
from support.studies import page, study  # noqa: F401  fixtures
from support.tabled import cell, table_of
from trainer.report.drawings import draw_costs, draw_effects

ROOT = Path(__file__).parents[2]


def figure(study, *words):
    page, results, runs = study
    return rsb("figure", "--ablation", page, "--results", results, "--runs", runs, *words)


def keep_curves(study):
    """Curves of all rows in their run folders."""
    for path in (study[1] / "rows").glob("*.json"):
        folder = study[2] / path.stem
        folder.mkdir(parents=True)
        (folder / "row.json").write_bytes(path.read_bytes())
        lines = [{"epoch": e / 2, "loss_nats": 2 / e} for e in range(1, 5)]
        lines += [{"epoch": e, "weights": "model", "top1_pct": 40.0 * e} for e in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def json_of(path) -> dict:
    return json.loads(path.read_text())


def svg_texts(path) -> list[str]:
    texts = ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


@pytest.mark.parametrize("what", ["effects", "curves", "cost"])
def test_a_figure_is_written_as_text_in_every_format_and_its_width(study, what):
    keep_curves(study)
    (path,) = (
        path for path in (study[1] / "rows").glob("*.json") if json_of(path)["top1_pct"] == 93.5
    )
    row = json_of(path)  # the only one of its cell: ten times as slow as the others
    path.write_text(json.dumps(row | {"train_s": 10 * row["train_s"], "peak_mem_mib": 9999.0}))
    done = figure(study, "--what", what, "--size", "5.5")
    assert done.exit_code == 0, done.output
    svg, pdf, png = (study[1] / f"two.{what}.{kind}" for kind in ("svg", "pdf", "png"))
    assert all(path.name in done.output for path in (svg, pdf, png))
    assert float(ET.parse(svg).getroot().get("width").removesuffix("pt")) == pytest.approx(396)
    assert {"BCE", "CE"} <= {part for text in svg_texts(svg) for part in re.split("[ ,]", text)}
    content = pdf.read_bytes()
    width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", content)[1])
    assert width == pytest.approx(396, abs=1) and b"/FontFile2" in content
    assert b"/Type3" not in content
    assert struct.unpack(">I", png.read_bytes()[16:20]) == (1650,)  # 5.5 inches of 300 dots


def test_a_legend_has_only_what_is_drawn(study):
    """A cell of one seed has no interval; nothing is significant and nothing beyond the axis."""
    assert figure(study, "--format", "svg").exit_code == 0
    texts = " ".join(svg_texts(study[1] / "two.effects.svg"))
    assert "no interval" in texts and "p <" not in texts and "p ≥" not in texts
    assert "beyond" not in texts


def all_texts(figure) -> list[str]:
    """The texts in a figure's panels and of its legends."""
    texts = [text for panel in figure.axes for text in panel.texts]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    return [text.get_text() for text in texts]


def hollow_marks(figure) -> int:
    """Marks with a white face in a figure's panels, whatever their shape."""
    return sum(
        line.get_marker() not in ("", "None", None) and line.get_markerfacecolor() == "white"
        for panel in figure.axes
        for line in panel.lines
    )


@pytest.mark.parametrize(
    ("draw", "words", "times"), [(draw_effects, "n = 1", 2), (draw_costs, "hollow: one seed", 1)]
)
def test_a_mark_of_one_seed_is_hollow_and_words_say_so(draw, words, times):
    """Not as one whose spread is too small to see."""
    scores = {"base": [80, 81, 82], "three": [85, 86.5, 87], "one": [88], "another": [84]}
    values = {
        cell(name, is_base=name == "base"): dict(enumerate(map(float, each)))
        for name, each in scores.items()
    }
    facts = {name: {"train_s": 50.0 + 10 * place} for place, name in enumerate(scores)}
    figures = [
        draw(table_of(dict(list(values.items())[:number]), **facts), {}, 5.5) for number in (2, 4)
    ]
    without, with_ones = map(hollow_marks, figures)
    assert with_ones == without + 2
    assert [all_texts(figure).count(words) for figure in figures] == [0, times]


def test_a_front_of_one_cell_is_no_line_and_not_in_the_legend(study):
    for path in (study[1] / "rows").glob("*.json"):
        row = json_of(path)
        seconds = 1.0 if row["top1_pct"] == 93.5 else 100.0  # the best is the cheapest
        path.write_text(json.dumps(row | {"train_s": seconds}))
    assert figure(study, "--what", "cost", "--format", "svg").exit_code == 0
    assert "Pareto front" not in svg_texts(study[1] / "two.cost.svg")


def test_times_of_a_shared_machine_are_warned_of_and_have_no_front(study):
    for path in (study[1] / "rows").glob("*.json"):
        row = json_of(path)
        better = row["top1_pct"] == 93.5  # and dearer: a front, were it not for the machine
        times = {"train_s": 100.0 if better else 10.0, "load_per_core": 3.0}
        path.write_text(json.dumps(row | times))
    done = figure(study, "--what", "cost", "--format", "svg")
    assert done.exit_code == 0 and "warning: times compare nothing" in done.output, done.output
    texts = svg_texts(study[1] / "two.cost.svg")
    assert "Pareto front" not in texts and "training time, s" in texts


@pytest.mark.parametrize(
    ("what", "word"), [("effects", "bar"), ("curves", "band"), ("cost", "bar")]
)
def test_what_bars_and_bands_are_is_said_beside_the_file(study, what, word):
    keep_curves(study)
    for path in (study[1] / "rows").glob("*.json"):
        row = json_of(path)
        path.write_text(json.dumps(row | {"train_s": 1 + 100.0 * (row["top1_pct"] == 93.5)}))
    lines = figure(study, "--what", what, "--format", "svg").output.splitlines()
    assert len(lines) == 2 and word in lines[0] and lines[1].startswith("stored ")


def test_a_full_design_is_drawn_with_its_main_effects_and_interactions():
    """Against sums by hand: seeds 0 and 1 of two losses by two kinds of mixing."""
    scores = {("BCE", "on"): (90, 91), ("BCE", "off"): (92, 92), ("CE", "on"): (91, 93)}
    scores |= {("CE", "off"): (97, 99)}
    values = {
        cell(f"{a}, {b}", levels=(("loss", a), ("mix", b)), is_base=(a, b) == ("BCE", "on")): dict(
            enumerate(map(float, each))
        )
        for (a, b), each in scores.items()
    }
    figure = draw_effects(table_of(values, seeds=(0, 1)), {}, 5.5)
    cells, effects = figure.axes
    assert len(cells.get_yticklabels()) == 3
    names = [text.get_text().replace("\n", " ") for text in effects.get_yticklabels()]
    found = {
        names[round(line.get_ydata()[0])]: line.get_xdata()[0]
        for line in effects.lines
        if line.get_marker() == "o"
    }
    assert found == pytest.approx(
        {
            "loss: CE − BCE": 3.75,  # (1 + 5 + 2 + 7) / 4
            "mix: off − on": 3.75,  # (2 + 6 + 1 + 6) / 4
            "loss × mix: (CE − BCE) at off − at on": 4.5,  # ((5 - 1) + (7 - 2)) / 2
        }
    )


def test_an_arrow_beyond_the_axis_is_within_it_as_names_stand_outside():
    values = {cell("base", is_base=True): {0: 90.0, 1: 91.0, 2: 90.5}}
    values[cell("near")] = {0: 91.0, 1: 92.1, 2: 91.4}
    values[cell("wide")] = {0: 70.0, 1: 99.0, 2: 88.0}
    figure = draw_effects(table_of(values), {}, 5.5)
    figure.canvas.draw()
    (panel,) = figure.axes
    arrows = [line.get_window_extent() for line in panel.lines if line.get_marker() in ("<", ">")]
    assert len(arrows) == 2
    assert all(panel.bbox.x0 <= one.x0 and one.x1 <= panel.bbox.x1 for one in arrows)


def test_the_same_rows_are_the_same_figure(study):
    figure(study, "--what", "effects")
    paths = [study[1] / f"two.effects.{kind}" for kind in ("svg", "pdf", "png")]
    before = [path.read_bytes() for path in paths]
    figure(study, "--what", "effects")
    assert before == [path.read_bytes() for path in paths]


def test_out_and_format_say_where_and_how(study, tmp_path):
    assert figure(study, "--out", tmp_path / "a.pdf").exit_code == 0
    assert figure(study, "--format", "svg", "--out", tmp_path / "b").exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("[ab].*")) == ["a.pdf", "b.svg"]
    assert sorted(path.name for path in study[1].iterdir()) == ["rows"]


def test_curves_of_unlike_losses_have_axes_of_their_own_and_whole_epochs(study):
    keep_curves(study)
    assert figure(study, "--what", "curves", "--format", "svg").exit_code == 0
    texts = svg_texts(study[1] / "two.curves.svg")
    assert {"top-1 of val, %", "training loss (bce), nats", "training loss (ce), nats"} <= set(
        texts
    )
    assert texts.count("epoch") == 3
    assert texts[: texts.index("epoch")] == ["0", "1", "2"]  # x axis of the first panel


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["--what", "effect"], "what=effect", "effects"),
        (["--size", "200"], "size=200", "size=5.5"),
        (["--format", "jpg"], "format=jpg", "png"),
        (["--format", "svg", "--out", "a.pdf"], "out=a.pdf", "format="),
        (["--what", "curves"], "no row has curves", "runs="),
        (["--metric", "top3"], "metric=top3", "top1"),
        (["--results", "nothing1 nothing2"], "nothing1", "rows"),
    ],
)
def test_a_mistake_is_one_line(study, words, found, remedy):
    done = figure(study, *words)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and found in line and remedy in line


def test_without_an_ablation_it_says_so():
    assert "ablation=" in rsb("figure").stderr
