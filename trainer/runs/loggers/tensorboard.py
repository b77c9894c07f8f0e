"""The curves once more, as TensorBoard reads them."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from trainer.runs.append_only_log import KeptFile
from trainer.runs.loggers.tracker import Tracker

# two boards of one process may be opened in one second, and TensorBoard sorts files by name
_numbers = itertools.count()


class Board(Tracker):
    """An event file of TensorBoard's, written record by record and without a thread: what the disk
    does not take is kept.

    first_step: where this process resumes the run: TensorBoard hides the points from there on that
    stand there already. Points are written at steps done, so the one at first_step belongs to what
    was saved.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}"
        name = f"events.out.tfevents.{time.time():010.0f}.{process}"
        self.file = KeptFile(folder / name)
        self._records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._hide_from(first_step + 1 if first_step else 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._add(step=step, summary=image(name, pixels, dataformats="HWC"))

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        self.file.close()

    def _hide_from(self, step: int) -> None:
        self._add(step=step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **facts) -> None:
        self._records.write(Event(wall_time=time.time(), **facts).SerializeToString())
