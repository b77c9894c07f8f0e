"""What a format of files that hold many images is; each comes as a class, here or in anybody's
file, and is found by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol

from trainer.base.errors import UserError
from trainer.data.datasets.listing import Listing


class Reader(Protocol):
    """The images of a split's files, in this process: it is made anew in every one."""

    def content(self, file: int, start: int, size: int) -> bytes:
        """The bytes of one image's file, from where the listing says. Raises OSError or
        ValueError.
        """


class FileFormat(ABC):
    """A format of files that hold many images each. To define a class with a `name` is to register
    it.

    title: what a folder of such files is called in messages. example: files of a split, {} standing
    for its name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    example: ClassVar[str]

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        where, there = f"{cls.__module__}.{cls.__qualname__}", FORMATS.get(getattr(cls, "name", ""))
        if there is not None and f"{type(there).__module__}.{type(there).__qualname__}" != where:
            raise UserError(f"{where}: the format {cls.name} is there already; choose another name")
        asked = ("name", "title", "example", "files", "scan", "reader")
        # ABCMeta looks for abstract methods only after this
        missing = [
            key for key in asked if getattr(cls, key, None) is getattr(FileFormat, key, None)
        ]
        if missing:
            raise UserError(
                f"{where}: a format of files needs {', '.join(missing)}; write what FileFormat says"
            )
        FORMATS[cls.name] = cls()

    @abstractmethod
    def files(self, root: Path, split: str) -> list[Path]:
        """The files of a split, "train" or "val", sorted by name; none where a folder holds no such
        files.
        """

    @abstractmethod
    def scan(self, paths: list[Path]) -> Listing:
        """Every image of the files with its label. Raises DataError for what is damaged, or has no
        images or labels.
        """

    @abstractmethod
    def reader(self, paths: list[Path]) -> Reader:
        """What reads the images that a listing has found."""


FORMATS: dict[str, FileFormat] = {}
