"""MLflow: into mlflow.db beside the run folders, unless MLFLOW_TRACKING_URI says otherwise."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read where it is imported

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from trainer.runs.loggers.tracker import About, PackageTracker, tracker_command

_STATUSES = {
    "finished": "FINISHED",
    "diverged": "FAILED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
_MOST_PARAMS = 100  # in one call
_LONGEST_PARAM = 6000


class Mlflow(PackageTracker):
    """A run of MLflow. Experiment: MLFLOW_EXPERIMENT_NAME, or rsb; tags: ablation and cell."""

    def __init__(self, about: About, run_id: str | None) -> None:
        self._folder = Path(about.folder)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        runs = self._folder.parent
        uri = given or f"sqlite:///{runs / 'mlflow.db'}"
        with contextlib.nullcontext() if given else _alone(runs / ".mlflow.lock"):
            if not given:
                _make_tables(runs / "mlflow.db")
            self._client = MlflowClient(uri)
            if run_id is None:
                self.run_id = self._created(about, None if given else runs / "mlartifacts")
            else:
                self.run_id = run_id
                self._client.update_run(run_id, status="RUNNING")
        self.where = given or page_command(uri)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        self._client.set_tag(self.run_id, "status", status)
        if row:
            numbers = {f"row/{name}": value for name, value in row.items() if _is_number(value)}
            self.scalars(numbers, row["steps"])
            self._client.log_artifact(self.run_id, str(self._folder / "row.json"))
        self._client.set_terminated(self.run_id, _STATUSES[status])

    def _created(self, about: About, artifacts: Path | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rsb")
        found = self._client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(name, artifacts.as_uri() if artifacts else None)
        )
        groups = {"ablation": about.ablation, "cell": about.cell}
        tags = {name: value for name, value in groups.items() if value}
        run_id = self._client.create_run(experiment, run_name=about.run, tags=tags).info.run_id
        params = [Param(name, _text(value)) for name, value in _flat(about.config)]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])
        for file in about.files:
            self._client.log_artifact(run_id, str(self._folder / file))
        return run_id


open_tracker = Mlflow


def page_command(uri: str) -> str:
    """What shows a store's page here, and what it needs first, where mlflow-skinny alone is
    installed: that logs, and has no page.
    """
    shows = tracker_command("mlflow", "ui", "--backend-store-uri", uri)
    if find_spec("flask") is not None:
        return shows
    needs = f".venv/bin/python -m pip install mlflow=={mlflow.__version__}"
    return f"{shows} (which needs all of mlflow: {needs})"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time makes a new database, or the experiment in it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_tables(database: Path) -> None:
    """A new database gets its name once it is whole: MLflow takes seconds for its tables, and one
    that was killed meanwhile could never be opened again.
    """
    if not database.exists():
        part = database.with_name(f".{database.name}.{os.getpid()}.part")
        MlflowClient(f"sqlite:///{part}").search_experiments()
        part.replace(database)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted paths, of characters that MLflow takes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield re.sub(r"[^\w./: -]", "_", f"{prefix}{name}"), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_LONGEST_PARAM]
