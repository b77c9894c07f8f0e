"""Whatever the disk does in the middle, the run ends as it would have; where it takes no end, that
is in another place.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.unwritable import NUM_STEPS, FullDisk, at_steps, go, left_by, run_folder
from trainer.base import disk
from trainer.base.exits import EXIT_DONE, EXIT_UNWRITTEN
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.export import weights_digest
from trainer.runs.lock import owner_of
from trainer.runs.results import read_row_file
from trainer.runs.run_folder import open_model


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, printed = go(folder)
    assert code == EXIT_DONE and "cannot write" not in printed
    return left_by(folder)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """The end is tried once."""
    for module in ("run", "finalize"):
        monkeypatch.setattr(f"trainer.runs.{module}.END_S", 0.0)
    monkeypatch.setattr("trainer.runs.run.STOP_S", 0.0)


def fill(full: FullDisk, is_full: bool):
    def act(run) -> None:
        full.is_full = is_full

    return act


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        *(pytest.param(number, marks=pytest.mark.drill) for number in (errno.EROFS, errno.EIO)),
    ],
)
def test_a_disk_that_takes_nothing_for_a_while_changes_nothing(
    undisturbed, tmp_path, monkeypatch, number
):
    full = FullDisk(monkeypatch, tmp_path, number)
    seen = []

    def look(run) -> None:
        seen.append(load_checkpoint(run.folder / "checkpoints", print)["progress"]["step"])
        full.is_full = False

    at_steps(monkeypatch, {5: fill(full, True), 12: look})  # a line of metrics between
    code, _, printed = go(tmp_path)
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed
    assert seen == [5]  # the last good one was there all the time
    lines = [line for line in printed.splitlines() if "cannot write" in line]
    assert (
        len(lines) == 1 and os.strerror(number) in lines[0] and "training continues" in lines[0]
    )  # in under a minute
    assert printed.count("all is written again") == 1
    folder = run_folder(tmp_path)
    assert set(lines) <= set((folder / "log.txt").read_text().splitlines())
    board = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in board.Scalars("train/loss_nats")] == [10, 14]
    assert len((folder / "speed.jsonl").read_text().splitlines()) == 2
    assert not list(folder.rglob("*.part"))


def test_a_removed_folder_is_made_again_whole(undisturbed, tmp_path, monkeypatch):
    def remove(run) -> None:
        shutil.rmtree(run.folder)

    owners = []
    at_steps(monkeypatch, {8: remove, 11: lambda run: owners.append(owner_of(run.folder))})
    code, row, _ = go(tmp_path)
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed
    folder = run_folder(tmp_path)
    assert owners[0].pid == os.getpid() and not list(folder.glob("claim.*"))
    assert {path.name for path in folder.iterdir()} >= {
        "plan.json",
        "recipe.yaml",
        "model.safetensors",
        "config.json",
        "row.json",
        "log.txt",
    }
    assert weights_digest(open_model(folder)) == row.weights_sha256


@pytest.mark.drill
def test_removed_with_all_runs_and_unwritable_for_a_while_it_comes_back(
    undisturbed, tmp_path, monkeypatch
):
    """A network folder that vanishes: its path is there no more, then it is, with all that it held."""
    away = tmp_path / "away"

    def vanish(run) -> None:
        os.rename(tmp_path / "runs", away)
        (tmp_path / "runs").write_text("no folder")

    def return_(run) -> None:
        (tmp_path / "runs").unlink()
        os.rename(away, tmp_path / "runs")

    at_steps(monkeypatch, {4: vanish, 12: return_})
    code, _, printed = go(tmp_path)
    assert code == EXIT_DONE and left_by(tmp_path) == undisturbed
    assert printed.count("cannot write") == 1


def test_an_end_that_its_disk_does_not_take_is_in_another_place_and_goes_on_from_there(
    undisturbed, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    with monkeypatch.context() as patch:
        full = FullDisk(patch, tmp_path / "here")
        at_steps(patch, {11: fill(full, True)})
        code, row, printed = go(tmp_path / "here")
    assert (code, row) == (EXIT_UNWRITTEN, None)
    (place,) = other.iterdir()
    last = printed.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and str(place) in last
    assert "the last checkpoint there is that of step 11" in last
    for name in (
        "model.safetensors",
        "config.json",
        "row.json",
        "metrics.jsonl",
        "plan.json",
        "recipe.yaml",
    ):
        assert name in last and (place / name).exists()
    row = read_row_file(place / "row.json")
    assert (
        row.weights_sha256
        == undisturbed["row"]["weights_sha256"]
        == weights_digest(open_model(place))
    )
    assert (place / "metrics.jsonl").read_bytes() == undisturbed["metrics"]
    # what the line promises: with room there, rerun the same command to resume; or from the other place
    code, _, printed = go(tmp_path / "here")
    assert (
        code == EXIT_DONE
        and "resumed after step 11" in printed
        and left_by(tmp_path / "here") == undisturbed
    )
    (tmp_path / "moved" / "runs").mkdir(parents=True)
    os.rename(place, tmp_path / "moved" / "runs" / row.run)
    code, _, printed = go(tmp_path / "moved")
    assert (
        code == EXIT_DONE
        and f"resumed after step {NUM_STEPS}" in printed
        and left_by(tmp_path / "moved") == undisturbed
    )


@pytest.mark.drill
def test_where_no_place_takes_the_end_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "nowhere")
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "nowhere")
    with monkeypatch.context() as patch:
        full = FullDisk(patch, tmp_path)
        at_steps(patch, {11: fill(full, True)})
        code, row, printed = go(tmp_path)
    assert (code, row) == (EXIT_UNWRITTEN, None)
    assert (
        "no other place took it; with room there rerun the same command to resume"
        in printed.splitlines()[-1]
    )


@pytest.mark.drill
def test_a_store_that_takes_no_row_is_an_error_and_the_same_command_stores_it(
    undisturbed, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        full = FullDisk(patch, tmp_path / "results")
        full.is_full = True
        code, row, printed = go(tmp_path)
    assert code == EXIT_UNWRITTEN and row.weights_sha256 == undisturbed["row"]["weights_sha256"]
    last = printed.splitlines()[-1]
    assert (
        f"results/rows/{row.run}.json: cannot write (No space left on device)" in last
        and str(run_folder(tmp_path) / "row.json") in last
    )
    code, again, _ = go(tmp_path)
    assert (
        code == EXIT_DONE
        and again.weights_sha256 == row.weights_sha256
        and left_by(tmp_path) == undisturbed
    )


@pytest.mark.drill
def test_a_stop_that_cannot_be_saved_is_no_75_and_its_state_is_in_another_place(
    undisturbed, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    with monkeypatch.context() as patch:
        full = FullDisk(patch, tmp_path / "here")

        def stop(run) -> None:
            os.kill(os.getpid(), 15)

        at_steps(patch, {3: fill(full, True), 9: stop})
        code, row, printed = go(tmp_path / "here")
    assert (code, row) == (EXIT_UNWRITTEN, None)
    assert "stopped by SIGTERM after step 10: not saved (No space left on device)" in printed
    (place,) = other.iterdir()
    assert str(place) in printed.splitlines()[-1]
    (there,) = (tmp_path / "here" / "runs").iterdir()
    shutil.rmtree(there)
    os.rename(place, there)
    code, _, printed = go(tmp_path / "here")
    assert (
        code == EXIT_DONE
        and "resumed after step 10" in printed
        and left_by(tmp_path / "here") == undisturbed
    )


@pytest.mark.drill
def test_kept_epochs_stay(tmp_path):
    code, _, _ = go(tmp_path, checkpoint_s=3600, keep_every=1)
    names = sorted(path.name for path in (run_folder(tmp_path) / "checkpoints").iterdir())
    assert code == EXIT_DONE
    assert names == [
        f"step_{step:09d}.{kind}" for step in (14,) for kind in ("keep", "pt", "sha256")
    ]


def test_the_constants_are_patient():
    assert disk.END_S == 60 and disk.STOP_S == 10 and disk.SAY_S == 60
