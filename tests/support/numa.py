"""A machine with NUMA nodes, as Linux tells of it."""

from collections.abc import Mapping
from pathlib import Path


def pretend(root: Path, nodes: Mapping[int, str], gpus: Mapping[str, int]) -> Path:
    """Write the files of /sys below root. nodes: the cores of each, "0-7". gpus: the node of each
    PCI address, -1 where the firmware does not say.
    """
    files = {f"devices/system/node/node{node}/cpulist": cores for node, cores in nodes.items()}
    for name in ("online", "possible"):
        files[f"devices/system/node/{name}"] = ",".join(map(str, nodes))
    files |= {f"bus/pci/devices/{address}/numa_node": str(node) for address, node in gpus.items()}
    for name, text in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root
