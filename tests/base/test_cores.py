"""Threads that wait for each other leave their cores to others, in a way that the user may change."""

import os
import subprocess
import sys

import pytest

from trainer.base.cores import let_threads_sleep


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "infinity"}])
def test_what_the_user_has_said_of_waiting_stays(said):
    environment = dict(said)
    let_threads_sleep(environment)
    assert environment == said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP")
def test_the_program_says_it_before_torch_reads_it():
    """libgomp shows what it took from the environment where it is asked to, once it is loaded."""
    asked = {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", "trainer", "plan", "--model", "resnet18"],
        env=without_waiting() | asked,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0
    lines = [line for line in shown.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert lines and all("'1000'" in line for line in lines), shown.stderr


def without_waiting() -> dict[str, str]:
    words = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    return {name: value for name, value in os.environ.items() if name not in words}
