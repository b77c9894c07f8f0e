"""Whole commands on a GPU, whatever it computes."""

import json

import pytest

from support.commands import program, rsb

pytestmark = pytest.mark.gpu_stub


def words_of(folder, *words):
    """A short training, with its files in a folder."""
    short = "epochs=2 lr.warmup_epochs=1 batch.images=256 batch.norm_images=64"
    files = ["--runs", folder / "runs", "--results", folder / "results"]
    return ["train", *files, "--model", "test_resnet", "--set", short, *words]


def row_of(folder):
    return json.loads(next((folder / "results" / "rows").glob("*.json")).read_text())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_is_trained_evaluated_and_exported(workers, tmp_path):
    done = rsb(*words_of(tmp_path, "--recipe", "torchvision-v2", "--workers", workers))
    assert done.exit_code == 0, done.output
    row = row_of(tmp_path)
    assert row["device"] != "cpu" and row["precision"] == "bf16" and not row["bitwise"]
    assert row["peak_mem_mib"] > 10
    assert next((tmp_path / "runs").glob("*/model.safetensors")).stat().st_size > 1e5


@pytest.mark.gpu_stub(devices=2)
def test_two_ranks_train_one_run(tmp_path):
    done = program(*words_of(tmp_path, "--recipe", "A2", "--gpus", "2", "--workers", "0"))
    assert done.returncode == 0, done.stdout + done.stderr
    row = row_of(tmp_path)
    assert row["world_size"] == 2 and row["precision"] == "bf16"
