"""The rows in TensorBoard's HParams plugin, read back by TensorBoard itself."""

import dataclasses
import io

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from support.reported import study
from support.studies import study as cli_study  # noqa: F401  a fixture
from support.studies import table
from support.tabled import cell, table_of
from trainer.report.hparams import hparams_folder, write_hparams
from trainer.runs.loggers.logger import Log
from trainer.runs.results import read_row_file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    table = study()
    runs = tmp_path_factory.mktemp("runs")
    assert write_hparams(table, runs) == 18
    return table, runs


def answers(folder):
    """The experiment and its sessions, as the plugin's own code answers its page's requests."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import (
        api_pb2,
        backend_context,
        get_experiment,
        list_session_groups,
    )

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    asked = dict(request_context=RequestContext(), backend_context=context, experiment_id="e")
    experiment = get_experiment.Handler(**asked, request=api_pb2.GetExperimentRequest()).run()
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=[0, 1, 2, 3]
    )
    request.col_params.extend(
        [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    )
    return experiment, list_session_groups.Handler(**asked, request=request).run().session_groups


def test_tensorboard_finds_every_row_with_its_cell_and_scores(written):
    table, runs = written
    experiment, groups = answers(runs)
    assert {info.name for info in experiment.hparam_infos} == {
        "loss",
        "lr",
        "cell",
        "model",
        "data",
        "seed",
    }
    rows = {row.run: (one, row) for one in table.cells for row in one.rows}
    assert {group.name for group in groups} == set(rows)
    for group in groups:
        one, row = rows[group.name]
        assert (
            group.hparams["cell"].string_value == one.cell.name
            and group.hparams["seed"].number_value == row.seed
        )
        assert group.hparams["loss"].string_value == dict(one.cell.levels)["loss"]
        (session,) = group.sessions
        assert session.status == (1 if row.status == "finished" else 2)
        values = {value.name.tag: value.value for value in session.metric_values}
        assert values.get("row/top1_pct") == (
            pytest.approx(row.top1_pct) if row.top1_pct is not None else None
        )
        assert session.end_time_secs - session.start_time_secs == pytest.approx(row.train_s)


def test_the_same_rows_are_the_same_bytes_and_what_is_gone_is_removed(written):
    table, runs = written
    folder = hparams_folder(runs, table.name)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert len(before) == 19 and write_hparams(table, runs) == 18
    assert before == {
        path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    fewer = dataclasses.replace(table, cells=table.cells[:1])
    assert write_hparams(fewer, runs) == 3
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        row.run for row in table.cells[0].rows
    )


def test_make_table_writes_report_curves_and_events(cli_study):
    """Where run folders are: all three; a view of the table, or no folder of runs, leaves them
    alone.
    """
    _, results, runs = cli_study
    assert table(cli_study, "--sort", "mean").exit_code == 0 and not (results / "two.html").exists()
    assert table(cli_study).exit_code == 0 and (results / "two.html").exists() and not runs.exists()
    rows = [read_row_file(path) for path in (results / "rows").glob("*.json")]
    for row in rows:
        (runs / row.run).mkdir(parents=True)
        (runs / row.run / "row.json").write_bytes(row.as_json())
        (runs / row.run / "metrics.jsonl").write_text(
            '{"step": 1, "epoch": 1.0, "loss_nats": 0.5}\n'
        )
    done = table(cli_study)
    assert done.exit_code == 0 and "two.html" in done.output and "two.curves.jsonl" in done.output
    assert "Training loss (bce) by epoch" in (results / "two.html").read_text()
    assert "tensorboard" in done.output and f"--logdir {runs}" in done.output
    found = {str(path.parent.relative_to(runs)) for path in runs.rglob("*.row")}
    assert found == {row.run for row in rows}, "in the run's own folder, and there alone"


def test_a_run_with_curves_is_one_run_of_tensorboard_by_its_name(tmp_path):
    table = table_of({cell("base", is_base=True): {0: 90.0}}, seeds=(0,))
    (result,) = table.cells[0].seeds
    folder = tmp_path / result.row.run
    with Log(folder, 40, 0, b"", Console(file=io.StringIO())) as log:
        log.window(1, 0.1, 2.0, 0.1, 5.0, 0.0)
        picture = folder / "first_batch.png"
        Image.new("RGB", (4, 4)).save(picture)
        log.picture("first_batch", picture, 0)
    here = dataclasses.replace(result, folder=folder)
    summary = dataclasses.replace(table.cells[0], seeds=(here,))
    write_hparams(dataclasses.replace(table, cells=(summary,)), tmp_path)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    tags = {name: found for name, found in multiplexer.Runs().items() if found["scalars"]}
    assert list(tags) == [result.row.run]
    scalars, pictures = tags[result.row.run]["scalars"], tags[result.row.run]["images"]
    assert {"train/loss_nats", "row/top1_pct"} <= set(scalars)
    assert pictures and max(scalars) < min(pictures), "sorted by name: pictures come last"
    assert [group.name for group in answers(tmp_path)[1]] == [result.row.run]
