"""profile=1 writes a trace of a few steps into the run folder."""

import gzip
import json

import pytest

from support.commands import rsb
from trainer.runs.step_trace import StepTrace


def words(folder, *more):
    short = "epochs=2 batch.images=128 batch.norm_images=64"
    files = ["--runs", folder / "runs", "--results", folder / "results", "--workers", "0"]
    return [
        "train",
        "--recipe",
        "torchvision-v1",
        "--model",
        "test_resnet",
        *files,
        "--set",
        short,
        *more,
    ]


def trace_in(folder) -> tuple[str, set[str]]:
    """The file's name and the operations in it."""
    path = next((folder / "runs").glob("*/*.pt.trace.json.gz"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return path.name, {event["name"] for event in events if "dur" in event}


def test_a_run_leaves_a_trace_of_its_ninth_step_and_says_where(tmp_path):
    done = rsb(*words(tmp_path, "--profile", "1"))
    assert done.exit_code == 0, done.output
    name, operations = trace_in(tmp_path)
    assert name == "step-9.pt.trace.json.gz" and name in done.output
    assert {"aten::conv2d", "ProfilerStep#6", "ProfilerStep#8"} <= operations
    assert {"ProfilerStep#5", "ProfilerStep#9"}.isdisjoint(operations)


@pytest.mark.gpu  # CUPTI, which the pretended one has not
def test_a_run_on_a_gpu_leaves_one_with_its_kernels(tmp_path):
    done = rsb(*words(tmp_path, "--profile", "1"))
    assert done.exit_code == 0, done.output
    assert "cudaLaunchKernel" in trace_in(tmp_path)[1]


@pytest.mark.parametrize(("num_steps", "is_written"), [(0, False), (6, False), (8, True)])
def test_a_short_process_traces_what_there_is_or_says_so(tmp_path, num_steps, is_written):
    said = []
    trace = StepTrace(tmp_path, "cpu", said.append)
    for step in range(num_steps):
        trace.start_step(step)
    trace.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-8.pt.trace.json.gz"] * is_written
    assert len(said) == (num_steps > 0)


def test_a_full_disk_ends_no_run(tmp_path):
    said = []
    trace = StepTrace(tmp_path / "gone", "cpu", said.append)
    for step in range(10):
        trace.start_step(step)
    assert len(said) == 1 and str(tmp_path / "gone") in said[0]
