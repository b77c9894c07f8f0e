"""The memory of this process: kept for the next step, counted, and recognized as full."""

from __future__ import annotations

import ctypes
import resource
import sys

from trainer.base.errors import UserError, printable

# Numbers of mallopt's options, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_BYTES = 2**30
# torch has a type for the memory of a device alone: what the CPU's allocator says has to be read
_CPU_SAYS = "can't allocate memory"


class MemoryFull(UserError):
    """A step of the run, or one image of an evaluation, does not fit into memory."""


def is_memory_full(error: BaseException) -> bool:
    """Is this what torch raises where a device, or the machine, has no memory left?"""
    torch = sys.modules.get("torch")
    if torch is None:  # then it is no error of torch's
        return False
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_SAYS in str(error)
    )


def line_of(error: BaseException) -> str | None:
    """The one line that a command ends with where the user can fix the error; None for a bug,
    which is a traceback.
    """
    if isinstance(error, UserError):
        return printable(str(error))
    if isinstance(error, RuntimeError) and is_memory_full(error):
        message = printable(str(error).partition("\n")[0])
        return (
            f"out of memory: {message}; use fewer images at once (batch.norm_images), or a device"
            " with more memory"
        )
    return None


def keep_freed_memory() -> bool:
    """Keep what tensors free for the next ones, rather than hand it back: True where the C library
    can.

    A training step on the CPU frees and takes hundreds of MiB. glibc gives large blocks back to the
    system at once and pays for fresh, zeroed pages at every step: a fifth to a quarter of a
    ResNet-50 step at 32 px. No result changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        options = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return bool(options(_MMAP_THRESHOLD, _NEVER_BYTES) and options(_TRIM_THRESHOLD, _NEVER_BYTES))


def peak_mem_mib(settings) -> float:
    """The most memory held: of the GPU where the run has one, else of this process."""
    if settings.device.startswith("cuda"):
        import torch  # seconds, which commands without it need not wait for

        return torch.cuda.max_memory_allocated(settings.device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
