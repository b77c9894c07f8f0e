"""This process's rank among the processes of a run, from the environment that torchrun or Slurm's
srun sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trainer.base.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below the ports that Linux gives out by itself


@dataclass(frozen=True)
class Place:
    """One of several processes.

    rank: 0 .. world_size - 1. local_rank: among the local_world_size of this machine. host, port:
    of the rendezvous. serves: does this process open that port? torchrun does it by itself.
    attempt: distinguishes this start from others. by: who started it, "torchrun" or "srun".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    port: int
    serves: bool
    attempt: str
    by: str


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment names, or None for a process by itself.

    srun counts only inside a job step: the shell of `salloc` and the script of `sbatch` know the
    job's size too.

    Raises UserError for numbers that make no place.
    """
    if "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1":
        place = _of_torchrun(environment)
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        place = _of_srun(environment)
    else:
        return None
    if not 0 <= place.rank < place.world_size:
        raise UserError(
            f"{place.by}: rank {place.rank} of {place.world_size} processes; valid: 0 .."
            f" {place.world_size - 1}"
        )
    return place if place.world_size > 1 else None


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    missing = [
        name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment
    ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}; torchrun sets all of them"
        )
    number = _numbers(environment)
    rank = number("RANK")
    is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return Place(
        rank=rank,
        world_size=number("WORLD_SIZE"),
        local_rank=number("LOCAL_RANK"),
        local_world_size=(
            number("LOCAL_WORLD_SIZE")
            if "LOCAL_WORLD_SIZE" in environment
            else number("LOCAL_RANK") + 1
        ),
        host=environment["MASTER_ADDR"],
        port=number("MASTER_PORT"),
        serves=rank == 0 and not is_agents,
        attempt=".".join(environment.get(name, "") for name in names),
        by="torchrun",
    )


def _of_srun(environment: Mapping[str, str]) -> Place:
    number = _numbers(environment)
    rank, world_size = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))
    is_one_machine = (
        environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == "1"
    )
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get(
        "SLURM_JOB_NODELIST", "localhost"
    )
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    port = _FIRST_PORT + (int(job) * 31 + int(step)) % _NUM_PORTS
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=number("SLURM_LOCALID"),
        local_world_size=_tasks_on_node(per_node, int(environment.get("SLURM_NODEID", "0"))),
        host=environment.get("MASTER_ADDR")
        or ("127.0.0.1" if is_one_machine else first_host(hosts)),
        port=number("MASTER_PORT") if "MASTER_PORT" in environment else port,
        serves=rank == 0,
        attempt=".".join((job, step, environment.get("SLURM_RESTART_COUNT", "0"))),
        by="srun",
    )


def _numbers(environment: Mapping[str, str]) -> Callable[[str], int]:
    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdigit():
            raise UserError(f"{name}={text}: not a number; torchrun and srun set it")
        return int(text)

    return number


def first_host(hosts: str) -> str:
    """The first host of Slurm's short list: `gpu[07-09,12],big1` begins with gpu07."""
    first = next(re.finditer(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", hosts)).group()
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_on_node(per_node: str, node: int) -> int:
    """The tasks of one node, from Slurm's short list: `4(x2),1` means 4, 4 and 1."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(number)] * int(times or 1)
    return counts[min(node, len(counts) - 1)]


def rank_device(device: str, place: Place | None) -> str:
    """The device asked for, as make_settings takes it: of several ranks on one machine each has a
    GPU of its own.

    Raises UserError where there are fewer GPUs than ranks, and for one GPU asked for by its number.
    """
    if place is None or device not in ("auto", "cuda"):
        if place is not None and device.startswith("cuda:"):
            raise UserError(
                f"device={device}: {place.world_size} ranks cannot share it; device=cuda gives each"
                " its own"
            )
        return device

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return device
    if num_gpus == 1 and place.by == "srun":  # Slurm shows each task its own
        return "cuda:0"
    if num_gpus < place.local_world_size:
        raise UserError(
            f"{place.local_world_size} ranks on this machine, where torch sees {num_gpus} GPUs; use"
            f" gpus={num_gpus}, or procs={place.local_world_size} on the CPU"
        )
    return f"cuda:{place.local_rank}"
