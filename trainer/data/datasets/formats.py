"""The interface of formats that pack many images into a file; subclasses register themselves, here
or in a plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol

from trainer.base.errors import UserError
from trainer.data.datasets.listing import Listing


class Reader(Protocol):
    """Reads the images of a split's files; each process makes its own."""

    def content(self, file: int, start: int, size: int) -> bytes:
        """One image's bytes at its place in the listing. Raises OSError or ValueError."""


class FileFormat(ABC):
    """A format of files that hold many images each. Defining a subclass with a `name` registers it.

    title: such a folder's name in messages. example: files of a split, {} for the split's name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    example: ClassVar[str]

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        where, there = f"{cls.__module__}.{cls.__qualname__}", FORMATS.get(getattr(cls, "name", ""))
        if there is not None and f"{type(there).__module__}.{type(there).__qualname__}" != where:
            raise UserError(
                f"{where}: the format {cls.name} is registered already; use another name"
            )
        asked = ("name", "title", "example", "files", "scan", "reader")
        # ABCMeta looks for abstract methods only after this
        missing = [
            key for key in asked if getattr(cls, key, None) is getattr(FileFormat, key, None)
        ]
        if missing:
            raise UserError(f"{where}: a FileFormat needs {', '.join(missing)}; define them")
        FORMATS[cls.name] = cls()

    @abstractmethod
    def files(self, root: Path, split: str) -> list[Path]:
        """The files of a split, "train" or "val", sorted by name; none where a folder has no such
        files.
        """

    @abstractmethod
    def scan(self, paths: list[Path]) -> Listing:
        """Every image of the files with its label. Raises DataError for what is damaged, or has no
        images or labels.
        """

    @abstractmethod
    def reader(self, paths: list[Path]) -> Reader:
        """A reader of the images in a listing."""


FORMATS: dict[str, FileFormat] = {}
