"""`make bench gpu=1`, as far as a CPU can tell: turns within a time, the baseline, targets in words,
and all of it on a small model.
"""

import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.base.terminal import Terminal
from trainer.cli import bench_commands as bench_cli
from trainer.cli.bench_commands import _asked, measure_on_gpu
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.runs.job import Job, plan_of
from trainer.tools.bench import Rate, image_folder, photos
from trainer.tools.bench_gpu import (
    RUNS,
    Baseline,
    Measured,
    Memory,
    Turn,
    baseline_facts,
    bench_run,
    comparison_facts,
    in_rounds,
    optimizer_rates,
    step_baseline,
    targets_of,
)
from trainer.tools.bench_timm import TimmLoop

ROOT = Path(__file__).parents[2]
SMALL = "image.train_px=32 image.test_px=32 batch.images=8 batch.norm_images=4 mix.images=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    return image_folder(root / "data", photos(root / "photos", 4), 16, 4, num_classes=4)


# ---- turns


def test_loops_take_turns_the_last_one_first_in_every_second_round_and_end_in_time():
    now, called = [0.0], []

    def loop(name, seconds):
        def turn(bound_s):
            called.append((name, bound_s))
            now[0] += seconds
            return {name: Turn(seconds / 10, None)}

        return turn

    found = in_rounds([loop("ours", 10), loop("timm's", 20)], 8, 100.0, lambda: now[0])
    assert [name for name, _ in called] == [
        "ours",
        "timm's",
        "timm's",
        "ours",
        "ours",
        "timm's",
    ]  # a fourth round would end at 120 s
    assert {bound_s for _, bound_s in called} == {100 / 9}
    assert {name: len(turns) for name, turns in found.items()} == {"ours": 3, "timm's": 3}
    assert len(in_rounds([loop("ours", 10)], 8, -1.0, lambda: now[0])["ours"]) == 1
    assert len(in_rounds([loop("ours", 10)], 2, 1000.0, lambda: now[0])["ours"]) == 2


def test_memory_is_counted_on_a_gpu_alone():
    memory = Memory("cpu")
    memory.restart()
    assert memory.peak_mib() is None


# ---- the baseline


def test_the_baseline_of_a_step_is_what_it_must_compute_read_and_write(folder, tmp_path):
    plan = plan_of(Job("A2", "test_resnet", str(folder), None, 0, SMALL))
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    now = iter(range(10**6))
    rates = optimizer_rates(state, TimmLoop(plan, settings, folder), lambda: float(next(now)), 3.0)
    assert {name: (rate.num_images, set(rate.seconds)) for name, rate in rates.items()} == {
        "ours": (10, {1.0}),
        "timm's": (10, {1.0}),
    }
    baseline, weights = step_baseline(state), list(state.model.parameters())
    num_bytes = 4 * sum(weight.numel() for weight in weights)
    assert (baseline.weight_bytes, baseline.gradient_bytes, baseline.image_bytes) == (
        num_bytes,
        num_bytes,
        3 * 32 * 32,
    )
    assert baseline.state_bytes == 2 * num_bytes + 4 * len(
        weights
    )  # two moments, and the count of each weight's steps
    assert baseline.optimizer_bytes == 7 * num_bytes + 8 * len(weights)
    assert baseline.train_gflop == 6 * baseline.gmacs > 0


def measured(against="", whole=(2.0, 2.0, 2.1), ours_ms=1.5, peaks=(900.0, 1000.0)):
    """A step alone takes 1.9 s for 1900 images, one of timm's parts 3 s, its optimizer 4 ms."""
    rates = {
        "transfer": Rate((0.5,) * 3, 1000),
        "model": Rate((1.0,) * 3, 1000),
        "step": Rate((1.9,) * 3, 1900),
        "end to end": Rate(whole, 1900),
    }
    optimizer = {"ours": Rate((ours_ms / 100,) * 3, 10)}
    peak_mib = {"end to end": peaks[0]}
    if not against:
        rates["timm's parts"], optimizer["timm's"], peak_mib["timm's parts"] = (
            Rate((3.0,) * 3, 1900),
            Rate((0.04,) * 3, 10),
            peaks[1],
        )
    return Measured(
        "lamb", rates, optimizer, peak_mib, Baseline(4.0, 150_000, 100, 100, 200), against
    )


