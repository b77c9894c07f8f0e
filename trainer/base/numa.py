"""NUMA nodes: which cores and which GPUs of this machine are near each other, as Linux tells in
/sys.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

UNKNOWN_NODE = -1  # what Linux itself writes where the firmware does not say


def numbers_of(text: str) -> frozenset[int]:
    """The numbers of Linux's short list: "0-2,4" is 0, 1, 2 and 4."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def list_of(numbers: Iterable[int]) -> str:
    """Linux's short list of numbers: 0, 1, 2 and 4 are "0-2,4"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in parts)


def node_cores(root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """The cores of each NUMA node of this machine that has some; empty where the system does not
    tell. root: of the file system.
    """
    folder = root / "sys/devices/system/node"
    try:
        nodes = sorted(numbers_of((folder / "online").read_text()))
        cores = [numbers_of((folder / f"node{node}/cpulist").read_text()) for node in nodes]
    except (OSError, ValueError):
        return {}
    return {node: own for node, own in zip(nodes, cores, strict=True) if own}


def node_of(address: str, root: Path = Path("/")) -> int | None:
    """The NUMA node of a device by its PCI address, "0000:1b:00.0": UNKNOWN_NODE where Linux does
    not know it, None where it has no such device. root: of the file system.
    """
    try:
        return int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None


def node_names(addresses: Iterable[str], root: Path = Path("/")) -> list[str]:
    """The NUMA node of each device by its PCI address, "?" for one that Linux does not know; empty
    where the machine has no two. root: of the file system.
    """
    if len(node_cores(root)) < 2:
        return []
    nodes = (node_of(address, root) for address in addresses)
    return ["?" if node in (None, UNKNOWN_NODE) else str(node) for node in nodes]
