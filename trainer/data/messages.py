"""Items sent between processes over a Unix socket, large arrays through shared memory.

The memory is the kernel's own (memfd_create), one file without a name for each item: unlike files
in /dev/shm it has no limit but the machine's memory (Docker gives /dev/shm 64 MB), and needs no
folder that can be written. Where no such file can be had (no descriptor left; macOS), the arrays
go through the socket.

A message: 16 bytes of lengths, with the file's descriptor beside them; then a pickle (protocol 5,
whose buffers lie out of band).
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

_LENGTHS = struct.Struct("<QQ")  # of the pickle; of the shared memory, 0 for none
_SHARED_BYTES = 2**16  # an array from here on is shared
_ALIGNED_BYTES = 64
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # all pages at once, not by a fault each

Result = TypeVar("Result")


class LostMemory(Exception):
    """An item whose shared memory did not come along: this process has no descriptor left."""


def send(to: socket.socket, item: Any) -> None:
    """Send an item; tensors and arrays arrive as copies. Raises OSError where nobody listens."""
    large: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _SHARED_BYTES:
            return True
        large.append(raw)
        return False

    body = _pickled(item, stays)
    shared = _shared(large) if large else None
    if large and shared is None:
        body, large = _pickled(item, None), []
    sizes = pickle.dumps([raw.nbytes for raw in large])
    try:
        lengths = _LENGTHS.pack(len(sizes) + len(body), sum(map(_aligned, map(len, large))))
        socket.send_fds(to, [lengths], [] if shared is None else [shared])
    finally:
        if shared is not None:
            os.close(shared)
    to.sendall(sizes + body)


def receive(source: socket.socket, check: Callable[[], None] = lambda: None) -> Any:
    """The next item. check: called where the socket's timeout passes.

    Raises EOFError or ConnectionError where the sender has ended, LostMemory.
    """
    head, descriptors, _, _ = _patient(lambda: socket.recv_fds(source, _LENGTHS.size, 1), check)
    with contextlib.ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        head += _exactly(source, _LENGTHS.size - len(head), check) if head else b""
        if not head:
            raise EOFError
        num_body, num_shared = _LENGTHS.unpack(head)
        body = io.BytesIO(_exactly(source, num_body, check))
        sizes = pickle.load(body)
        if num_shared and not descriptors:
            raise LostMemory
        try:
            buffers = _mapped(descriptors[0], num_shared, sizes) if sizes else []
        except OSError:
            raise LostMemory from None
    return pickle.load(body, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Tensors go as the arrays that share their memory."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _pickled(item: Any, callback: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    body = io.BytesIO()
    _Pickler(body, protocol=5, buffer_callback=callback).dump(item)
    return body.getvalue()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _shared(large: Sequence[memoryview]) -> int | None:
    """A descriptor of memory that holds these, one after the other; None where there is none."""
    try:
        descriptor = os.memfd_create("rsb")
    except (AttributeError, OSError):
        return None
    try:
        os.ftruncate(descriptor, sum(map(_aligned, map(len, large))))
        start = 0
        for raw in large:
            done = 0
            while done < len(raw):
                done += os.pwrite(descriptor, raw[done:], start + done)
            start += _aligned(len(raw))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _mapped(descriptor: int, num_bytes: int, sizes: Sequence[int]) -> list[memoryview]:
    memory = memoryview(mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | _POPULATE))
    starts = np.cumsum([0, *map(_aligned, sizes)]).tolist()
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _exactly(source: socket.socket, num_bytes: int, check: Callable[[], None]) -> bytearray:
    content, done = bytearray(num_bytes), 0
    view = memoryview(content)
    while done < num_bytes:
        num_new = _patient(lambda: source.recv_into(view[done:]), check)  # noqa: B023 called here
        if not num_new:
            raise EOFError
        done += num_new
    return content


def _patient(ask: Callable[[], Result], check: Callable[[], None]) -> Result:
    while True:
        try:
            return ask()
        except TimeoutError:
            check()