def test_what_is_achieved_of_the_baseline_is_a_quotient():
    facts = baseline_facts(measured())
    assert (facts["train_gflop_per_image"], facts["optimizer_bytes_per_step"]) == (24.0, 700)
    assert facts["tflop_per_s"] == {
        "model": 24.0,
        "step": 24.0,
        "end to end": 22.8,
        "timm's parts": 15.2,
    }
    assert facts["optimizer_gb_per_s"] == {
        "ours": pytest.approx(700 / 1.5e6, rel=1e-3),
        "timm's": pytest.approx(700 / 4e6, rel=1e-3),
    }
    assert facts["transfer_gb_per_s"] == 0.3


# ---- targets


def test_what_was_reached_is_said_with_what_was_found():
    found = measured()
    assert [(target.wanted, target.found, target.verdict) for target in targets_of(found)] == [
        (">= 95 %", "95.0 % (90.5 to 95.0, 3 turns)", "reached"),
        (">= 1.3", "1.50 (1.43 to 1.50, 3 turns)", "reached"),
        ("< 2 ms", "1.50 ms (timm's 4.00 ms)", "reached"),
        ("no more than timm's parts", "900 MiB (timm's 1,000 MiB)", "reached"),
    ]
    facts = comparison_facts(found)
    assert facts["x_timm"] == {"median": 1.5, "low": 1.429, "high": 1.5} and facts["num_turns"] == 3
    assert facts["optimizer_ms"]["timm's"]["median"] == 4.0 and facts["peak_mib"] == {
        "end to end": 900.0,
        "timm's parts": 1000.0,
    }


def test_what_was_missed_too():
    missed = measured(whole=(2.5, 2.5, 2.5), ours_ms=2.0, peaks=(1000.1, 1000.0))
    assert [target.verdict for target in targets_of(missed)] == ["missed"] * 4


def test_where_there_is_no_loop_of_timms_parts_that_is_said():
    found = measured(against="its loader reads folders of colour images")
    words = [(target.found, target.verdict) for target in targets_of(found)]
    assert words[1] == ("no such loop: its loader reads folders of colour images", "not measured")
    assert words[2] == ("1.50 ms", "reached") and words[3][1] == "not measured"
    facts = comparison_facts(found)
    assert facts["not_compared"] == found.against and "x_timm" not in facts


# ---- the whole, on a small model


def test_a_page_is_measured_beside_timms_parts_whatever_the_device(folder):
    """In no time at all: one round of everything, in a GPU's precision and memory format."""
    settings = replace(make_settings("cpu", "bf16", workers="1"), channels_last=True)
    plan = plan_of(Job("A2", "test_resnet", str(folder), None, 0, SMALL))
    threads = torch.get_num_threads()
    facts, found = bench_run(plan, settings, open_data(plan.profile, folder), folder, 2, 0.0)
    assert set(facts["parts"]) == {
        "decode",
        "augment",
        "model",
        "optimizer",
        "evaluation",
        "step",
        "end to end",
        "timm's parts",
    }
    assert all(
        part["num_rounds"] == 1 and part["images_per_s"] > 0 for part in facts["parts"].values()
    )
    assert (
        facts["peak_mib"] == {"end to end": None, "timm's parts": None} and facts["num_turns"] == 1
    )
    assert set(facts["baseline"]["tflop_per_s"]) == {"model", "step", "end to end", "timm's parts"}
    assert set(facts["optimizer_ms"]) == {"ours", "timm's"} and facts["optimizer"] == "lamb"
    targets = targets_of(found)
    assert facts["targets"] == [target.as_facts() for target in targets]
    assert targets[3].is_reached is None
    assert torch.get_num_threads() == threads and json.loads(json.dumps(facts)) == facts


