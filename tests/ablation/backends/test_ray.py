"""Cells on a Ray cluster of this machine: the same rows, also where a worker is killed; a store
behind a URL.
"""

import os
import signal
import threading

import pytest

from support.sweeps import wait_until, write_page, write_pictures
from trainer.ablation.backends.ray import ClusterShare, RayCells, share_of
from trainer.ablation.cell_run import Shared, repeats_of
from trainer.ablation.failures import cell_folder
from trainer.ablation.runner import Sweep
from trainer.ablation.spec import load_ablation
from trainer.base.errors import UserError
from trainer.base.signals import StopRequest
from trainer.runs.lock import owner_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    data = write_pictures(folder / "pictures")
    # enough epochs that a worker can be killed in the middle of one
    page = write_page(folder / "two.yaml", data, [0.01, 0.02], overrides={0.01: {"epochs": 10}})
    return folder, repeats_of(load_ablation(page))


def shared_in(folder, **settings) -> Shared:
    return Shared(
        folder / "runs", folder / "results", device="cpu", workers="0", checkpoint_s=0.0, **settings
    )


@pytest.mark.drill
def test_a_worker_that_is_killed_is_replaced_and_all_rows_are_those_of_undisturbed_runs(
    world, tmp_path
):
    _, repeats = world
    shared = shared_in(tmp_path, url=(tmp_path / "far").as_uri())
    cells = RayCells(shared, "local", ClusterShare(cpus=1), jobs=2)
    try:
        sweep = Sweep(repeats, shared, cells, StopRequest(), lambda _: None)
        killed = []

        def kill_one() -> None:
            folder = cell_folder(shared.runs, repeats[0].key)
            wait_until(
                lambda: list(shared.runs.glob(f"{repeats[0].prefix}*/checkpoints/step_*5.pt"))
            )
            killed.append(owner_of(folder).pid)
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill_one)
        thread.start()
        assert sweep.run() == 0, [(each.state, each.failure) for each in sweep.statuses]
        thread.join()
    finally:
        cells.close()
    assert killed and [each.state for each in sweep.statuses] == ["finished"] * 2
    first = sweep.statuses[0].row
    assert "resumed after step" in (shared.runs / first.run / "log.txt").read_text()
    assert first.num_threads == 1 and first.changes == () and first.bitwise
    assert first.steps == 20 and [each.row.ablation for each in sweep.statuses] == ["two"] * 2
    there = sorted(path.stem for path in (tmp_path / "far" / "rows").iterdir())
    assert there == sorted(
        each.row.run for each in sweep.statuses
    )  # the store behind the URL has them too
    assert [each.row.weights_sha256 for each in sweep.statuses] == undisturbed_weights(
        repeats, tmp_path / "here"
    )


def undisturbed_weights(repeats, folder) -> list[str]:
    """Of the same cells in processes of this machine."""
    from functools import partial

    from trainer.ablation.backends.local import LocalCells
    from trainer.ablation.cell_run import run_repeat

    shared = shared_in(folder)
    sweep = Sweep(
        repeats,
        shared,
        LocalCells(partial(run_repeat, shared=shared), 2),
        StopRequest(),
        lambda _: None,
    )
    assert sweep.run() == 0
    return [each.row.weights_sha256 for each in sweep.statuses]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", ClusterShare(1, None, None)),
        ("cpus=4 gpus=0.5", ClusterShare(4, 0.5, None)),
        ("memory_gib=8", ClusterShare(1, None, 8)),
    ],
)
def test_a_share_of_the_cluster_is_text(text, share):
    assert share_of(text) == share


@pytest.mark.parametrize("text", ["cpu=4", "cpus=", "cpus=many", "cpus=-1", "cpus=inf", "cpus"])
def test_a_share_that_is_not_understood_is_refused(text):
    with pytest.raises(UserError, match=r"per_cell=cpu.*; use per_cell"):
        share_of(text)


def test_a_cluster_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"address=auto: no Ray cluster .*address=local"):
        RayCells(shared_in(tmp_path), "auto", ClusterShare())
