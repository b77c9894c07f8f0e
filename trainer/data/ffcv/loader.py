"""ffcv 1.0.2 as an engine: rows of numbers in, squares out, in the order of the rows' own iterator.

Its traps, and the way round each: it draws crops from generators that no seed reaches (ours come as numbers, with the
rows); its decoder takes the fast transform and its callers ignore a JPEG that does not decode (we call its
TurboJPEG with the exact one, and each image's return code comes out beside it); an exception in its
thread leaves the main one waiting for ever (it is passed on); it sets torch's number of threads (it no longer does);
for every image it builds Python sets and reserves a whole one's memory in each slot (we hand it an empty table, and a
decoder that reserves squares); its batches lie in slots that are written over (they are copied out by its own thread).
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numba
import numpy as np
import torch

from trainer.data.ffcv import resize as ffcv_resize

numba.config.THREADING_LAYER = (
    "omp"  # numba's own layer ends the process where two threads call it at a time
)
_torch_threads = torch.get_num_threads()

from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import lib  # noqa: E402
from ffcv.loader import epoch_iterator  # noqa: E402
from ffcv.memory_managers import OSCacheManager  # noqa: E402
from ffcv.pipeline import Compiler, PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.graph import Graph  # noqa: E402
from ffcv.reader import Reader  # noqa: E402
from ffcv.types import ALLOC_TABLE_TYPE  # noqa: E402

torch.set_num_threads(_torch_threads)
epoch_iterator.IS_CUDA = False  # its slots never reach the GPU: what is copied out of them does

# The columns of a row: what is made of one image, in its own stored pixels; num_bytes: as it is stored.
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
_WAIT_S = 1.0  # between two looks whether the thread is alive
_RGB, _NO_FLAGS = (
    0,
    0,
)  # TurboJPEG's TJPF_RGB; no TJFLAG_FASTDCT, with which pixels are others than PIL's

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
    """Decode a JPEG into [H, W, 3] uint8, for numba; gives 0, or -1 where the JPEG has a fault of any kind."""
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


def _set_num_threads(compiler, number: int) -> None:
    """numba's number of threads, and not torch's."""
    compiler.num_threads = max(1, min(number, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(compiler.num_threads)


Compiler.set_num_threads = classmethod(_set_num_threads)


class DrawnCropDecoder(SimpleRGBImageDecoder):
    """Decodes, crops, resizes and flips as its rows say: (squares [b, C, side, side] uint8, return codes [b])."""

    def __init__(self, num_channels: int, side: int):
        super().__init__()
        self.num_channels, self.side = num_channels, side

    def declare_state_and_memory(self, previous_state):
        """Squares of the largest side, and a return code for each."""
        shape = (self.num_channels, self.side, self.side)
        squares = AllocationQuery(shape, np.dtype("u1"))
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
        return state, (squares, AllocationQuery((), np.dtype("i8")))

    def generate_code(self) -> Callable:
        """The loop over a batch, for numba."""
        images = Compiler.get_iterator()
        decode_jpeg = Compiler.compile(_decode_jpeg)
        crop_and_resize = ffcv_resize.crop_and_resize

        def decode(rows, memory, metadata, storage_state):
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
                content = storage_state[0][first : first + row[_BYTES]]
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

        decode.is_parallel = True
        return decode


class _LeanReader(Reader):
    """A reader that maps the metadata, and leaves the table of places to the rows."""

    def read_metadata(self):
        offset = self.header.dtype.itemsize + self.field_descriptors.nbytes
        self.metadata = np.memmap(
            self._fname, self.metadata_type, "r", offset, (int(self.num_samples),)
        )

    def read_allocation_table(self):
        self.alloc_table = np.empty(0, ALLOC_TABLE_TYPE)


@lru_cache(maxsize=2)
def _compiled(is_parallel: bool) -> Callable:
    """The decoder's loop, compiled once for a process: ffcv would compile it for every loader, which takes seconds."""
    Compiler.num_threads = 2 if is_parallel else 1
    return Compiler.compile(DrawnCropDecoder(3, 1).generate_code())


