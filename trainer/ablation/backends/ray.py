"""The Ray backend: the same runs under the same locks, each in a worker process of a cluster.

Ray replaces a worker that dies, and the new one resumes from the run's checkpoint, provided that
`runs` is a folder shared by all nodes. Rows are returned with the task's result too.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.ablation.cell_run import Repeat, Shared, run_repeat, stored_row_of
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_STOPPED
from trainer.base.plugins import VARIABLE, load_plugins
from trainer.runs.results import Row, read_row, store_row

NUM_RETRIES = 3  # of a task whose worker died, as Ray itself has it
_KILLED = -9
_SAVING_S = 60.0


@dataclass(frozen=True)
class ClusterShare:
    """Ray resources of each run. gpus: None for one where the cluster has any and the device is not
    cpu.
    """

    cpus: float = 1.0
    gpus: float | None = None
    memory_gib: float | None = None


def share_of(text: str) -> ClusterShare:
    """Parse text such as `cpus=4 gpus=1 memory_gib=8`.

    Raises UserError for anything else.
    """
    values: dict[str, float] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in ClusterShare.__dataclass_fields__ or not 0 <= number < math.inf:
            raise UserError(
                f'per_cell={word}: not understood; use per_cell="cpus=4 gpus=1 memory_gib=8"'
            )
        values[name] = number
    return ClusterShare(**values)


class RayCells:
    """Runs as tasks of a cluster: `jobs` at a time, or as many as its free resources allow.

    address: "auto" for the cluster of this machine, a URL, "local" to start one for this call.

    Raises UserError where Ray is not installed or the cluster does not answer.
    """

    def __init__(
        self,
        shared: Shared,
        address: str,
        share: ClusterShare,
        jobs: int | None = None,
        retries: int = 0,
    ) -> None:
        self._ray = _connected(address, jobs, share)
        self._shared = shared
        options: dict[str, Any] = {
            "num_cpus": share.cpus,
            "num_gpus": self._gpus(share),
            "max_retries": max(NUM_RETRIES, retries),
        }
        if plugins := os.environ.get(VARIABLE):  # tasks unpickle objects of plugin classes
            options["runtime_env"] = {"env_vars": {VARIABLE: plugins}}
        if share.memory_gib:
            options["memory"] = int(share.memory_gib * 2**30)
        # a new process for each run: no state of the one before, and a peak memory of its own
        self._run = self._ray.remote(max_calls=1, **options)(_run_there)
        self._listed = self._ray.remote(max_calls=1, **options)(_listed_there)
        self._num_threads = max(1, int(share.cpus))
        self.num_slots = jobs or self._num_that_fit(options)
        self._running: dict[object, Repeat] = {}
        self._asked: set[object] = set()

    @property
    def num_running(self) -> int:
        """Runs that have been started and not ended."""
        return len(self._running)

    def start(self, what: Repeat) -> None:
        """Submit one seed of a cell."""
        self._running[self._run.remote(what, self._shared, self._num_threads, os.getcwd())] = what

    def ended(self, timeout_s: float) -> list[tuple[Repeat, int]]:
        """The runs that have ended, with exit codes; their rows are stored. Waits at most timeout_s
        for the first.
        """
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [(self._running.pop(reference), self._code(reference)) for reference in ready]

    def _code(self, reference) -> int:
        try:
            code, row = self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            return EXIT_STOPPED
        except self._ray.exceptions.RayError:  # the worker died more often than Ray retries
            return _KILLED
        if row is not None and read_row(self._shared.results, row.run) is None:
            store_row(self._shared.results, row)
        return code

    def stop(self) -> None:
        """Ask every task to save and end; only once: a second request would kill it unsaved."""
        for reference in set(self._running) - self._asked:
            self._ray.cancel(reference, force=False)
        self._asked |= set(self._running)

    def streamed(self, function: Callable[..., Iterator], parts: dict, *given) -> Iterator:
        """The results of function({name: part}, *given) for each part, in order; fewer where a
        worker dies of one.
        """
        references = [
            self._listed.options(max_retries=0).remote(
                function, {name: part}, given, self._num_threads, os.getcwd()
            )
            for name, part in parts.items()
        ]
        for reference in references:
            try:
                yield from self._ray.get(reference)
            except self._ray.exceptions.RayError:
                return

    def close(self) -> None:
        """Disconnect, or stop a cluster started here. What still runs has a minute to save."""
        self.stop()
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_SAVING_S)
        self._ray.shutdown()

    def _gpus(self, share: ClusterShare) -> float:
        if share.gpus is not None:
            return share.gpus
        return float(
            self._shared.device != "cpu" and self._ray.cluster_resources().get("GPU", 0) > 0
        )

    def _num_that_fit(self, options: dict) -> int:
        there = self._ray.cluster_resources()
        wanted = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
        return max(
            1,
            min(
                (int(there.get(name, 0) // number) for name, number in wanted.items() if number),
                default=1,
            ),
        )


def _connected(address: str, jobs: int | None, share: ClusterShare):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # else Ray writes a token into the home folder
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        import ray  # an optional dependency
    except ImportError:
        raise UserError(
            'on=ray: Ray is not installed; run .venv/bin/python -m pip install "rsb[ray]"'
        ) from None
    here: dict[str, Any] = (
        {"include_dashboard": False, "num_cpus": math.ceil((jobs or 1) * share.cpus)}
        if address == "local"
        else {}
    )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"address={address}: no Ray cluster ({first}); use address=local to start one here"
        ) from None
    return ray


def _run_there(
    repeat: Repeat, shared: Shared, num_threads: int, folder: str
) -> tuple[int, Row | None]:
    _enter_sweep(num_threads, folder)
    code = run_repeat(repeat, shared)
    return code, stored_row_of(shared, repeat)


def _listed_there(
    function: Callable[..., Iterator], part: dict, given: tuple, num_threads: int, folder: str
) -> list:
    _enter_sweep(num_threads, folder)
    return list(function(part, *given))


def _enter_sweep(num_threads: int, folder: str) -> None:
    """The number of threads, the working directory and the plugins of the calling process."""
    torch.set_num_threads(num_threads)
    if Path(folder).is_dir():
        os.chdir(folder)
    load_plugins()
