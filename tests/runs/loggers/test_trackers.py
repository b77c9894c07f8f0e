"""Each tracker after a real run, stopped and resumed, as its own package reads it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from support.unwritable import at_steps, go
from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.runs.loggers import mlflow, tracker_process

NAMES = ("wandb", "mlflow", "trackio")
STEPS = [10, 14]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that all three were told of: stopped after 12 of its 14 steps, resumed to its end."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "WANDB_MODE",
            "WANDB_PROJECT",
            "MLFLOW_TRACKING_URI",
            "MLFLOW_EXPERIMENT_NAME",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(tracker_process, "STOP_S", 100.0)  # MLflow makes tables, on a busy machine
        with pytest.MonkeyPatch.context() as stopping:
            at_steps(stopping, {12: lambda run: os.kill(os.getpid(), signal.SIGTERM)})
            assert go(folder, track=",".join(NAMES))[0] == EXIT_STOPPED
        code, _, printed = go(folder, track=",".join(NAMES))
    assert code == EXIT_DONE and "failed" not in printed, printed
    return folder


@pytest.fixture(scope="module")
def row(folder) -> dict:
    return json.loads((run_folder_of(folder) / "row.json").read_text())


@pytest.fixture(scope="module")
def losses(folder) -> list[tuple[int, float]]:
    """(step, loss) as metrics.jsonl has them."""
    lines = (run_folder_of(folder) / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "loss_nats" in line]
    return [(line["step"], line["loss_nats"]) for line in found]


def run_folder_of(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("*/plan.json")
    return found.parent


def test_mlflow_has_one_run_with_every_point_once(folder, row, losses):
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rsb")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == row["run"] and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert [(point.step, point.value) for point in history] == losses
    assert len(client.get_metric_history(run.info.run_id, "val_average/top1_pct")) == 1
    assert run.data.metrics["row/top1_pct"] == row["top1_pct"]
    assert run.data.params["recipe.lr.peak"] == json.dumps(row["resolved_recipe"]["lr"]["peak"])
    assert run.data.params["deviations.batch.images"].endswith("-> 96 (set)")
    assert run.data.tags["status"] == "finished"
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"recipe.yaml", "plan.json", "first_batch.png", "row.json"}


@pytest.mark.parametrize("is_whole", [True, False])
def test_mlflows_page_says_what_it_needs(monkeypatch, is_whole):
    monkeypatch.setattr(mlflow, "find_spec", lambda name: object() if is_whole else None)
    line = mlflow.page_command("sqlite:////runs/mlflow.db")
    assert "ui --backend-store-uri sqlite:////runs/mlflow.db" in line
    assert ("pip install mlflow==" in line) != is_whole


def test_wandb_has_one_run_in_offline_files_with_every_point_once(folder, row, losses):
    files = sorted((folder / "runs").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one id
    records = [record for file in files for record in wandb_records(file)]
    points = [
        (int(line["_step"]), line["train/loss_nats"])
        for kind, line in records
        if kind == "history" and "train/loss_nats" in line
    ]
    assert points == losses
    configs = [line for kind, line in records if kind == "config"]
    assert configs[0]["recipe"]["lr"]["peak"] == row["resolved_recipe"]["lr"]["peak"]
    assert configs[0]["seed"] == row["seed"]
    (summary,) = [line for kind, line in records if kind == "summary" and "row" in line][-1:]
    assert summary["status"] == "finished" and summary["row"]["top1_pct"] == row["top1_pct"]
    assert [line["exit_code"] for kind, line in records if kind == "exit"] == [EXIT_STOPPED, 0]
    kept = {path.name for path in files[0].parent.glob("files/**/*") if path.is_file()}
    assert {"recipe.yaml", "plan.json"} <= kept
    assert list(files[0].parent.glob("files/media/images/view/first_batch_0_*.png"))


# a file of W&B's is LevelDB's log of its own messages:
# https://github.com/google/leveldb/blob/main/doc/log_format.md
_READ_WANDB = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def messages(data):
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a message, or its last part
            yield whole
            whole = b""

def values(items):
    found = {}
    for item in items:
        names = list(item.nested_key) or [item.key]
        place = found
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = json.loads(item.value_json)
    return found

for data in messages(open(sys.argv[1], "rb").read()):
    record = Record.FromString(data)
    kind = record.WhichOneof("record_type")
    if kind == "history":
        line = values(record.history.item)
    elif kind == "summary":
        line = values(record.summary.update)
    elif kind == "run":
        kind, line = "config", values(record.run.config.update)
    elif kind == "exit":
        line = {"exit_code": record.exit.exit_code}
    else:
        continue
    print(json.dumps([kind, line]))
"""


def wandb_records(file: Path) -> list:
    """[kind, values] of a file, read by wandb in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _READ_WANDB, str(file)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


_READ_TRACKIO = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage

runs = list(trackio.Api().runs("rsb"))
history = {run.id: SQLiteStorage.get_logs("rsb", run.name, run_id=run.id) for run in runs}
print(json.dumps([[run.name, run.config, history[run.id]] for run in runs]))
"""


def test_trackio_has_one_run_with_every_point_once(folder, row, losses):
    done = subprocess.run(
        [sys.executable, "-c", _READ_TRACKIO],
        env=os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    ((name, config, history),) = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith(row["run"])
    assert config["recipe"]["lr"]["peak"] == row["resolved_recipe"]["lr"]["peak"]
    points = [
        (line["step"], line["train/loss_nats"]) for line in history if "train/loss_nats" in line
    ]
    assert points == losses
    assert [line["row/top1_pct"] for line in history if "row/top1_pct" in line] == [row["top1_pct"]]
    assert list((folder / "trackio").rglob("*.png"))
