"""Processes that make items: none outlives the one that asked for them, whatever ends it."""

import subprocess
import sys

import pytest

ENDING = """
import sys, torch
from trainer.data.workers import items_of, whole

class Numbers:
    def __getitem__(self, key):
        return torch.tensor(key)

items = whole(items_of(Numbers(), range(10**9), 3, "cpu"))
kept = [next(items) for _ in range(3)]
{}
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("raise ZeroDivisionError('of its own')", 1), ("sys.exit(7)", 7), ("pass", 0)],
)
def test_a_process_ends_at_once_with_its_loaders_processes(last, code):
    """They ignore what multiprocessing asks them to end with, and an error's traceback holds the
    loader.
    """
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(last)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code and done.stderr.count("ZeroDivisionError") == (code == 1)
