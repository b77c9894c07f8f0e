"""An ablation's rows for TensorBoard's HParams plugin: one event set for each row.

Times are the rows' own, so that the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

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


def hparams_folder(runs: Path, name: str) -> Path:
    return runs / "ablations" / name / "tensorboard"


def write_hparams(table: Table, folder: Path) -> int:
    """Write every row of a table under a folder, `tensorboard --logdir` of which shows them; gives how many.

    A row's hyperparameters are its cell, the levels of the factors, model, data and seed. What an earlier call wrote of
    a row that is gone is removed.
    """
    cells = [(one, row) for one in table.cells for row in one.rows]
    wanted = {row.run for _, row in cells}
    for old in sorted(folder.glob("*/events.out.tfevents.row")):
        if old.parent.name not in wanted:
            old.unlink()
            old.parent.rmdir()
    for one, row in cells:
        path = folder / row.run / "events.out.tfevents.row"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _file_of(_events(one, row)))
    if cells:
        write_atomically(folder / "events.out.tfevents.ablation", _file_of(_experiment(cells)))
    return len(cells)


def _values(one: CellSummary, row: Row) -> dict[str, str | int]:
    """What the plugin groups and sorts by; a factor cannot take the name of what every row has."""
    return {
        **dict(one.cell.levels),
        "cell": one.cell.name,
        "model": row.model,
        "data": row.data,
        "seed": row.seed,
    }


def _events(one: CellSummary, row: Row) -> Iterator:
    """A row's events: what it was, what came of it, how it ended."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2

    end_s = _time_s(row)
    start = summary_v2.hparams_pb(
        _values(one, row), trial_id=row.run, start_time_secs=end_s - row.train_s
    )
    status = api_pb2.STATUS_SUCCESS if row.status == "finished" else api_pb2.STATUS_FAILURE
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end_s)
    told = metadata.create_summary_metadata(
        plugin_data_pb2.HParamsPluginData(session_end_info=info)
    )
    end = Summary(
        value=[
            Summary.Value(
                tag=metadata.SESSION_END_INFO_TAG, metadata=told, tensor=metadata.NULL_TENSOR
            )
        ]
    )
    yield Event(wall_time=end_s, file_version="brain.Event:2")
    yield Event(wall_time=end_s, summary=start)
    for name in _METRICS:
        if getattr(row, name) is not None:
            value = Summary.Value(tag=f"row/{name}", simple_value=getattr(row, name))
            yield Event(wall_time=end_s, step=row.steps, summary=Summary(value=[value]))
    yield Event(wall_time=end_s, summary=end)


def _experiment(cells: Iterable[tuple[CellSummary, Row]]) -> Iterator:
    """The event that names hyperparameters and metrics."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import summary_v2

    cells = list(cells)
    names = dict.fromkeys(name for one, row in cells for name in _values(one, row))
    times_s = max(_time_s(row) for _, row in cells)
    parameters = [summary_v2.HParam(name) for name in names]
    metrics = [
        summary_v2.Metric(f"row/{name}", display_name=label) for name, label in _METRICS.items()
    ]
    yield Event(wall_time=times_s, file_version="brain.Event:2")
    yield Event(
        wall_time=times_s,
        summary=summary_v2.hparams_config_pb(parameters, metrics, time_created_secs=times_s),
    )


def _time_s(row: Row) -> float:
    return datetime.fromisoformat(row.finished_utc.replace("Z", "+00:00")).timestamp()


def _file_of(events: Iterable) -> bytes:
    """Events as a file of TensorBoard's holds them."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString(deterministic=True))
    return file.getvalue()
