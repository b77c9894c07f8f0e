"""The command `ablate`: contradictions are refused, threads are chosen once, options arrive."""

import os
from pathlib import Path

import pytest

from support.commands import rsb
from trainer.ablation.start import shared_settings
from trainer.ablation.threads import set_num_threads


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["--on", "rays"], "on=rays", "ray"),
        (["--per-cell", "cpus=2"], "per_cell=cpus=2", "jobs="),
        (["--on", "ray", "--gpus", "2"], "gpus=2", "per_cell"),
        (["--device", "cuda:1"], "device=cuda:1", "CUDA_VISIBLE_DEVICES=1"),
        (["--device", "cpu", "--gpus", "1"], "gpus=1", "leave one"),
        (["--gpus", "100", "--ablation", "smoothing"], "gpus=100", "GPUs here"),
        (["--ablation", "smoothin"], "ablation=smoothin", "smoothing"),
        (["--results", "nosuch://x", "--ablation", "smoothing"], "results=nosuch://x", "fsspec"),
        (
            ["--on", "ray", "--per-cell", "cpu=2", "--ablation", "smoothing"],
            "per_cell=cpu=2",
            "cpus=4",
        ),
    ],
)
def test_an_error_is_one_line_with_the_value_and_a_remedy(
    tmp_path, words, found, remedy, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = words if "--ablation" in words else [*words, "--ablation", "smoothing"]
    if "--results" not in words:
        given = [*given, "--results", str(tmp_path / "results")]
    done = rsb("ablate", *given, "--runs", tmp_path / "runs")
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and found in line and remedy in line


def test_the_threads_are_a_jobs_share_of_the_cores_chosen_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.ablation.threads.num_cores", lambda: 8)
    for jobs, expected in ((2, "4"), (8, "4")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        set_num_threads(tmp_path, "losses", jobs)
        assert os.environ["OMP_NUM_THREADS"] == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # who sets it has chosen already
    set_num_threads(tmp_path, "losses", 2)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_folders_are_absolute_and_a_url_has_a_mirror(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = shared_settings(Path("runs"), "results", device="cpu")
    assert (
        here.runs == tmp_path / "runs" and here.results == tmp_path / "results" and here.url is None
    )
    far = shared_settings(Path("runs"), "memory://rows-of-a-test", device="cpu")
    assert far.url == "memory://rows-of-a-test" and far.results.is_relative_to(
        tmp_path / "runs" / "cells"
    )
