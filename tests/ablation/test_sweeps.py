"""Real sweeps: killed, doubled, stopped, with cells that fail, each cell ends once and as if
nothing had happened.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support.sweeps import STEPS, Sweep, sweeping, wait_until, write_page, write_pictures
from trainer.ablation.failures import read_failures
from trainer.runs.lock import LockedError, acquire, owner_of

pytestmark = pytest.mark.drill  # minutes of processes that are killed: `make drill`

TWELVE = [round(0.01 * number, 2) for number in range(1, 13)]
FOUR = TWELVE[:4]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Processes to run sweeps, pictures, pages of twelve cells and of four of them."""
    folder = tmp_path_factory.mktemp("world")
    data = write_pictures(folder / "pictures")
    pages = [
        write_page(folder / f"{name}.yaml", data, cells)
        for name, cells in (("twelve", TWELVE), ("four", FOUR))
    ]
    with sweeping(folder) as sweeper:
        yield sweeper, data, *pages


@pytest.fixture
def sweep(world, tmp_path):
    """Of four cells."""
    return Sweep(world[0], tmp_path, world[3])


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """Of twelve cells, all of them run."""
    sweep = Sweep(world[0], tmp_path_factory.mktemp("undisturbed"), world[2])
    assert sweep.run() == 0, sweep.output.read_text()
    return sweep


def check_ended_as(undisturbed: Sweep, sweep: Sweep, num_cells: int) -> None:
    """Every cell has one row, trained once, that is the undisturbed sweep's: weights, scores,
    curves.
    """
    expected, found = undisturbed.endings(), sweep.endings()
    assert len(found) == num_cells and found == {run: expected[run] for run in found}
    sweep.check_each_ran_once()


def test_an_undisturbed_sweep_has_a_row_for_each_cell(undisturbed):
    rows = undisturbed.rows()
    assert sorted(row["cell"] for row in rows.values()) == sorted(f"{value:g}" for value in TWELVE)
    assert {row["ablation"] for row in rows.values()} == {"twelve"}
    assert len({row["weights_sha256"] for row in rows.values()}) == 12
    assert undisturbed.num_steps() == 12 * STEPS
    undisturbed.check_each_ran_once()
    assert "12 runs: 12 finished" in undisturbed.output.read_text()


def test_a_cell_is_bit_for_bit_the_run_of_a_fresh_process(undisturbed, tmp_path, world):
    """The fork of a process that has imported everything computes what `train` computes, and train
    finds its row.
    """
    run, row = next(iter(undisturbed.rows().items()))
    words = [
        "--recipe",
        str(undisturbed.runs / run / "recipe.yaml"),
        "--model",
        "test_resnet",
        "--data",
        str(world[1]),
    ]
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        *words,
        "--device",
        "cpu",
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").glob("*/row.json")
    assert f'"weights_sha256": "{row["weights_sha256"]}"' in path.read_text()


def test_killed_at_five_random_moments_it_ends_the_same(undisturbed, world, tmp_path):
    sweep = Sweep(world[0], tmp_path, world[2])
    draws = random.Random(20261122)
    for _ in range(5):
        before = sweep.num_steps()
        pid = sweep.begin()
        # else the moments would fall on the start alone
        wait_until(lambda before=before: sweep.num_steps() > before)
        time.sleep(draws.uniform(0, 0.9))
        assert sweep.kill(pid) == -signal.SIGKILL
    assert len(sweep.rows()) < 12, "nothing was left to kill"
    assert sweep.run() == 0, sweep.output.read_text()
    check_ended_as(undisturbed, sweep, 12)


def test_two_callers_share_the_work(undisturbed, sweep):
    first, second = sweep.begin(), sweep.begin("--jobs=2")
    assert [sweep.sweeper.wait(first), sweep.sweeper.wait(second)] == [0, 0], (
        sweep.output.read_text()
    )
    check_ended_as(undisturbed, sweep, 4)
    assert sweep.num_steps() == 4 * STEPS  # not one step was trained twice
    assert "running elsewhere" in sweep.output.read_text()


def test_of_two_callers_one_is_killed_and_the_other_does_the_rest(undisturbed, sweep):
    first, second = sweep.begin(), sweep.begin()
    wait_until(lambda: sweep.num_steps() > 2)
    sweep.kill(first)
    assert sweep.sweeper.wait(second) == 0
    check_ended_as(undisturbed, sweep, 4)


def test_the_children_of_a_killed_caller_do_not_train_beside_a_new_ones(undisturbed, sweep):
    pid = sweep.begin("--jobs=2")
    wait_until(lambda: sweep.num_steps() > 4)
    os.kill(pid, signal.SIGKILL)  # the caller alone: its children live on for a moment
    assert sweep.run("--jobs=2") == 0
    sweep.sweeper.wait(pid)
    check_ended_as(undisturbed, sweep, 4)


