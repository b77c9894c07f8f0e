"""What identifies a run: a digest of exact values, never of text that was rounded for reading."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.runs.results import Row

_AGAIN = re.compile(r"(?<=-[0-9a-f]{6})-\d+$")  # what again=1 appends to a run's name


@dataclass(frozen=True)
class RunIdentity:
    """All that may change the score of a run, but for the bytes of its images.

    prefix: `<recipe>.v<N>-<model>-<data>-s<seed>-`, how the run's name begins. science: exact JSON
    values: the resolved recipe's digest, model, what the data profile says of the images, seed,
    bad_images, and the digests of plugins where there are any.
    """

    prefix: str
    science: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """16 hex digits: names the run where its images have not been read."""
        return _digest([self.prefix, self.science])[:16]

    def run_name(self, data_fingerprint: str) -> str:
        """The run's name over these images: the prefix and 6 hex digits of all the rest."""
        return self.prefix + _digest({**self.science, "data": data_fingerprint})[:6]

    def is_of(self, row: Row) -> bool:
        """Is it the row of such a run, be it one that again=1 made?"""
        return self.run_name(row.data_fingerprint) == first_name(row.run)


def first_name(run: str) -> str:
    """The name of a run's first repetition: without what again=1 appended."""
    return _AGAIN.sub("", run)


def is_repetition(run: str) -> bool:
    """Did again=1 make this run beside another one of the same identity?"""
    return _AGAIN.search(run) is not None


def _digest(values: Any) -> str:
    """sha256 in hex of values as JSON, floats by their shortest exact text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
