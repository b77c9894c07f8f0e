"""One seed of a cell in its process: the words of `train`, the row that is its own, the failure
that it leaves.
"""

import os
import signal
import subprocess
import sys

import pytest

from support.repeats import repeat_of, row_of, shared_in
from trainer.ablation import cell_run
from trainer.ablation.cell_run import (
    is_running,
    num_failed,
    repeats_of,
    run_folder_of,
    run_repeat,
    stored_row_of,
    written_to,
)
from trainer.ablation.failures import cell_folder, read_failure, read_failures
from trainer.ablation.spec import load_ablation
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_CLAIMED
from trainer.base.signals import SIGNALS
from trainer.runs.lock import LockedError, LockLost, try_acquire
from trainer.runs.plan_file import write_plan
from trainer.runs.results import rows_folder, store_row


def ran_as(monkeypatch, code: int, says: str = "", then=lambda: None) -> list:
    """In the place of the training: what it says, what it leaves, how it ends."""
    asked = []

    def trained(job, shared):
        asked.append(job)
        print(says)
        then()
        return code

    monkeypatch.setattr(cell_run, "_train", trained)
    return asked


def test_a_cell_is_trained_as_its_own_job_with_the_settings_of_the_sweep(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(cell_run, "train_job", lambda *words: given.append(words[:-1]) or 0)
    repeat, shared = (
        repeat_of(0.1, seed=3, ablation="losses", cell="a b"),
        shared_in(tmp_path, checkpoint_s=5.0),
    )
    assert cell_run._train(repeat.job, shared) == 0
    machine = {
        "precision": "auto",
        "workers": "auto",
        "loader": "auto",
        "checkpoint_s": 5.0,
        "runs": shared.runs,
        "results": shared.results,
        "track": "",
        "test_px": "",
    }
    assert given == [(repeat.job, "cpu", machine, None, None)]


def test_the_row_of_a_cell_is_the_first_run_with_its_key(tmp_path):
    shared, repeat, other = shared_in(tmp_path), repeat_of(0.1), repeat_of(0.2)
    assert stored_row_of(shared, repeat) is None
    store_row(
        shared.results, row_of(other)
    )  # the same recipe, model, data and seed: not the same run
    assert stored_row_of(shared, repeat) is None
    store_row(shared.results, row_of(repeat, "-2", top1_pct=1.0))
    store_row(shared.results, row_of(repeat, top1_pct=2.0))
    assert stored_row_of(shared, repeat).top1_pct == 2.0
    assert stored_row_of(shared, repeat_of(0.1, seed=1)) is None


def test_a_row_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)
    asked = ran_as(monkeypatch, 0)
    store_row(shared.results, row_of(repeat))
    assert run_repeat(repeat, shared) == 0
    store_row(shared.results, row_of(repeat_of(0.2), status="diverged"))
    assert run_repeat(repeat_of(0.2), shared) == 3
    assert asked == []


def test_a_claimed_cell_is_left_alone(tmp_path, monkeypatch):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)
    asked = ran_as(monkeypatch, 0)
    with try_acquire(cell_folder(shared.runs, repeat.key)):
        assert run_repeat(repeat, shared) == EXIT_CLAIMED
    assert asked == [] and read_failures(shared.runs) == {}


@pytest.mark.parametrize("error", [LockedError, LockLost])
def test_a_run_that_train_by_hand_has_is_no_failure(tmp_path, monkeypatch, error):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)

    def refused(*_):
        raise error("process 7 is running here")

    monkeypatch.setattr(cell_run, "train_job", refused)
    assert run_repeat(repeat, shared) == EXIT_CLAIMED
    assert read_failures(shared.runs) == {}


def test_a_cell_is_running_where_its_cells_folder_or_its_runs_is_locked(tmp_path):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)
    run = shared.runs / f"{repeat.prefix}aaaaaa"
    write_plan(run, repeat.job, repeat.plan)
    assert not is_running(shared, repeat)
    for folder in (cell_folder(shared.runs, repeat.key), run):
        with try_acquire(folder):
            assert is_running(shared, repeat) and not is_running(shared, repeat_of(0.2))


def test_a_failure_is_counted_told_and_forgotten_when_the_cell_finishes(tmp_path, monkeypatch):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1, seed=4)
    for number, code in enumerate((1, 2), start=1):
        ran_as(monkeypatch, code, says=f"starting\nerror: attempt {number}")
        assert run_repeat(repeat, shared) == code
        failure = read_failure(shared.runs, repeat.key)
        assert (failure.cell, failure.seed, failure.exit_code, failure.error) == (
            "0.1",
            4,
            code,
            f"attempt {number}",
        )
        assert failure.log_tail == ("starting", f"error: attempt {number}")  # of this attempt alone
        assert num_failed(repeat, shared) == failure.num_attempts == number
    ran_as(monkeypatch, 75)
    assert (
        run_repeat(repeat, shared) == 75 and num_failed(repeat, shared) == 2
    )  # to be stopped is no failure
    ran_as(monkeypatch, 0, then=lambda: store_row(shared.results, row_of(repeat)))
    assert run_repeat(repeat, shared) == 0 and read_failures(shared.runs) == {}