def test_the_command_stores_and_prints_each_page_when_it_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cli, "MAX_BENCH_S", 0.0)
    printed = io.StringIO()
    monkeypatch.setattr(
        "trainer.cli.bench_commands.open_terminal",
        lambda width: Terminal(file=printed, width=width),
    )
    plans = [
        plan_of(Job(page, name, str(folder), None, 0, SMALL))
        for page, name in (("A2", "test_resnet"), ("convnext", "test_convnext"))
    ]
    stored = []
    monkeypatch.setattr(
        bench_cli,
        "_write",
        lambda results, settings, facts, write=bench_cli._write: (
            write(results, settings, facts),
            stored.append(len(facts["runs"])),
        ),
    )
    measure_on_gpu(
        plans,
        make_settings("cpu", workers="0"),
        open_data(plans[0].profile, folder),
        folder,
        2,
        tmp_path,
        0.0,
    )
    facts = json.loads((tmp_path / "bench" / "run-cpu.json").read_text())
    assert stored == [1, 2] and [run["model"] for run in facts["runs"]] == [
        "test_resnet",
        "test_convnext",
    ]
    assert (
        facts["benchmark"] == "run on a GPU"
        and facts["took_s"] > 0
        and facts["precision"] == "float32"
    )
    text = " ".join(printed.getvalue().split())
    for words in (
        "test_convnext by convnext.v2",
        "forward and backward",
        "TFLOP/s: model",
        "a step of adamw alone",
        ">= 1.3",
        "memory is counted on a GPU alone",
        "took",
    ):
        assert words in text, words


def test_data_that_timm_does_not_read_is_measured_without_it():
    plan = small_plan("A3")
    facts, found = bench_run(
        plan, make_settings("cpu", workers="0"), open_data(plan.profile, None), None, 2, 0.0
    )
    assert (
        "timm's parts" not in facts["parts"] and "folders of colour images" in facts["not_compared"]
    )
    assert set(facts["optimizer_ms"]) == {"ours"} and targets_of(found)[0].is_reached is not None


def test_on_a_gpu_both_pages_are_measured_unless_one_is_named(tmp_path):
    assert _asked("", "", True) == list(RUNS) == [("A2", "resnet50"), ("convnext", "convnext_tiny")]
    assert _asked("A1", "", True) == [("A1", "resnet50")] and _asked("", "resnet18", True) == [
        ("A2", "resnet18")
    ]
    assert _asked("", "", False) == [("A3", "resnet18")]


def test_its_photos_are_enough_for_both_pages_as_they_are(tmp_path):
    folder = bench_cli._folder(tmp_path, None, True)
    for page, name in RUNS:
        plan = plan_of(Job(page, name, str(folder)))
        assert (
            plan.recipe.image.train_px == 224
            and plan.profile.num_classes == 1000
            and plan.num_steps > 100
        )
        assert plan.recipe.batch.images == {"A2": 2048, "convnext": 4096}[page]


@pytest.mark.parametrize(
    ("words", "has_loader"), [([], True), (["gpu=0"], True), (["gpu=1"], False)]
)
def test_on_a_gpu_the_loader_by_itself_is_not_measured_after_it(words, has_loader):
    """All of make bench gpu=1 is to take less than eight minutes."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "bench", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=clean | {"gpu": "1"},
        timeout=60,
    )
    assert done.returncode == 0 and "trainer bench" in done.stdout, done.stderr
    assert ("bench_loader.py" in done.stdout) == has_loader


@pytest.mark.gpu_stub
def test_on_a_gpu_memory_and_the_transfer_are_measured(folder):
    plan = plan_of(Job("A2", "test_resnet", str(folder), None, 0, SMALL))
    facts, found = bench_run(
        plan, make_settings("cuda", workers="2"), open_data(plan.profile, folder), folder, 3, 20.0
    )
    assert found.peak_mib["end to end"] > 0 and found.peak_mib["timm's parts"] > 0
    assert (
        facts["baseline"]["transfer_gb_per_s"] > 0
        and facts["parts"]["transfer"]["images_per_s"] > 0
    )
    assert all(target.is_reached is not None for target in targets_of(found))
