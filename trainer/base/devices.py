"""The devices that a run may use, and in what they differ for it.

NVIDIA's (cuda) are what the suite is made for. Apple's (mps) and Intel's (xpu) take the same path,
with what torch lacks there done elsewhere: no test of ours has run on one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from trainer.base.errors import UserError

if TYPE_CHECKING:  # torch takes seconds, which commands that only check options need not wait for
    import torch

ACCELERATORS = {"cuda": "GPU", "xpu": "Intel GPU", "mps": "Apple GPU"}
_WITHOUT_FLOAT64 = {"mps"}
_DEVICE = re.compile(r"(cuda|xpu)(:\d+)?|mps|cpu", re.ASCII)


def kind_of(device: str) -> str:
    """cpu, cuda, xpu or mps."""
    return device.partition(":")[0]


def resolve_device(device: str) -> str:
    """The device asked for, auto as the accelerator of this machine or else its CPU.

    Raises UserError for one that is not here.
    """
    import torch

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found and found.type in ACCELERATORS else "cpu"
    if not _DEVICE.fullmatch(device):
        raise UserError(
            f"device={device}: not a device; valid: auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"
        )
    if device == "cpu":
        return device
    kind, _, number = device.partition(":")
    count = getattr(torch, kind).device_count()
    if int(number or 0) >= count:
        name = ACCELERATORS[kind]
        raise UserError(
            f"device={device}: torch sees {count} {name}s here; use device=auto or device=cpu"
        )
    return device


def use_device(device: str) -> None:
    """Make a device that is asked for by its number this process's own."""
    import torch

    if ":" in device:
        getattr(torch, kind_of(device)).set_device(device)


def is_tried(device: str) -> bool:
    """Has the suite been made and tested for it?"""
    return kind_of(device) in ("cpu", "cuda")


def pci_address(gpu: int) -> str:
    """Where a GPU is on the PCI bus, as Linux names its folder: "0000:1b:00.0"."""
    import torch

    of: Any = torch.cuda.get_device_properties(gpu)  # torch's stubs lack these
    return f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"


def has_float64(device: str | torch.device) -> bool:
    """An Apple GPU has none."""
    return kind_of(str(device)) not in _WITHOUT_FLOAT64


def sum_dtype(device: str | torch.device) -> torch.dtype:
    """What many numbers are added up in: float64, or float32 where the device has no other (counts
    stay exact up to 16.7 million).
    """
    import torch

    return torch.float64 if has_float64(device) else torch.float32


def empty_cache(device: str) -> None:
    """Give back what torch's allocator keeps of an accelerator's memory."""
    import torch

    if device != "cpu":
        getattr(torch, kind_of(device)).empty_cache()


def peak_allocated_mib(device: str) -> float | None:
    """The most memory of tensors on an accelerator (mps: what the driver holds now, which torch
    keeps); None on a CPU.
    """
    import torch

    if device == "cpu":
        return None
    if kind_of(device) == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    return getattr(torch, kind_of(device)).max_memory_allocated(device) / 2**20


def unused_share(device: str) -> float:
    """Of a GPU's memory, what torch's allocator holds in pieces that no tensor uses; 0 on a CPU and
    where it is not counted (mps).
    """
    import torch

    kind = kind_of(device)
    if kind not in ("cuda", "xpu"):
        return 0.0
    of = getattr(torch, kind)
    unused = of.memory_reserved(device) - of.memory_allocated(device)
    return unused / of.get_device_properties(device).total_memory


def peak_reserved_mib(device: str) -> float | None:
    """The most memory of an accelerator that torch's allocator held, in use or for later, which is
    what must fit; None on a CPU and where it is not counted (mps).
    """
    import torch

    if kind_of(device) not in ("cuda", "xpu"):
        return None
    return getattr(torch, kind_of(device)).max_memory_reserved(device) / 2**20