def _engine(path: Path, num_channels: int, side: int, num_threads: int) -> SimpleNamespace:
    """What ffcv's iterator wants of a loader; its graph holds the one field that we read."""
    decode = _compiled(num_threads > 1)
    Compiler.set_num_threads(num_threads)
    reader = _LeanReader(str(path))
    spec = PipelineSpec("image", decoder=DrawnCropDecoder(num_channels, side), transforms=[])
    field = list(reader.handlers).index("image")
    graph = Graph({"image": spec}, reader.handlers, {"image": field}, reader.metadata, None)
    node = graph.nodes[0].id

    def stage(batch_indices, metadata, storage_state, **memory):
        return (
            decode(batch_indices, memory[f"memory_{node}"], metadata[f"f{field}"], storage_state),
        )

    code = [(stage, [node])], [node]
    cache = OSCacheManager(reader)
    return SimpleNamespace(
        reader=reader, memory_manager=cache, graph=graph, code=code, num_workers=num_threads
    )


class _Raised(NamedTuple):
    """What its thread raised, not an item."""

    error: BaseException


class _Batches(epoch_iterator.EpochIterator):
    """ffcv's thread over keys: rows_of(key) gives a batch's rows, finish(key, squares, codes) what is made of it."""

    def __init__(
        self,
        engine: SimpleNamespace,
        largest_batch: int,
        keys: Iterable,
        rows_of: Callable,
        finish: Callable,
        device: str,
    ):
        self.keys, self.rows_of, self.finish = keys, rows_of, finish
        self.gpu = torch.cuda.current_device() if device.startswith("cuda") else None
        loader = SimpleNamespace(
            **vars(engine), batch_size=largest_batch, batches_ahead=_AHEAD, traversal_order=None
        )
        super().__init__(loader, ())

    def run(self) -> None:
        """As ffcv's, over keys; an exception goes to whoever waits for a batch."""
        try:
            if self.gpu is not None:
                torch.cuda.set_device(self.gpu)  # a thread begins with the first
            self.iter_ixes = iter(self.keys)
            super().run()
        except BaseException as error:
            self._put(error)

    def _put(self, error: BaseException) -> None:
        while not self.terminate_event.is_set():
            try:
                return self.output_queue.put((None, _Raised(error)), timeout=_WAIT_S)
            except queue.Full:
                continue

    def end(self) -> None:
        """Have its thread end, which may wait for room to say that it is done."""
        self.close()
        while (
            self.is_alive() and not sys.is_finalizing()
        ):  # where a thread stands still and counts as alive
            with contextlib.suppress(queue.Empty):
                self.output_queue.get(timeout=0.05)

    def run_pipeline(self, number, key, slot, event):
        """One batch, copied out of its slot."""
        return self.finish(key, *self.decoded(self.rows_of(key), slot))

    def decoded(self, rows: np.ndarray, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Squares and return codes of rows; both lie in the slot."""
        assert len(rows) <= self.loader.batch_size, "more rows than a slot has room for"
        ((squares, codes),) = super().run_pipeline(0, rows, slot, None)
        side = int(rows[0, _SIDE])
        return squares[:, :, :side, :side], codes

    def __next__(self):
        while True:
            try:
                found = self.output_queue.get(timeout=_WAIT_S)
                break
            except queue.Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise RuntimeError("ffcv's thread has ended without a word") from None
        if found is None:
            raise StopIteration
        if isinstance(found[1], _Raised):
            raise found[1].error
        return found[1]


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
) -> Iterator:
    """What `finish` makes of each key's batch, in order; made by a thread of its own, a few ahead.

    rows_of(key): [b, len(COLUMNS)] int64, b <= largest_batch. finish(key, squares [b, C, side, side] uint8, codes [b]):
    called in that thread; the arrays are written over later; a code other than 0 is a JPEG that did not decode cleanly.
    """
    engine = _engine(path, num_channels, largest_side, max(1, num_threads))
    made = _Batches(engine, largest_batch, keys, rows_of, finish, device)
    try:
        yield from made
    finally:
        made.end()
