"""An ablation's rows for TensorBoard's HParams plugin, one event file per row.

torch's SummaryWriter.add_hparams writes the current time into its files; here all times are those
of the rows, so that the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.base.disk import write_atomically
from trainer.report.tables import CellSummary, Table
from trainer.runs.results import Row

_METRICS = {
    "top1_pct": "top-1 %",
    "top5_pct": "top-5 %",
    "loss_nats": "loss, nats",
    "train_s": "training time, s",
    "peak_mem_mib": "peak memory, MiB",
}


_FILE = "events.out.tfevents.row"


def hparams_folder(runs: Path, name: str) -> Path:
    """Where the rows go whose run folders are not here."""
    return runs / "ablations" / name


def write_hparams(table: Table, runs: Path) -> int:
    """Write every row of a table for `tensorboard --logdir <runs>`; returns their number.

    A row goes into its own run folder, where it is on this machine, so that a run has its curves,
    its hyperparameters and its scores under one name. A row's hyperparameters are its cell, the
    levels of the factors, model, data and seed. Files of rows that the table no longer has are
    removed from the ablation's folder.
    """
    rows = [
        (summary, result.row, result.folder or hparams_folder(runs, table.name) / result.row.run)
        for summary in table.cells
        for result in summary.seeds
        if result.row
    ]
    current = {folder for _, _, folder in rows}
    for outdated in sorted(hparams_folder(runs, table.name).rglob(_FILE)):
        if outdated.parent not in current:
            outdated.unlink()
            outdated.parent.rmdir()
    for summary, row, folder in rows:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _FILE, _serialize(_row_events(summary, row)))
    if rows:
        path = hparams_folder(runs, table.name) / "events.out.tfevents.ablation"
        path.parent.mkdir(parents=True, exist_ok=True)
        experiment = _experiment_events([(summary, row) for summary, row, _ in rows])
        write_atomically(path, _serialize(experiment))
    return len(rows)


def _hyperparameters(summary: CellSummary, row: Row) -> dict[str, str | int]:
    """What the plugin groups and sorts by; a row's properties hide factors of the same name."""
    return {
        **dict(summary.cell.levels),
        "cell": summary.cell.name,
        "model": row.model,
        "data": row.data,
        "seed": row.seed,
    }


def _row_events(summary: CellSummary, row: Row) -> Iterator[Event]:
    """The plugin's protocol: session start with hyperparameters, metrics, session end."""
    end_s = _time_s(row)
    start = summary_v2.hparams_pb(
        _hyperparameters(summary, row), trial_id=row.run, start_time_secs=end_s - row.train_s
    )
    status = api_pb2.STATUS_SUCCESS if row.status == "finished" else api_pb2.STATUS_FAILURE
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end_s)
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    end = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(content),
        tensor=metadata.NULL_TENSOR,
    )
    yield Event(wall_time=end_s, file_version="brain.Event:2")
    yield Event(wall_time=end_s, summary=start)
    for name in _METRICS:
        if getattr(row, name) is not None:
            value = Summary.Value(tag=f"row/{name}", simple_value=getattr(row, name))
            yield Event(wall_time=end_s, step=row.steps, summary=Summary(value=[value]))
    yield Event(wall_time=end_s, summary=Summary(value=[end]))


def _experiment_events(rows: Sequence[tuple[CellSummary, Row]]) -> Iterator[Event]:
    """The event that declares all hyperparameters and metrics."""
    names = dict.fromkeys(name for summary, row in rows for name in _hyperparameters(summary, row))
    end_s = max(_time_s(row) for _, row in rows)
    parameters = [summary_v2.HParam(name) for name in names]
    metrics = [
        summary_v2.Metric(f"row/{name}", display_name=label) for name, label in _METRICS.items()
    ]
    yield Event(wall_time=end_s, file_version="brain.Event:2")
    declared = summary_v2.hparams_config_pb(parameters, metrics, time_created_secs=end_s)
    yield Event(wall_time=end_s, summary=declared)


def _time_s(row: Row) -> float:
    return datetime.fromisoformat(row.finished_utc.replace("Z", "+00:00")).timestamp()


def _serialize(events: Iterable[Event]) -> bytes:
    """Events in the format of an event file."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString(deterministic=True))
    return file.getvalue()
