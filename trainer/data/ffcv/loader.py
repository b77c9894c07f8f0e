"""ffcv 1.0.2 as a decoder: rows of numbers in, image squares out, in order.

Only its file reader and its library with TurboJPEG are used; its loader has these traps. It samples
crops from generators that cannot be seeded (here they are part of the rows); its decoder uses the
fast DCT and its callers ignore a JPEG that does not decode (here its TurboJPEG is called with the
exact DCT, and each image's return code is checked); an exception in its thread leaves the main
thread waiting forever (here it is passed on); it sets torch's number of threads; it builds Python
sets for every image and reserves memory for a whole one in each slot; its batches are in slots that
are overwritten (here the decoding thread copies them out).

Importing this leaves torch's and numba's settings as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch

from trainer.data.ffcv import resize as ffcv_resize


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """ffcv sets torch's and numba's number of threads where it is imported; numba starts its
    threads there.

    Of its threading layers numba's own ("workqueue") ends the process where two threads call it at
    a time: "omp" is asked for, and the setting put back.
    """
    torch_threads, layer = torch.get_num_threads(), numba.config.THREADING_LAYER
    numba.config.THREADING_LAYER = "omp"
    numba_threads = numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)
        numba.config.THREADING_LAYER = layer


with _settings_kept():
    from ffcv.libffcv import lib
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE

# The columns of a row: what is made of one image, in its own stored pixels; num_bytes: as it is
# stored.
COLUMNS = (
    "image",
    "num_bytes",
    "top",
    "left",
    "height",
    "width",
    "is_bicubic",
    "is_down_first",
    "is_flipped",
    "side",
)
_IMAGE, _BYTES, _TOP, _LEFT, _HEIGHT, _WIDTH, _BICUBIC, _DOWN, _FLIPPED, _SIDE = range(len(COLUMNS))
_AHEAD = 3  # batches in the queue
_WAIT_S = 1.0  # between two checks that the thread is alive
_RGB, _NO_FLAGS = 0, 0  # TJPF_RGB; without TJFLAG_FASTDCT, whose pixels differ from PIL's

# found through ffcv's own library, which is linked with them
_tj_new, _tj_decode, _tj_free = lib.tjInitDecompress, lib.tjDecompress2, lib.tjDestroy
_tj_new.argtypes, _tj_new.restype = (), ctypes.c_void_p
_tj_free.argtypes, _tj_free.restype = (ctypes.c_void_p,), ctypes.c_int
_tj_decode.argtypes = (
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    *[ctypes.c_int] * 5,
)
_tj_decode.restype = ctypes.c_int


def _decode_jpeg(content, image):
    """Decode a JPEG into [H, W, 3] uint8, for numba; gives 0, or -1 where the JPEG has a fault of
    any kind.
    """
    height, width = image.shape[0], image.shape[1]
    decoder = _tj_new()
    code = _tj_decode(
        decoder,
        content.ctypes.data,
        content.size,
        image.ctypes.data,
        width,
        0,
        height,
        _RGB,
        _NO_FLAGS,
    )
    _tj_free(decoder)
    return code


@lru_cache(maxsize=2)
def _compiled(is_parallel: bool) -> Callable:
    """The loop over a batch: decodes, crops, resizes and flips as the rows say; compiled once,
    which takes seconds.

    Gives squares [b, C, side, side] uint8 and return codes [b], 0 where an image is whole, both in
    `memory`.
    """
    images = numba.prange if is_parallel else range
    decode_jpeg = numba.njit(fastmath=True, nogil=True, error_model="numpy")(_decode_jpeg)
    crop_and_resize = ffcv_resize.crop_and_resize

    def decode(rows, memory, metadata, content_of_file):
        """The squares of a batch's rows and the decoder's answer for each, 0 where it is whole.

        Rows of one image in a row share its decoding.
        """
        squares, codes = memory
        for place in images(len(rows)):
            row = rows[place]
            if place > 0 and rows[place - 1][_IMAGE] == row[_IMAGE]:
                continue
            stored = metadata[row[_IMAGE]]
            first = np.int64(stored["data_ptr"])
            content = content_of_file[first : first + row[_BYTES]]
            height, width = np.int64(stored["height"]), np.int64(stored["width"])
            if stored["mode"] == 0:
                image = np.empty((height, width, 3), np.uint8)
                code = decode_jpeg(content, image)
            else:
                image = content.reshape(height, width, 3)
                code = 0
            for repeat in range(place, len(rows)):
                row = rows[repeat]
                if row[_IMAGE] != rows[place][_IMAGE]:
                    break
                codes[repeat] = code
                crop_and_resize(
                    image,
                    row[_TOP],
                    row[_LEFT],
                    row[_HEIGHT],
                    row[_WIDTH],
                    row[_SIDE],
                    row[_BICUBIC] != 0,
                    row[_DOWN] != 0,
                    row[_FLIPPED] != 0,
                    squares[repeat],
                )
        return squares, codes

    return numba.njit(fastmath=True, nogil=True, error_model="numpy", parallel=is_parallel)(decode)


class _LeanReader(Reader):
    """A reader that maps the metadata, and leaves the table of places to the rows."""

    def read_metadata(self):
        offset = self.header.dtype.itemsize + self.field_descriptors.nbytes
        self.metadata = np.memmap(
            self._fname, self.metadata_type, "r", offset, (int(self.num_samples),)
        )

    def read_allocation_table(self):
        self.alloc_table = np.empty(0, ALLOC_TABLE_TYPE)


class _Raised(NamedTuple):
    """What the thread raised, not an item."""

    error: BaseException


class _Batches(threading.Thread):
    """A thread over keys: rows_of(key) gives a batch's rows, finish(key, squares, codes) what is
    made of it.
    """

    def __init__(
        self,
        path: Path,
        num_channels: int,
        side: int,
        largest_batch: int,
        num_threads: int,
        keys: Iterable,
        rows_of: Callable,
        finish: Callable,
        device: str,
    ) -> None:
        super().__init__(name="ffcv", daemon=True)
        self.keys, self.rows_of, self.finish = keys, rows_of, finish
        self.gpu = torch.cuda.current_device() if device.startswith("cuda") else None
        self.num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)
        if numba.threading_layer() == "workqueue":  # started by somebody else; see _settings_kept
            self.num_threads = 1
        reader = _LeanReader(str(path))
        self._metadata = reader.metadata[f"f{list(reader.handlers).index('image')}"]
        self._content = np.memmap(str(path), np.uint8, "r")
        self._squares = np.empty((largest_batch, num_channels, side, side), np.uint8)
        self._codes = np.empty(largest_batch, np.int64)
        self._made: queue.Queue = queue.Queue(_AHEAD)
        self._is_over = threading.Event()
        self.start()

    def run(self) -> None:
        """Decode one batch after the other; an exception is passed to the consumer."""
        try:
            if self.gpu is not None:
                torch.cuda.set_device(self.gpu)  # a thread begins with the first
            numba.set_num_threads(self.num_threads)  # of this thread
            for key in self.keys:
                if self._is_over.is_set():
                    return
                self._put(self.finish(key, *self.decoded(self.rows_of(key))))
            self._put(None)
        except BaseException as error:
            self._put(_Raised(error))

    def _put(self, item) -> None:
        while not self._is_over.is_set():
            try:
                return self._made.put(item, timeout=_WAIT_S)
            except queue.Full:
                continue

    def end(self) -> None:
        """Have the thread end, which may wait for room."""
        self._is_over.set()
        while (
            self.is_alive() and not sys.is_finalizing()
        ):  # where a thread stands still and counts as alive
            with contextlib.suppress(queue.Empty):
                self._made.get(timeout=0.05)

    def decoded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squares and return codes of rows, both written over by the next call."""
        assert len(rows) <= len(self._codes), "more rows than there is room for"
        memory = self._squares[: len(rows)], self._codes[: len(rows)]
        squares, codes = _compiled(self.num_threads > 1)(
            rows, memory, self._metadata, self._content
        )
        side = int(rows[0, _SIDE])
        return squares[:, :, :side, :side], codes

    def items(self, check: Callable[[], None]) -> Iterator:
        while True:
            try:
                found = self._made.get(timeout=_WAIT_S)
            except queue.Empty:
                if not self.is_alive() and self._made.empty():
                    raise RuntimeError("ffcv's thread has ended without an error") from None
                check()
                continue
            if found is None:
                return
            if isinstance(found, _Raised):
                raise found.error
            yield found


def batches(
    path: Path,
    num_channels: int,
    largest_side: int,
    largest_batch: int,
    num_threads: int,
    keys: Iterable,
    rows_of: Callable,
    finish: Callable,
    device: str,
    check: Callable[[], None] = lambda: None,
) -> Iterator:
    """What `finish` makes of each key's batch, in order; made by a thread of its own, a few ahead.

    rows_of(key): [b, len(COLUMNS)] int64, b <= largest_batch. finish(key, squares [b, C, side,
    side] uint8, codes [b]): called in that thread; the arrays are written over later; a code other
    than 0 is a JPEG that did not decode cleanly. check: called once a second while a batch is
    awaited; what it raises ends the wait.
    """
    threads = max(1, num_threads)
    made = _Batches(
        path, num_channels, largest_side, largest_batch, threads, keys, rows_of, finish, device
    )
    try:
        yield from made.items(check)
    finally:
        made.end()
