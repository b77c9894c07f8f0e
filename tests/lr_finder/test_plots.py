"""The picture can be read: no label touches another or leaves the picture, and it shows what was
found.
"""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from support.found import found_of
from support.range_trials import drawn, network
from trainer.lr_finder.plots import WIDTH_PX, LossAxis, draw, marks
from trainer.lr_finder.rules import BaselineLosses

# where the marked values lie: apart, next to each other, on top of each other, at the ends of the
# axis
CASES = {
    "near": {"trial": drawn(network(best=0.05), 0.02), "own": 0.06},
    "at the left end": {
        "trial": drawn(network(best=0.05), 0.02),
        "own": 1.1e-6,
        "curve": "heldout",
    },
    "with floors": {"trial": drawn(network(best=0.3), 0.05), "baselines": BaselineLosses(2.0, 1.9)},
    "cut at the level": {
        "trial": drawn(network(best=0.3), 0.05),
        "baselines": BaselineLosses(2.0, 0.9),
        "own": 0.06,
    },
    "stuck at the level": {
        "trial": drawn(lambda value, seed: 0.693 if value < 1e-4 else 0.325, rate=0.4),
        "baselines": BaselineLosses(0.325, 0.325),
    },
    "less than a decade": {
        "trial": drawn(network(best=0.05), 0.02),
        "values": np.geomspace(0.02, 0.09, 60),
        "own": 0.03,
    },
    "no suggestion": {"trial": drawn(lambda value, seed: 2.3, 0.02)},
    "one seed, at the right end": {
        "trial": drawn(network(best=1e-3), 0.01),
        "num_seeds": 1,
        "own": 9.5,
    },
    "evenly spaced": {
        "trial": drawn(network(best=0.4, edge=2), 0.02),
        "values": np.linspace(0.01, 1, 60),
        "own": 0.9,
        "label": "optimizer.momentum",
    },
}


@pytest.fixture(params=CASES, scope="module")
def drawing(request):
    found = found_of(**CASES[request.param])
    return found, draw(found)


def beyond_the_ends(figure):
    """Labels of ticks outside the axes' range, which matplotlib holds but does not draw."""
    hidden = set()
    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {
            tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high
        }
    return hidden


def test_no_text_touches_another_or_leaves_the_picture(drawing):
    _, figure = drawing
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    assert width == WIDTH_PX
    texts = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()
    ]
    texts = [text for text in texts if text not in beyond_the_ends(figure)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        up = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 1 or up <= 1, (one, other)


def test_no_label_wants_a_font_of_mathematics(drawing):
    _, figure = drawing
    FigureCanvasAgg(figure).draw()
    assert not [text.get_text() for text in figure.findobj(Text) if "$" in text.get_text()]
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels(which="both")]
    assert all(float(label.replace("\N{MINUS SIGN}", "-")) >= 0 for label in labels if label)
    assert sum(map(bool, labels)) > 1


def test_a_rule_without_a_value_says_why_where_there_is_a_baseline():
    for case, is_said in (("stuck at the level", True), ("no suggestion", False)):
        shown = " ".join(text.get_text() for text in draw(found_of(**CASES[case])).findobj(Text))
        assert "no value" in shown and ("below the dotted baseline" in shown) == is_said


def test_letters_are_large_enough_at_900_px(drawing):
    _, figure = drawing
    sizes = [
        text.get_fontsize()
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    ]
    assert min(sizes) >= 8


def test_it_says_what_was_found_and_marks_it_in_every_panel(drawing):
    found, figure = drawing
    shown = " ".join(text.get_text() for text in figure.findobj(Text))
    value = found.suggestion.value
    assert ("no reliable suggestion" if value is None else f"recommended {value:.3g}") in shown
    for panel in figure.axes:
        lines = [
            line.get_xdata()[0]
            for line in panel.lines
            if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
        ]
        for marked in marks(found).values():
            assert marked in lines


def test_the_median_is_drawn_as_measured_far_above_the_start_and_the_cut_is_marked():
    """The two ramps end at 30 and 40 nats, their median at 35, within the axis."""

    def trial(seed, values, purpose):
        curve = drawn(network(best=0.05), 0.02)(seed, values, purpose)
        losses = curve.losses.copy()
        losses[-5:] = 30 + 10 * seed
        return replace(curve, losses=losses)

    found = found_of(trial, curve="train")
    figure = draw(found)
    panel = figure.axes[0]
    (median,) = [
        line for line in panel.lines if line.get_linewidth() == 2.4 and len(line.get_xdata()) > 2
    ]
    assert list(median.get_ydata()[-5:]) == [35] * 5 and panel.get_ylim()[1] > 35
    axis = LossAxis.of([median.get_ydata()])
    losses = np.array([0.5, 1.0, 2.0, 2.5, 5.0, 40.0])
    assert axis.loss_at(axis.place(losses)) == pytest.approx(losses)
    assert (
        axis.is_broken and 2.3 < axis.cut < 3.5 and 0 < axis.place(1.0) < 0.7 < axis.place(40) < 1
    )
    linear = [axis.place(loss + 0.1) - axis.place(loss) for loss in (0.6, 1.0, 2.0)]
    assert linear == pytest.approx([linear[0]] * 3), "the valley keeps its shape"
    shown = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "logarithmic" in shown and "rules count" in shown


def test_a_curve_that_never_explodes_has_a_plain_axis():
    axis = LossAxis.of([np.linspace(2.0, 1.0, 30)])
    assert not axis.is_broken and axis.place(axis.top) == 1 and axis.place(axis.low) == 0


def test_seeds_are_thin_and_their_median_is_thick(drawing):
    found, figure = drawing
    ramps = sum(curve.purpose == "ramp" for curve in found.suggestion.curves)
    widths = [line.get_linewidth() for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    kinds = 2 if found.asked["curve"] == "both" else 1
    assert widths.count(0.7) == kinds * ramps and widths.count(2.4) == kinds
    assert figure.axes[0].get_xscale() == (
        "linear" if found.scalar.label == "optimizer.momentum" else "log"
    )


def test_colours_are_told_apart_by_every_kind_of_colour_vision():
    """In Okabe and Ito's set, and of unlike lightness where lines lie over each other."""
    from matplotlib.colors import to_rgb

    from trainer.lr_finder.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION

    okabe_ito = {
        "#000000",
        "#E69F00",
        "#56B4E9",
        "#009E73",
        "#F0E442",
        "#0072B2",
        "#D55E00",
        "#CC79A7",
    }
    assert {BLUE, GREEN, ORANGE, PURPLE, VERMILLION} <= okabe_ito
    assert len(set(to_rgb(GREY))) == 1


def test_it_is_a_png_of_900_px_and_an_svg_with_text():
    figure = draw(found_of(**CASES["near"]))
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png")
    figure.savefig(svg, format="svg")
    assert Image.open(png).size[0] == WIDTH_PX
    assert b"<svg" in svg.getvalue()
