"""numa=: each rank is bound to the cores near its GPU, by torchrun's launcher."""

from __future__ import annotations

import inspect
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.numa.binding
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.numa.binding import AffinityMode, NumaOptions

from trainer.base.cores import own_cores
from trainer.base.devices import pci_address
from trainer.base.errors import UserError, one_line
from trainer.base.numa import UNKNOWN_NODE, list_of, node_cores, node_of
from trainer.distributed.env import Place

# set by our launcher for its ranks: how they are bound
VARIABLE = "RSB_NUMA"
_REMEDY = "use numa=off"
_OF_OTHERS = {  # what binds ranks that something else has started
    "torchrun": "use its own: torchrun --numa-binding={0} ...",
    "srun": 'use its own: launch-slurm sbatch="--gpu-bind=single:1"',
}


def asked_binding(
    numa: str, gpus: int | None, place: Place | None, environment: Mapping[str, str]
) -> str:
    """How ranks are to be bound, "off" for not at all; in a rank of our launcher how they are.

    Raises UserError where nothing here could bind them: ranks on the CPU, one process, or ranks
    that torchrun or srun has started.
    """
    if place is not None and VARIABLE in environment:
        return environment[VARIABLE]
    if numa == "off":
        return numa
    if place is not None:
        by = _OF_OTHERS[place.by].format(numa)
        raise UserError(f"numa={numa}: {place.by} has started this rank already", by)
    if gpus is None or gpus < 2:
        raise UserError(
            f"numa={numa}: binds each of several ranks to the cores near its GPU",
            "use it with gpus=2 or more; bind one process, or procs=, by numactl before the"
            " command",
        )
    return numa


def refuse_under_srun(numa: str) -> None:
    """Refuse in a job file what each of its ranks would refuse. Raises UserError."""
    if numa != "off":
        raise UserError(f"numa={numa}: srun starts these ranks", _OF_OTHERS["srun"])


def binding_options(
    numa: str, num_ranks: int, log: Callable[[str], None], root: Path = Path("/")
) -> NumaOptions | None:
    """What torchrun's launcher takes to bind rank r to the cores near GPU r; None where it would do
    nothing, which is logged.

    root: of the file system that tells of the machine. Raises UserError where it cannot be done.
    """
    if numa == "off":
        return None
    options = _options(numa)
    addresses = [pci_address(gpu) for gpu in range(num_ranks)]
    nodes = [node_of(address, root) for address in addresses]
    cores = node_cores(root)
    if why := _why_nothing(numa, addresses, nodes, len(cores)):
        log(f"numa={numa}: does nothing here: {why}")
        return None
    if shutil.which("numactl") is None:
        raise UserError(
            f"numa={numa}: torch binds by the program numactl, which is not here",
            f"sudo apt-get install -y numactl, or {_REMEDY}",
        )
    own = own_cores()
    for gpu, node in enumerate(nodes):
        near = cores.get(max(node or 0, 0), frozenset())  # torch takes node 0 for an unknown one
        if near.isdisjoint(own):
            raise UserError(
                f"numa={numa}: GPU {gpu} is on NUMA node {node}, of whose cores this process may"
                f" use none (it may use {list_of(own)})",
                _REMEDY,
            )
    return options


def _options(numa: str) -> NumaOptions:
    valid = [mode.value for mode in AffinityMode]
    if numa not in valid or "numa_options" not in inspect.signature(WorkerSpec).parameters:
        raise UserError(
            f"numa={numa}: torch {torch.__version__} cannot bind ranks so",
            f"use numa=off, or a newer torch; it has {', '.join(valid)}",
        )
    return NumaOptions(affinity_mode=AffinityMode(numa))


def _why_nothing(
    numa: str, addresses: list[str], nodes: list[int | None], num_nodes: int
) -> str | None:
    """Why a binding would do nothing, or what nobody meant; None where it would do its work.

    On one node `exclusive` and `core-complex` still share out its cores.
    """
    if num_nodes <= 1 and numa in (AffinityMode.NODE, AffinityMode.SOCKET):
        return "this machine has one NUMA node"
    for gpu, (address, node) in enumerate(zip(addresses, nodes, strict=True)):
        if node is None or (node == UNKNOWN_NODE and num_nodes > 1):
            found = "no such device" if node is None else "numa_node -1"
            return f"Linux does not say which NUMA node GPU {gpu} is on ({address}: {found})"
    return None


def refused(error: Exception, numa: str) -> Exception:
    """A launcher's error as the user's, where it comes of binding: too few cores for `exclusive`, a
    node without cores under `socket`; else the error itself.
    """
    own = Path(torch.numa.binding.__file__)
    if not any(Path(frame.filename) == own for frame in traceback.extract_tb(error.__traceback__)):
        return error
    return UserError(
        f"numa={numa}: torch cannot bind the ranks: {one_line(str(error))}",
        f"{_REMEDY}, or another binding",
    )
