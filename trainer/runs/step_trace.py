"""profile=1: a trace of a few steps, for a viewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

NUM_BEFORE, NUM_WARMUP, NUM_STEPS = 5, 1, 3


class StepTrace:
    """Writes what torch's profiler sees of steps 7, 8 and 9 of this process into a folder: on the
    host and, where the run has one, on the GPU.

    The file opens in ui.perfetto.dev, in chrome://tracing and in TensorBoard's profiler plugin.
    These steps are slower than others.

    Source: torch.profiler.
    """

    def __init__(self, folder: Path, device: str, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if device.startswith("cuda") else []
        self._profiler: profile | None = profile(
            activities=activities,
            schedule=schedule(wait=NUM_BEFORE, warmup=NUM_WARMUP, active=NUM_STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._step, self._num_begun = 0, 0

    def start_step(self, step: int) -> None:
        """Before each step, counted from 0."""
        if self._profiler is None:
            return
        self._step = step
        if self._num_begun:
            self._profiler.step()
        else:
            self._profiler.start()
        self._num_begun += 1
        if self._num_begun > NUM_BEFORE + NUM_WARMUP + NUM_STEPS:
            self.close()

    def close(self) -> None:
        """At the end of the process's steps: what has been recorded by then is written."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if 0 < self._num_begun <= NUM_BEFORE + NUM_WARMUP:
            least = NUM_BEFORE + NUM_WARMUP + 1
            self._say(f"profile=1: no trace: {self._num_begun} steps, and the first is of {least}")
        if self._num_begun:
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        last = self._step + (self._profiler is None)  # closed in a step, or before the next
        path = self._folder / f"step-{last}.pt.trace.json.gz"
        try:
            profiler.export_chrome_trace(str(path))
        except OSError as error:
            self._say(f"{path}: trace not written ({error.strerror})")
            return
        self._say(f"trace of the steps up to {last}: {path} (open it in https://ui.perfetto.dev)")
