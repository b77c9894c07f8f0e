"""Curves that are kept beside the rows: taken from run folders, thinned, and only ever a row's own."""

import dataclasses
import json

import pytest

from support.tabled import cell, table_of
from trainer.base.errors import UserError
from trainer.report.curves import (
    MAX_POINTS,
    Curves,
    curves_path,
    find_curves,
    keep_curves,
    read_kept,
    thin,
)
from trainer.report.html import store_report


@pytest.fixture()
def table():
    return table_of({cell("base", is_base=True): {0: 90.0, 1: 92.0}}, seeds=(0, 1))


def with_folders(table, runs):
    """The table where the run folders are, with curves in them."""
    seeds = []
    for result in table.cells[0].seeds:
        folder = runs / result.row.run
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "epoch": step / 10, "loss_nats": 2.0 / step, "lr": 0.1}
            for step in range(1, 301)
        ]
        lines += [
            {"step": 300, "epoch": 30, "weights": result.row.scored, "top1_pct": result.value}
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "row.json").write_bytes(result.row.as_json())
        seeds.append(dataclasses.replace(result, folder=folder))
    return dataclasses.replace(
        table, cells=(dataclasses.replace(table.cells[0], seeds=tuple(seeds)),)
    )


def test_the_report_is_the_same_where_the_run_folders_are_gone(table, tmp_path):
    here = with_folders(table, tmp_path / "runs")
    paths = store_report(tmp_path, here)
    assert [path.name for path in paths] == ["norms.html", "norms.curves.jsonl"]
    stored = {path: path.read_bytes() for path in paths}
    assert b'<polyline class="mean"' in stored[paths[0]]
    store_report(tmp_path, table)
    assert stored == {path: path.read_bytes() for path in paths}
    assert len(stored[paths[1]]) < 12_000


def test_kept_curves_of_other_weights_or_of_a_row_that_is_gone_are_dropped(table, tmp_path):
    runs = [row.run for row in table.cells[0].rows]
    curves = {run: Curves(((1.0, 0.5),), ((1.0, 90.0),)) for run in runs}
    path = keep_curves(tmp_path, table, curves)
    assert find_curves(tmp_path, table) == curves
    lines = path.read_text().splitlines()
    path.write_text(
        lines[0].replace('"weights_sha256": ', '"weights_sha256": "of another run", "was": ')
        + "\n"
        + lines[1]
        + "\n"
    )
    assert list(find_curves(tmp_path, table)) == [sorted(runs)[1]]
    assert find_curves(tmp_path, table_of({cell("new", is_base=True): {0: 90.0}})) == {}
    assert (
        keep_curves(tmp_path, table, {}) is None
        and not path.exists()
        and read_kept(tmp_path, "norms") == {}
    )


def test_the_folder_of_another_run_of_the_same_name_is_not_this_rows(table, tmp_path):
    here = with_folders(table, tmp_path / "runs")
    first, second = here.cells[0].rows
    other = first.model_copy(update={"weights_sha256": "0" * 64})
    (tmp_path / "runs" / first.run / "row.json").write_bytes(other.as_json())
    (tmp_path / "runs" / second.run / "row.json").write_text("torn {")
    assert find_curves(tmp_path, here) == {}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"run": "a"}',
        '{"run": "a", "weights_sha256": null, "train_loss": [1], "val_top1": []}',
        "[]",
    ],
)
def test_a_damaged_file_is_refused_with_its_line(table, tmp_path, line):
    curves_path(tmp_path, "norms").write_text(line + "\n")
    with pytest.raises(UserError, match=r"norms\.curves\.jsonl:1: .*delete the file"):
        find_curves(tmp_path, table)


@pytest.mark.parametrize("num_points", [0, 1, 2, MAX_POINTS, MAX_POINTS + 1, 1000, 12_345])
def test_thinning_keeps_the_end_the_mean_and_few_points(num_points):
    points = tuple((float(place), float(place % 7)) for place in range(num_points))
    means, own = thin(points, is_mean=True), thin(points, is_mean=False)
    assert len(means) == len(own) <= MAX_POINTS and (num_points > MAX_POINTS or own == points)
    if num_points:
        assert means[-1][0] == own[-1][0] == points[-1][0] and set(own) <= set(points)
        stride = -(-num_points // MAX_POINTS)
        whole = [y for _, y in means[1:]]
        expected = [
            sum(y for _, y in points[end - stride : end]) / stride
            for end in range(num_points, 0, -stride)
        ][: len(whole)][::-1]
        assert whole == pytest.approx(expected, rel=1e-5)
