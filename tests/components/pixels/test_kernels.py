"""The GPU kernels give the numbers of the tensor operations, interpreted here."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest


def test_kernels_give_the_numbers_of_tensor_operations(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.fail("no triton") if os.environ.get("RSB_CI") == "1" else pytest.skip("no triton")
    file, report = Path(__file__).with_name("interpreted_kernels.py"), tmp_path / "report.xml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            file,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).find("testsuite")
    assert int(suite.get("tests")) > 50
    assert suite.get("skipped") == "0"
