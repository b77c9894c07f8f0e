"""Starting the ranks of a run: by torchrun's launcher from inside the command, or by a job file for
Slurm.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.numa.binding import NumaOptions

from trainer.base.cores import num_cores
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_FAILED, EXIT_STOPPED
from trainer.base.signals import SIGNALS, Action, StopRequest, handle_signals
from trainer.distributed.env import Place
from trainer.distributed.numa import VARIABLE, binding_options, refused

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
RANKS_END_S = (
    10  # for the others, once a rank has failed: each hears of it in a second, and ends within five
)


def asked_ranks(gpus: int | None, procs: int | None, device: str, place: Place | None) -> int:
    """How many ranks this machine is to have, from gpus= and procs=; 1 where neither is given.

    place: of this process, where something has started it as one of several: the two must then say
    what is.

    Raises UserError where they contradict each other, or device=.
    """
    if gpus is not None and procs is not None:
        raise UserError(
            f"gpus={gpus} procs={procs}: ranks are on GPUs or on the CPU; use one of the two"
        )
    name, asked = ("procs", procs) if gpus is None else ("gpus", gpus)
    if asked is None:
        return place.local_world_size if place else 1
    if name == "procs" and device.startswith("cuda"):
        raise UserError(
            f"procs={asked} device={device}: procs are ranks on the CPU; use gpus={asked}"
        )
    if name == "gpus" and device not in ("auto", "cuda"):
        raise UserError(
            f"gpus={asked} device={device}: each rank has a GPU of its own; leave device= out"
        )
    if place is not None and asked != place.local_world_size:
        raise UserError(
            f"{name}={asked}: {place.by} has started {place.local_world_size} ranks on this machine"
            f" already; leave {name}= out"
        )
    return asked


def stop_with_launcher() -> None:
    """Have Linux send this rank a SIGTERM once what started it has ended, even by SIGKILL.

    Else an orphaned rank would train on, and hold the run's lock, until it misses the launcher's
    store, and would then end unsaved. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_gpus(gpus: int | None) -> None:
    """Refuse more ranks than there are GPUs. Raises UserError."""
    if gpus is not None:
        found = torch.cuda.device_count()
        if found < gpus:
            remedy = f"gpus={found}" if found else f"procs={gpus}, on the CPU"
            raise UserError(f"gpus={gpus}: torch sees {found} GPUs here; use {remedy}")


def launch(num_ranks: int, argv: Sequence[str], stop: StopRequest, numa: str = "off") -> int:
    """Start `python -m trainer` with these arguments once for each rank, and wait for all;
    returns the run's exit code. numa: how each is bound to the cores near its GPU.

    A signal to this process is passed on to every rank: they save and end together, with 75; where
    one has come before there are any, none is started. Where a rank fails, the code is the first
    one's, and the others are ended.

    Raises UserError where they cannot be bound.
    """
    binding = binding_options(numa, num_ranks, lambda line: print(line, flush=True))
    # the launcher's report of a rank's end: the rank's own is better
    logging.disable(logging.ERROR)
    os.environ[VARIABLE] = numa if binding else "off"
    if binding is None:  # else each rank knows better which cores are its own
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    # a rank's end makes the others' sockets warn
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform.startswith("linux"):
        # all are here, whatever the machine's name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    before = _children()
    with tempfile.TemporaryDirectory(prefix="rsb-ranks-") as folder:
        running = _Running(_agent(num_ranks, argv, folder, binding))
        with _Forwarding(running) as forwarding:
            if stop.is_requested:  # what comes from here on is kept for the ranks
                print(
                    f"stopped by {stop.signal_name} before any rank was started; rerun the same"
                    " command to resume",
                    flush=True,
                )
                return EXIT_STOPPED
            running.start()
            while running.is_alive():
                running.join(_POLL_S)
                forwarding.pass_on()
    if running.error is not None:
        for number in _children() - before:  # ranks before the one that could not be started
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        raise refused(running.error, numa)
    return exit_code(running.failures, bool(forwarding.seen))


def _children() -> set[int]:
    """The processes that this one has started, where Linux lists them."""
    found: set[int] = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            found |= {int(number) for number in listed.read_text().split()}
    return found


def exit_code(failures: Mapping, is_asked_to_stop: bool) -> int:
    """The run's exit code, from how its ranks ended: by rank, with `exitcode`, `pid` and
    `timestamp`; none failed, none in it.

    A rank that a signal has ended is named on standard error, unless the run was asked to stop:
    before it could listen.
    """
    in_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    codes = [failure.exitcode for _, failure in in_time]
    if not codes:
        return 0
    if is_asked_to_stop and codes[0] in (EXIT_STOPPED, *(-number for number in SIGNALS)):
        # the others may have missed it since, and said so by 1, or were too slow and killed
        return EXIT_STOPPED
    rank, first = in_time[0]
    if first.exitcode > 0:
        return first.exitcode
    name = signal.Signals(-first.exitcode).name
    why = ": out of memory, or by hand" if name == "SIGKILL" else ""
    line = (
        f"error: rank {rank} (process {first.pid}) was ended by {name}{why}; rerun the same"
        " command to resume from the last checkpoint"
    )
    print(line, file=sys.stderr, flush=True)
    return EXIT_FAILED


