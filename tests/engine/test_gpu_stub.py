"""The tests marked gpu_stub, run on pretended GPUs, and whole commands there."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from support.gpu_stub import NoCompiler, build

TESTS = Path(__file__).parents[1]
FILES = [
    path
    for path in sorted(TESTS.rglob("test_*.py"))
    if path != Path(__file__) and "mark.gpu_stub" in path.read_text()
]


@pytest.mark.parametrize(("num_devices", "chosen"), [(1, "fp16"), (1, "not fp16"), (2, "not fp16")])
def test_gpu_tests_pass_on_pretended_gpus(num_devices, chosen, gpu_stub, tmp_path):
    """All that is marked runs: on one none is skipped but those of two."""
    report = tmp_path / "report.xml"
    words = ["-m", "gpu_stub", "-k", chosen, "-n", "0", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--junitxml={report}", *FILES],
        cwd=TESTS.parent,
        env=gpu_stub | {"GPU_STUB_DEVICES": str(num_devices)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).find("testsuite")
    assert int(suite.get("tests")) > 40
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0"


def test_without_a_compiler_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiler, match=r"apt-get install g\+\+"):
        build(tmp_path)
