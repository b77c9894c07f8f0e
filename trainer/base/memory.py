"""The memory of this process: kept for the next step, counted, and recognized as full."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import resource
import sys
from collections.abc import Iterator

from trainer.base.devices import peak_allocated_mib, peak_reserved_mib
from trainer.base.errors import UserError, one_line, printable

# Numbers of mallopt's options, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_BYTES = 2**30
# torch has types for its own allocator on a device and for CUDA's error codes; what the CPU's
# allocator and the libraries say has to be read.
_SAID = (
    "can't allocate memory",  # the CPU's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "MPS backend out of memory",
)
_NCCL_SAID = ("out of memory", "Failed to CUDA")  # malloc, calloc, host alloc
_CUDA_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


class MemoryFull(UserError):
    """A step of the run, or one image of an evaluation, does not fit into memory."""


def is_memory_full(error: BaseException) -> bool:
    """Is this what torch raises where a device, or the machine, has no memory left?"""
    torch = sys.modules.get("torch")
    if torch is None:  # then it is no error of torch's
        return False
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_MEMORY_ALLOCATION
    if is_of_ranks(error):
        return any(words in str(error) for words in _NCCL_SAID)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
    )


def is_of_ranks(error: BaseException) -> bool:
    """Was it raised by the communication between ranks, which is lost with it?"""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistBackendError)


def line_of(error: BaseException) -> str | None:
    """The one line that a command ends with where the user can fix the error; None for a bug,
    which is a traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return one_line(f"{error.filename}: no such file, and too long a name for one")
    if isinstance(error, RuntimeError) and is_memory_full(error):
        message = printable(str(error).partition("\n")[0])
        return (
            f"out of memory: {message}; use fewer images at once (batch.norm_images), or a device"
            " with more memory"
        )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if isinstance(error, ImportError | MemoryError) and limit != resource.RLIM_INFINITY:
        # a library that is there is no fault of the program's where it cannot be mapped
        said = printable(str(error).partition("\n")[0]) or "out of memory"
        return f"ulimit -v {limit >> 10}: {said}; use ulimit -v unlimited, or a larger one"
    if isinstance(error, MemoryError):
        return "out of memory; use fewer workers= or images at once, or a machine with more"
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


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A block, or a function, that imports torch and all that comes with it.

    Of the half a million objects that stay the garbage collector knows after it, and does not walk
    through them while they are made: a fifth of the seconds.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def hand_back_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory, before a process is forked: it
    would hold a copy of it.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def reserved_mem_mib(settings) -> float | None:
    """The most memory of the accelerator that torch's allocator held, in use or for later, which is
    what must fit; None on a CPU and where it is not counted.
    """
    return peak_reserved_mib(settings.device)


def peak_mem_mib(settings) -> float:
    """The most memory in use: tensors on the accelerator where the run has one, else of this
    process.
    """
    on_device = peak_allocated_mib(settings.device)
    if on_device is not None:
        return on_device
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
