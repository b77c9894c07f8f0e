"""One seed of a cell in its process: the words of `train`, the row that is its own, the failure that it leaves."""

import os
import subprocess
import sys

import pytest

from support.repeats import repeat_of, row_of, shared_in
from trainer.ablation import cell_run
from trainer.ablation.cell_run import (
    find_row,
    num_failed,
    run_folder_of,
    run_repeat,
    words_of,
    written_to,
)
from trainer.ablation.failures import cell_folder, read_failure, read_failures
from trainer.base.exits import EXIT_CLAIMED
from trainer.runs.job import write_plan
from trainer.runs.lock import try_acquire
from trainer.runs.results import rows_folder, store_row


def ran_as(monkeypatch, code: int, says: str = "", then=lambda: None) -> list[list[str]]:
    """In the place of the training: what it says, what it leaves, how it ends."""
    asked = []

    def trained(words):
        asked.append(words)
        print(says)
        then()
        return code

    monkeypatch.setattr(cell_run, "_train", trained)
    return asked


def test_the_words_are_those_that_a_user_would_write(tmp_path):
    words = words_of(
        repeat_of(0.1, seed=3, ablation="losses", cell="a b").job,
        shared_in(tmp_path, checkpoint_s=5.0),
    )
    assert words[0] == "train"
    named = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    assert (
        named["seed"] == "3"
        and named["cell"] == "a b"
        and named["ablation"] == "losses"
        and named["checkpoint-s"] == "5.0"
    )
    assert (
        "smoothing=0.1" in named["set"]
        and named["runs"] == str(tmp_path / "runs")
        and "data-dir" not in named
    )


def test_the_row_of_a_cell_is_the_first_run_with_its_key(tmp_path):
    shared, repeat, other = shared_in(tmp_path), repeat_of(0.1), repeat_of(0.2)
    assert find_row(shared, repeat) is None
    store_row(
        shared.results, row_of(other, "000000")
    )  # the same recipe, model, data and seed: not the same run
    assert find_row(shared, repeat) is None
    store_row(shared.results, row_of(repeat, "abcdef-2", top1_pct=1.0))
    store_row(shared.results, row_of(repeat, "abcdef", top1_pct=2.0))
    assert find_row(shared, repeat).top1_pct == 2.0
    assert find_row(shared, repeat_of(0.1, seed=1)) is None


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
    ("words", "code", "says"),
    [
        (["recipes"], 0, "A1.v1"),
        (["plan", "--recipe=A9"], 2, "recipe=A9"),
        (["--help"], 0, "train"),
    ],
)
def test_the_program_runs_in_this_process(words, code, says, capsys):
    before = sys.argv
    assert cell_run._train(words) == code
    captured = capsys.readouterr()
    assert says in captured.out + captured.err and sys.argv is before


def test_a_bug_is_a_traceback_and_exit_1(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cell_run.runpy, "run_module", broken)
    assert cell_run._train(["train"]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_the_store_is_listed_once_where_many_rows_are_looked_for(tmp_path):
    shared, repeat = shared_in(tmp_path), repeat_of(0.1)
    assert cell_run.row_names(shared) == []
    store_row(shared.results, row_of(repeat))
    (rows_folder(shared.results) / "notes.txt").touch()
    names = cell_run.row_names(shared)
    assert len(names) == 1 and find_row(shared, repeat, names) == row_of(repeat)