def test_a_signal_saves_what_runs_and_ends_with_75(undisturbed, sweep):
    pid = sweep.begin("--jobs=2")
    wait_until(lambda: sweep.num_steps() > 4)
    os.kill(pid, signal.SIGTERM)
    assert sweep.sweeper.wait(pid) == 75, sweep.output.read_text()
    assert "rerun make ablate" in sweep.output.read_text()
    assert read_failures(sweep.runs) == {}
    steps_before = sweep.num_steps()
    assert sweep.run() == 0
    check_ended_as(undisturbed, sweep, 4)
    assert steps_before > 0 and sweep.num_steps() == 4 * STEPS  # what was trained was saved


def test_one_raises_one_diverges_one_is_out_of_memory_and_one_is_killed(sweep, world, tmp_path):
    page = write_page(tmp_path / "faulty.yaml", world[1], TWELVE[:6])
    faults = {"0.01": "raise", "0.02": "diverge", "0.03": "memory", "0.04": "kill"}
    assert sweep.run("--jobs=2", page=page, faults=faults) == 1, sweep.output.read_text()
    assert {row["cell"]: row["status"] for row in sweep.rows().values()} == {
        "0.02": "diverged", "0.05": "finished", "0.06": "finished",
    }  # fmt: skip
    failures = {failure.cell: failure for failure in read_failures(sweep.runs).values()}
    assert {cell: failure.exit_code for cell, failure in failures.items()} == {
        "0.01": 1,
        "0.03": 2,
        "0.04": -9,
    }  # 2: the one line says what fits
    assert failures["0.01"].error == "ValueError: an injected error" and "in strike" in "".join(
        failures["0.01"].log_tail
    )
    assert "out of memory" in failures["0.03"].error and "SIGKILL" in failures["0.04"].error
    assert all((sweep.runs / failure.run).is_dir() for failure in failures.values())
    trained_before = {path.name: path.read_text() for path in sweep.trace.glob("*.steps")}
    assert sweep.run(page=page, faults={"0.04": "kill"}) == 1
    trained = {
        path.name
        for path in sweep.trace.glob("*.steps")
        if path.read_text() != trained_before[path.name]
    }
    assert trained == {f"{failures[cell].run}.steps" for cell in ("0.01", "0.03", "0.04")}
    assert [
        (failure.cell, failure.num_attempts) for failure in read_failures(sweep.runs).values()
    ] == [("0.04", 2)]
    assert sweep.run(page=page) == 3  # the one that diverged is a result
    assert len(sweep.rows()) == 6 and read_failures(sweep.runs) == {}


def test_a_run_that_is_being_trained_is_refused_to_a_second_process(sweep):
    """Whoever it is: `train` by hand takes the same claim on the run's folder."""
    pid = sweep.begin(faults={"0.01": "hang"})
    wait_until(lambda: sweep.num_steps() > 0)
    (run,) = [path.stem for path in sweep.trace.glob("*.steps")]
    with pytest.raises(LockedError, match="works here; wait for its end"):
        acquire(sweep.runs / run)
    sweep.kill(pid)
    wait_until(
        lambda: owner_of(sweep.runs / run) is None
    )  # the kernel takes a moment to end what was killed
    acquire(sweep.runs / run).release()


def test_cells_that_another_ablation_ran_are_there_already(undisturbed, world, tmp_path):
    shutil.copytree(undisturbed.folder, tmp_path / "copy")
    sweep = Sweep(
        undisturbed.sweeper,
        tmp_path / "copy",
        write_page(tmp_path / "more.yaml", world[1], [0.01, 0.02, 0.5]),
    )
    steps_before = sweep.num_steps()
    assert sweep.run() == 0
    assert sweep.num_steps() == steps_before + STEPS
    named = sorted(
        (row["ablation"], row["cell"])
        for row in sweep.rows().values()
        if row["cell"] in ("0.01", "0.5")
    )
    assert named == [
        ("more", "0.5"),
        ("twelve", "0.01"),
    ]  # a fact of the ablation that asked first, not the link


def test_what_the_user_wrote_wrong_is_one_line_and_exit_2(sweep, world, tmp_path):
    page = write_page(tmp_path / "wrong.yaml", tmp_path / "no-pictures", [0.1])
    assert sweep.run(page=page) == 2
    (line,) = sweep.output.read_text().splitlines()
    assert line.startswith("error: ") and "no-pictures" in line and "; " in line
