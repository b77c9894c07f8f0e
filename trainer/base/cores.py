"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

# turns of a loop in which a thread of OpenMP waits before it sleeps; libgomp's own are 300,000
# where there is a core for each thread, and these where there is none
_SPINS = 1000
# processes a core, of others: with this one's, more than one from here on
BUSY_LOAD = 0.75


def num_cores() -> int:
    """The cores of this process's affinity, and no more than its control group has time for: a
    container's --cpus=.
    """
    own = len(own_cores())
    share = group_cores()
    return own if share is None else max(1, min(own, math.ceil(share)))


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's threads sleep after a short wait for each other, unless the user has said how
    they wait. To be called before torch is imported; no result changes.

    Else a thread that has nothing to do keeps its core while another process, such as a loader's,
    would need it: beside other programs a step of ResNet-18 takes six times as long (two cores,
    32 px).

    Source: GOMP_SPINCOUNT in the manual of GNU libgomp.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def own_cores() -> frozenset[int]:
    """The numbers of the cores of this process's affinity; all where the system has no such
    thing.
    """
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores_each(affinities: Sequence[frozenset[int]], which: int) -> int:
    """The cores that are one of several processes' own, at least 1: those that may run on a core in
    common share theirs evenly, and all of them what the control group has time for.

    affinities: of each process of this machine. which: the place of this one among them.
    """
    own = affinities[which]
    cores = len(own) // max(1, sum(not own.isdisjoint(other) for other in affinities))
    share = group_cores()
    if share is not None:
        cores = min(cores, math.ceil(share) // len(affinities))
    return max(1, cores)


def load_per_core() -> float | None:
    """The load average of the last minute by the machine's cores; None where the system has none.

    Of the machine and all of its cores, in a container too, where both are those of its host.
    """
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None


def group_cores(root: Path = Path("/")) -> float | None:
    """The processor time of this process's control group, in cores; None where none is set. root:
    of the file system.

    Source: Linux's cgroup-v2 (cpu.max) and cgroup-v1 (cpu.cfs_quota_us) documentation; a group's
    limit is one of all below it, and inside a container its own group may stand at the top.
    """
    shares = [share for folder in _groups(root) if (share := _share_of(folder)) is not None]
    return min(shares, default=None)


def _groups(root: Path) -> Iterator[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):
            yield top.joinpath(*names[:depth])


def _share_of(folder: Path) -> float | None:
    for read in (_of_version_2, _of_version_1):
        try:
            quota, period = read(folder)
            return quota / period if quota > 0 and period > 0 else None
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _of_version_2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def _of_version_1(folder: Path) -> tuple[int, int]:
    quota, period = (
        int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
    )
    return quota, period
