"""Latencies as a table and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from trainer.base.disk import write_atomically
from trainer.inference.export.latency import Timing

_HEADER = ("engine", "threads", "batch", "median_ms", "p95_ms", "images_per_s", "rounds_ms")


def write_latencies(out: Path, timings: Sequence[Timing], title: str, facts: Sequence[str]) -> None:
    """Write <out>.md, .csv and .png. facts: lines on what was measured, and where. Raises
    OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows(map(_cells, timings))
    write_atomically(out.with_name(f"{out.name}.csv"), text.getvalue().encode())
    write_atomically(out.with_name(f"{out.name}.png"), _picture(timings, title))
    page = [
        f"# {title}",
        "",
        *facts,
        "",
        *table_head(),
        *map(table_line, timings),
        "",
        f"![{title}]({out.name}.png)",
    ]
    write_atomically(out.with_name(f"{out.name}.md"), ("\n".join(page) + "\n").encode())


def table_head() -> list[str]:
    """The first lines of a Markdown table of timings."""
    head = (
        "engine", "threads", "batch", "median ms", "95 % below, ms", "images/s",
        "medians of the rounds, ms",
    )  # fmt: skip
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]


def table_line(one: Timing) -> str:
    """A timing's line of that table."""
    return "| " + " | ".join(map(str, _cells(one))) + " |"


def _cells(one: Timing) -> tuple:
    low, high = one.spread_s
    return (
        one.engine,
        one.num_threads,
        one.batch_images,
        f"{1000 * one.median_s:.2f}",
        f"{1000 * one.p95_s:.2f}",
        f"{one.images_per_s:.1f}",
        f"{1000 * low:.2f} to {1000 * high:.2f}",
    )


def _picture(timings: Sequence[Timing], title: str) -> bytes:
    """A panel for each number of threads and batch: bars to the median, whiskers to p95."""
    panels: dict[tuple[int, int], list[Timing]] = {}
    for one in timings:
        panels.setdefault((one.num_threads, one.batch_images), []).append(one)
    most = max(map(len, panels.values()))
    figure = matplotlib.figure.Figure(
        figsize=(9, (0.9 + 0.32 * most) * ((len(panels) + 1) // 2) + 0.4), layout="constrained"
    )
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False).ravel()
    for axis, ((num_threads, batch), shown) in zip(axes, panels.items(), strict=False):
        names = [one.engine for one in shown]
        medians = [1000 * one.median_s for one in shown]
        above = [1000 * one.p95_s - median for one, median in zip(shown, medians, strict=True)]
        bars = axis.barh(names, medians, xerr=[[0] * len(shown), above], color="tab:blue")
        axis.bar_label(bars, [f" {one:.3g}" for one in medians], fontsize=8, label_type="center")
        axis.invert_yaxis()
        axis.set_title(f"batch {batch}, {num_threads} thread{'s' * (num_threads > 1)}", fontsize=10)
        axis.set_xlabel("ms, median; whisker: 95 % below")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
