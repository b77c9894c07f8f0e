"""ffcv in tests: where it is not built, they are skipped; with RSB_CI=1, as in .ci/run, they fail
instead.
"""

import importlib.util
import os

import pytest


def needs_ffcv() -> None:
    """Call it at the head of a test module that imports ffcv."""
    if importlib.util.find_spec("ffcv") is None:
        sentence = "no ffcv here: make setup ffcv=1, and its loader is tested"
        pytest.fail(sentence, pytrace=False) if os.environ.get("RSB_CI") == "1" else pytest.skip(
            sentence, allow_module_level=True
        )
