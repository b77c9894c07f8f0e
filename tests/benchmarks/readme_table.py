"""The table of what was measured in results/README.md, from the files in results/bench.

python tests/benchmarks/readme_table.py writes it anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "results" / "bench"
PATH = ROOT / "results" / "README.md"
BEGIN, END = "<!-- what was measured -->\n", "<!-- end of it -->\n"


def table(bench: Path = BENCH) -> str:
    """Markdown."""
    head = ["| what | measured | beside | by |", "|---|---|---|---|"]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in _rows(bench)), ""])


def _rows(bench: Path) -> Iterator[tuple[str, str, str, str]]:
    yield from _loader_rows(*_facts(bench, "loader-224"))
    found, link = _facts(bench, "whole-runs")
    for one in sorted(found["records"], key=lambda one: (one["model"], -one["px"], one["workers"])):
        yield (
            f"a whole run from start to exit, {one['model']}, {one['px']} px, two epochs of"
            f" {one['train']} photos and their evaluation, workers={one['workers']}",
            f"{one['wall_s_ratio']:.2f} x the time, {one['mem_mib_ratio']:.2f} x the memory",
            f"{one['wall_s_timm']:.0f} s, {one['mem_mib_timm']:.0f} MiB, timm's train.py",
            link,
        )
    found, link = _facts(bench, "end-to-end")
    ours, theirs = (
        {row["who"]: row for row in found["rows"]}[who] for who in ("ours", "timm's parts")
    )
    measured = (
        f"{ours['images_per_s']:.0f} images/s, {found['ratio']:.2f} x; "
        f"waits for data {ours['wait_pct']:.1f} % of the time"
    )
    yield (
        f"a whole A3 loop, resnet18, {found['px']} px from JPEG files",
        measured,
        f"{theirs['images_per_s']:.0f} images/s, a loop of timm's parts",
        link,
    )
    found, link = _facts(bench, "optimizer-cpu")
    theirs, ours = found["step_ms"]["timm Lamb"], found["step_ms"]["our Lamb, clipping included"]
    yield (
        "a step of LAMB, resnet50's 161 tensors",
        f"{ours:.1f} ms, {theirs / ours:.2f} x",
        f"{theirs:.1f} ms, timm's Lamb",
        link,
    )
    found, link = _facts(bench, "ranks-cpu")
    yield (
        f"the means of several ranks, for one, {found['model']}",
        f"{found['cost_pct']:+.2f} % time",
        "a process by itself",
        link,
    )
    found, link = _facts(bench, "checkpoints-cpu")
    measured = (
        f"{found['most_pct']:.2f} % time, all cores busy "
        f"({found['extra_pct']['beside']:+.2f} % seen)"
    )
    yield (
        f"a checkpoint every {found['every_s']:g} s, {found['model']}, {found['mib']} MiB",
        measured,
        "none",
        link,
    )
    found, link = _facts(bench, "scale")
    measured = (
        f"order of an epoch {found['order_s']:.2f} s, {found['order_peak_mib']:.0f} MiB; "
        f"opening {found['opening_s']:.2f} s"
    )
    yield f"{found['num_images'] / 1e6:g} million images", measured, "", link
    found, link = _facts(bench, "run-cpu")
    yield (
        f"`make bench`: {found['model']}, {found['recipe']}, {found['train_px']} px",
        found["verdict"],
        "the step alone",
        link,
    )


def _loader_rows(found: dict, link: str) -> Iterator[tuple[str, str, str, str]]:
    rates = {(row["stage"], row["who"]): row for row in found["whole"]}
    timm = rates["ready for the model", "timm"]
    beside = (
        f"{timm['images_per_s']:.0f} images/s, timm's create_loader and Mixup, all of their work"
    )
    names = {
        "ours, loader=torch": "torch loader",
        "ours, loader=torch, without repeats": "the same, no image repeated",
        "ours, loader=torch (raw, 256 px)": "torch loader, from `make data format=raw side=256`",
        "ours, loader=ffcv (256 px, pixels)": "ffcv from a .beton of 256 px pixels",
    }
    photos = f"JPEG photos at {found['train_px']} px, A2, {found['num_workers']} processes"
    for stage in ("ready for the device", "ready for the model"):
        for who, name in names.items():
            row = rates[stage, who]
            measured = f"{row['images_per_s']:.0f} images/s, {row['x_timm']:.2f} x"
            yield (
                f"{photos}, {stage}: {name}",
                measured,
                beside,
                link,
            )


def _facts(bench: Path, name: str) -> tuple[dict, str]:
    shown = bench / f"{name}.md"
    path = shown if shown.exists() else bench / f"{name}.json"
    return json.loads((bench / f"{name}.json").read_text()), f"[{name}](bench/{path.name})"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    before, _, rest = PATH.read_text().partition(BEGIN)
    PATH.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
