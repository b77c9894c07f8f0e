"""Timing engines in turns, and the table of it."""

import csv
import itertools
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from support.commands import rsb
from trainer.base.signals import Stopped
from trainer.inference.export import latency
from trainer.inference.export.latency import Timing, eager, measure


def test_a_timing_is_that_of_all_rounds():
    one = Timing("a", 1, 8, ((0.1, 0.3), (0.2, 0.4)))
    assert one.median_s == pytest.approx(0.25) and one.images_per_s == pytest.approx(32)
    assert one.spread_s == pytest.approx((0.2, 0.3))
    assert one.p95_s == pytest.approx(np.quantile([0.1, 0.2, 0.3, 0.4], 0.95))


def test_engines_take_turns_on_the_asked_threads_and_warm_up_is_not_counted():
    calls, threads = [], torch.get_num_threads()

    def opened(name, first_s):
        def of(num_threads):
            assert torch.get_num_threads() == num_threads
            left = [first_s]

            def run(images):
                calls.append((name, num_threads, len(images)))
                if left:
                    time.sleep(left.pop())

            return run

        return of

    engines = {"a": opened("a", 0.3), "b": opened("b", 0.0)}
    inputs = {1: np.zeros((1, 3, 2, 2)), 2: np.zeros((2, 3, 2, 2))}
    reported = []

    def measured(timing):
        reported.append(timing)
        assert calls[-1] == (timing.engine, timing.num_threads, timing.batch_images)

    found = measure(engines, inputs, [1, 2], 0.0, 2, measured=measured)
    assert reported == found
    assert [(one.num_threads, one.batch_images, one.engine) for one in found] == [
        (count, size, name) for count in (1, 2) for size in (1, 2) for name in "ab"
    ]
    assert all(one.median_s < 0.1 and len(one.rounds) == 2 for one in found)
    names = [name for name, count, size in calls if (count, size) == (1, 1)]
    changes = sum(a != b for a, b in itertools.pairwise(names))
    assert changes == 5  # a b for the warm-up, then a b a b
    assert torch.get_num_threads() == threads


def test_eager_is_the_models_answer():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(eager(model)(1)(images), expected)


def test_latency_writes_a_table_and_a_picture(tmp_path):
    weights = tmp_path / "model.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), weights)
    words = ["latency", "--model", "test_resnet", "--weights", weights, "--test-px", "32"]
    words += ["--batches", "1 2", "--threads", "1", "--seconds", "0", "--rounds", "2"]
    done = rsb(*words, "--compile", "0", "--out", tmp_path / "t")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert {row["engine"] for row in rows} == {"torch", "onnxruntime", "OpenVINO"}
    assert {(row["threads"], row["batch"]) for row in rows} == {("1", "1"), ("1", "2")}
    for row in rows:
        assert (
            0 < float(row["median_ms"]) <= float(row["p95_ms"]) and float(row["images_per_s"]) > 0
        )
    shown = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(shown) == 1 + len(rows) and "\x1b" not in done.output
    page = (tmp_path / "t.md").read_text()
    assert all(line in page.splitlines() for line in shown)
    assert "test_resnet" in page and all(row["median_ms"] in page for row in rows)
    assert len(Image.open(tmp_path / "t.png").getcolors(1 << 24)) > 10
    again = rsb(*words, "--out", tmp_path / "t")
    assert again.exit_code == 2 and "again=1" in again.stderr


@pytest.mark.parametrize(
    ("words", "found"), [(["--batches", "big"], "batches=big"), (["--threads", "0"], "threads=0")]
)
def test_what_latency_cannot_do_is_one_line(words, found):
    done = rsb("latency", "--model", "test_resnet", "--weights", "none", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and found in done.stderr


def test_what_was_measured_before_a_stop_has_been_shown(tmp_path, monkeypatch):
    timed = latency._timed

    def stopped_at_two(run, images, seconds):
        if len(images) == 2:
            raise Stopped("SIGTERM")
        return timed(run, images, seconds)

    monkeypatch.setattr(latency, "_timed", stopped_at_two)
    weights = tmp_path / "model.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), weights)
    words = ["latency", "--model", "test_resnet", "--weights", weights, "--test-px", "32"]
    words += ["--batches", "1 2", "--threads", "1", "--seconds", "0", "--rounds", "2"]
    done = rsb(*words, "--compile", "0", "--out", tmp_path / "t")
    assert done.exit_code == 75 and not (tmp_path / "t.md").exists()
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[2] for row in rows] == ["1"] * len(rows) and "| torch" in [row[0] for row in rows]
