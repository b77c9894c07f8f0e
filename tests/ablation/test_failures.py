"""What is known of a cell that failed: counted, told in one line, forgotten when it finishes."""

import pytest

from trainer.ablation.failures import (
    FailureError,
    drop_failure,
    failure_path,
    read_failure,
    read_failures,
    store_failure,
)

FACTS = {"cell": "bce", "seed": 1, "run": None}


def test_a_failure_is_read_back_and_each_attempt_is_counted(tmp_path):
    store_failure(
        tmp_path,
        "k1",
        exit_code=1,
        output=["Traceback", "  here", "ValueError: no", "", "  "],
        **FACTS,
    )
    second = store_failure(
        tmp_path, "k1", exit_code=-9, output=[f"line {n}" for n in range(100)], **FACTS
    )
    assert read_failures(tmp_path) == {"k1": second} and read_failure(tmp_path, "k1") == second
    assert (second.num_attempts, second.cell, second.seed, second.exit_code) == (2, "bce", 1, -9)
    assert second.log_tail[-1] == "line 99" and len(second.log_tail) == 40
    assert "SIGKILL" in second.error and "out of memory" in second.error


@pytest.mark.parametrize(
    ("exit_code", "output", "error"),
    [
        (1, ["a", "ValueError: no", ""], "ValueError: no"),
        (2, ["error: data: not found; use x"], "data: not found; use x"),
        (-11, ["a"], "ended by SIGSEGV"),
        (7, [], "exit code 7 without output"),
    ],
)
def test_the_error_is_one_line(tmp_path, exit_code, output, error):
    assert store_failure(tmp_path, "k", exit_code=exit_code, output=output, **FACTS).error == error


def test_a_cell_that_finished_has_no_failure(tmp_path):
    assert read_failures(tmp_path) == {} and read_failure(tmp_path, "k") is None
    store_failure(tmp_path, "k", exit_code=1, output=["x"], **FACTS)
    drop_failure(tmp_path, "k")
    drop_failure(tmp_path, "k")
    assert read_failures(tmp_path) == {}
    assert [path.name for path in failure_path(tmp_path, "k").parent.iterdir()] == []


@pytest.mark.parametrize("content", ["", "{", '{"run": 3}'])
def test_a_damaged_record_is_named_with_a_remedy(tmp_path, content):
    store_failure(tmp_path, "k", exit_code=1, output=["x"], **FACTS)
    failure_path(tmp_path, "k").write_text(content)
    with pytest.raises(FailureError, match=r"failure.json.*remove it"):
        read_failures(tmp_path)