def test_the_run_folder_is_the_one_whose_plan_is_the_cells(tmp_path):
    shared, repeat, other = shared_in(tmp_path), repeat_of(0.1), repeat_of(0.2)
    assert run_folder_of(shared, repeat) is None
    for each, digits in ((other, "000000"), (repeat, "aaaaaa")):
        write_plan(shared.runs / (each.prefix + digits), each.job, each.plan)
    assert run_folder_of(shared, repeat).name == repeat.prefix + "aaaaaa"
    assert run_folder_of(shared, other).name == repeat.prefix + "000000"


def test_all_output_goes_to_the_file_also_that_of_other_processes(tmp_path, capfd):
    path = tmp_path / "output.txt"
    for number in (1, 2):
        with written_to(path):
            print("print", number)
            os.write(2, f"descriptor {number}\n".encode())
            subprocess.run([sys.executable, "-c", f"print('process {number}')"], check=True)
    print("afterwards")
    lines = path.read_text().splitlines()
    assert sorted(lines) == [
        "descriptor 1",
        "descriptor 2",
        "print 1",
        "print 2",
        "process 1",
        "process 2",
    ]
    assert capfd.readouterr().out == "afterwards\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            UserError("smoothing=2: too much; smoothing=0.1"),
            2,
            "error: smoothing=2: too much; smoothing=0.1\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TiB"),
            2,
            "error: out of memory: DefaultCPUAllocator",
        ),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
        (KeyboardInterrupt(), 75, ""),
    ],
    ids=["user", "memory", "bug", "interrupt"],
)
def test_how_a_training_fails_is_its_exit_code_and_what_it_says(
    tmp_path, monkeypatch, capsys, error, code, says
):
    def failing(*_):
        raise error

    monkeypatch.setattr(cell_run, "train_job", failing)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    assert cell_run._train(repeat_of(0.1).job, shared_in(tmp_path)) == code
    said = capsys.readouterr().err
    assert says in said and ("Traceback" in said) == (code == 1)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_a_failure_of_the_job_itself_is_one_line_in_the_cells_output(tmp_path):
    shared, repeat = shared_in(tmp_path, precision="fp17"), repeat_of(0.1)
    assert run_repeat(repeat, shared) == 2
    assert read_failure(shared.runs, repeat.key).error.startswith("precision=fp17: unknown")


NEAR = """
name: near
title: "Near"
question: "Do two nearly equal rates train apart?"
source: "none"
recipe: A2
models: [test_resnet]
data: [digits]
seeds: [0]
set: {epochs: 1, batch.images: 256, batch.norm_images: 256, lr.warmup_epochs: null,
      lr.warmup_from: null}
design:
  name: listed
  cells: [{name: base}, {name: low, set: {lr.peak: 0.00123456}},
          {name: high, set: {lr.peak: 0.0012345649}}]
"""


def test_two_cells_whose_values_are_nearly_equal_are_two_runs(tmp_path):
    """Equal to six digits: each has a key, a run and a row of its own, and the row holds its own
    value.
    """
    (tmp_path / "near.yaml").write_text(NEAR)
    shared = shared_in(tmp_path, workers="0")
    low, high = repeats_of(load_ablation(tmp_path / "near.yaml"))[1:]
    assert low.key != high.key
    assert [run_repeat(repeat, shared) for repeat in (low, high)] == [0, 0]
    rows = [stored_row_of(shared, repeat) for repeat in (low, high)]
    assert [row.resolved_recipe["lr"]["peak"] for row in rows] == [0.00123456, 0.0012345649]
    assert [
        next(change.after for change in row.deviations if change.path == "lr.peak") for row in rows
    ] == ["0.00123456", "0.0012345649"]
    assert rows[0].weights_sha256 != rows[1].weights_sha256 and {row.cell for row in rows} == {
        "low",
        "high",
    }
    assert (
        run_folder_of(shared, low).name == rows[0].run
        and run_folder_of(shared, high).name == rows[1].run
    )


def test_the_store_is_listed_once_where_many_rows_are_looked_for(tmp_path):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)
    assert cell_run.row_names(shared) == []
    store_row(shared.results, row_of(repeat))
    (rows_folder(shared.results) / "notes.txt").touch()
    names = cell_run.row_names(shared)
    assert len(names) == 1 and stored_row_of(shared, repeat, names) == row_of(repeat)
