"""An ablation: one question, its page, and the cells that answer it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.cells import Cell
from trainer.errors import UserError
from trainer.ingredients.base import Page


class AblationError(UserError):
    """An ablation that is not there."""


class AblationPage(Page):
    """The typed page."""

    name: str
    title: str
    question: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Ablation:
    """A page with its cells worked out: planned, checked against each other, the base of each group first.

    seeds: every cell is run with each. page: as written. path: of its file.
    """

    name: str
    question: str
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    page: AblationPage
    path: Path


def find_ablation(name: str) -> Path:
    """The page that a name means: ablations/<name>.yaml, or the path to a .yaml file.

    Raises AblationError for a name that no page has.
    """
    raise NotImplementedError


def load_ablation(source: Path | str) -> Ablation:
    """The ablation on a page, by name or path: every cell planned, nothing run, no image read.

    Raises UserError, for a mistake in the page as `file:line: what was found; what would do`.
    """
    raise NotImplementedError