class _Running(threading.Thread):
    """The launcher at work. Beside the main thread, as in that it would answer signals itself, and
    by killing.
    """

    def __init__(self, agent) -> None:
        super().__init__(daemon=True)
        self.agent = agent
        self.failures: Mapping = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.failures = self.agent.run().failures
        except Exception as error:
            self.error = error

    def processes(self) -> list[int]:
        """The ranks' process numbers, once all have been started."""
        found = [worker.id for worker in self.agent.get_worker_group().workers]
        return found if all(isinstance(number, int) for number in found) else []


class _Forwarding:
    """A context in which signals are kept for the ranks."""

    def __init__(self, running: _Running) -> None:
        self.running = running
        self.seen: list[int] = []
        self._num_sent = 0
        self._before: dict[int, Action] = {}

    def __enter__(self) -> _Forwarding:
        self._before = handle_signals(lambda number, frame: self.seen.append(number))
        return self

    def __exit__(self, *exception) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def pass_on(self) -> None:
        """Send on what has come, as soon as there is somebody to send it to."""
        processes = self.running.processes()
        while processes and self._num_sent < len(self.seen):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(process, self.seen[self._num_sent])
            self._num_sent += 1


def _agent(num_ranks: int, argv: Sequence[str], folder: str, binding: NumaOptions | None):
    """torchrun's launcher for one machine: what `torchrun --standalone --max-restarts 0` makes."""
    number = uuid.uuid4().hex
    here = "localhost"
    options: dict[str, Any] = {"numa_options": binding} if binding else {}

    parameters = RendezvousParameters(
        "c10d", f"{here}:0", number, min_nodes=1, max_nodes=1, local_addr=here
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=num_ranks,
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        entrypoint=sys.executable,
        args=(
            "-m",
            "trainer",
            *(word.replace("$", "$$") for word in argv),
        ),  # it fills in $-names by itself
        max_restarts=0,
        monitor_interval=_POLL_S,
        local_addr=here,
        **options,
    )
    return agent_class(LocalElasticAgent)(spec, logs_specs=DefaultLogsSpecs(log_dir=folder))


def agent_class(agent: type) -> Callable:
    """torch's LocalElasticAgent, or its like, that waits RANKS_END_S, not torch's 30 s, for a rank
    that hangs.

    With the 20 s in which it did not come, or was not heard of, that would be too long.
    """
    if "shutdown_timeout" in inspect.signature(agent).parameters:
        return functools.partial(agent, shutdown_timeout=RANKS_END_S)

    class Agent(agent):  # older torch, from 2.9 on, has no public way to say so
        def _start_workers(self, worker_group):
            found = super()._start_workers(worker_group)
            close = self._pcontext.close
            self._pcontext.close = lambda death_sig=None, timeout=None: close(
                death_sig, RANKS_END_S
            )
            return found

    return Agent


def slurm_job(
    argv: Sequence[str], name: str, nodes: int, gpus: int, cpus: int, hours: float, extra: str = ""
) -> str:
    """The text of a job file for sbatch that runs `python -m trainer` with these arguments on
    nodes x gpus ranks.

    Two minutes before its time is over Slurm sends SIGUSR1 to the ranks: they save, end with 75,
    and the job puts itself into the queue again; so does a pre-emption. gpus: of each node; 0: one
    rank each on the CPU. extra: a further line for sbatch, as "--partition=big --account=me".

    Raises UserError for text that would be more than its line.
    """
    for what, text in (("name", name), ("sbatch", extra)):
        if not text.isprintable():
            raise UserError(
                f"{what}={text!r}: becomes a line of the job file; write it without line breaks"
            )
    minutes = max(5, round(hours * 60))
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --ntasks-per-node={gpus or 1}",
        *([f"#SBATCH --gpus-per-node={gpus}"] if gpus else []),
        f"#SBATCH --cpus-per-task={cpus}",
        f"#SBATCH --time={minutes // 60}:{minutes % 60:02}:00",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={name}.%j.log",
        *([f"#SBATCH {extra}"] if extra else []),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 2",
        (
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"
            if not gpus
            else "export OMP_NUM_THREADS=1"
        ),
        # a rank that has saved and left with 75 must not have the others killed, which are about
        # to; where one fails they end by themselves
        (
            f"srun --cpus-per-task={cpus} --kill-on-bad-exit=0"
            f" {shlex.join([sys.executable, '-m', 'trainer', *argv])}"
        ),
        "code=$?",
        "# 75: stopped and saved before its time limit; the same job resumes where it stopped",
        'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
