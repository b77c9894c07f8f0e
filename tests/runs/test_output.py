"""What a program is given by the shell that starts it: an output that breaks (a run goes on to its
row, its log says so, its exit code is as ever), too little address space.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.forked import words

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("redirection", "says"),
    [
        (">/dev/full", "No space left on device"),
        pytest.param("| head -c 1 >/dev/null", "Broken pipe", marks=pytest.mark.drill),
        pytest.param(">&- 2>&-", "Bad file descriptor", marks=pytest.mark.drill),
    ],
)
def test_a_run_goes_on_without_standard_output(tmp_path, redirection, says):
    script = f'exec 3>&1; {{ "$0" -m trainer "$@"; echo code $? >&3; }} {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, *words(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "code 0\n", (done.stdout, done.stderr)
    assert len(list((tmp_path / "results" / "rows").iterdir())) == 1
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    said = [line for line in log.read_text().splitlines() if line.startswith("standard output")]
    assert said[0].startswith(f"standard output: cannot write ({says})")
    assert log.read_text().count("standard output") == 1


def test_a_command_whose_answer_is_its_output_fails_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "--help"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert done.returncode == 74
    assert done.stderr.startswith("error: standard output") and done.stderr.count("\n") == 1


@pytest.mark.drill
def test_too_little_address_space_is_one_line(tmp_path):
    shell = 'ulimit -v 1000000; exec "$0" -m trainer "$@"'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, *words(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ulimit -v 1000000")
