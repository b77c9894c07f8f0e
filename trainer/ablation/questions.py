"""What a table needs of an ablation file: its cells and what identifies their runs, without their
plans.

Working out an ablation file takes torch and timm: seconds, and most of a gigabyte. So the result is
cached in the user's cache folder under a digest of all that it follows from: the file, every
recipe, timm's version and CACHE_VERSION. A file that names files of its own is worked out each
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.ablation.cells import Cell, plan_of_cell
from trainer.base.cache import cache_folder
from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.base.provenance import package_version, shipped_folder
from trainer.recipe.identity import RunIdentity
from trainer.recipe.profiles import PROFILES

if TYPE_CHECKING:
    from trainer.ablation.spec import Ablation
    from trainer.recipe.plan import Plan

# Raise it with every change to identities, Question or what an ablation file expands to: the cached
# questions and the index of rows (report/rows.py) are built anew then.
# tests/ablation/test_questions.py reminds.
CACHE_VERSION = 4


@dataclass(frozen=True)
class Question:
    """An ablation without its plans.

    identities: of every run that it asks for, by (cell's name, seed). prefixes: how the names of
    its runs begin: `<recipe>.v<N>-<model>-<data>-s`. smallest: difference of interest, in points.
    word: what ablation= takes for it, the name of one that comes with the suite, or the path that
    was given.
    """

    name: str
    title: str
    question: str
    source: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    identities: Mapping[tuple[str, int], RunIdentity]
    prefixes: tuple[str, ...]
    smallest: float
    word: str = ""


def open_question(source: Path | str) -> Question:
    """The question of an ablation, by name or path.

    Raises UserError for a mistake in the file.
    """
    return replace(_open(source), word=_word(source))


def _word(source: Path | str) -> str:
    path = Path(source)
    is_shipped = path.resolve().parent == shipped_folder("ablations").resolve()
    return path.stem if is_shipped or not _is_path(source) else str(source)


def _is_path(source: Path | str) -> bool:
    return isinstance(source, Path) or source.endswith((".yaml", ".yml"))


def _open(source: Path | str) -> Question:
    record = _record(source)
    if record is not None and record.exists():
        try:
            return _read(record)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a damaged cache is no cache
    from trainer.ablation.spec import (
        load_ablation,  # torch and timm: only where the cache has nothing
    )

    ablation = load_ablation(source)
    question = question_of(ablation)
    if record is not None and not _names_files(ablation):
        _write(record, question)
    return question


def shipped_ablations() -> list[Path]:
    """The files of the ablations that come with the suite, by name."""
    return sorted(shipped_folder("ablations").glob("*.yaml"))


def question_of(ablation: Ablation) -> Question:
    """An ablation without its plans."""
    identities = {
        (cell.name, seed): plan_of_cell(cell, seed).identity
        for cell in ablation.cells
        for seed in ablation.seeds
    }
    plans = [plan_of_cell(cell, ablation.seeds[0]) for cell in ablation.cells]
    prefixes = {
        f"{plan.recipe.name}.v{plan.recipe.version}-{plan.model}-{plan.profile.name}-s"
        for plan in plans
    }
    cells = tuple(replace(cell, plan=None, loss=_loss_of(cell.planned)) for cell in ablation.cells)
    facts = ablation.name, ablation.title, ablation.question, ablation.page.source, ablation.seeds
    return Question(
        *facts, cells, identities, tuple(sorted(prefixes)), ablation.page.smallest_points
    )


def _loss_of(plan: Plan) -> str:
    """A plan's loss as JSON, without what is off."""
    return json.dumps(plan.recipe.loss.model_dump(exclude_none=True), sort_keys=True)


def _record(source: Path | str) -> Path | None:
    """Where the question of a file is kept; None where the file is not found without working it
    out.
    """
    file = Path(source) if _is_path(source) else shipped_folder("ablations") / f"{source}.yaml"
    if not file.is_file():
        return None
    digest = hashlib.sha256(f"{CACHE_VERSION} {package_version('timm')} {file.stem}".encode())
    recipes = shipped_folder("recipes").glob("*.yaml")
    for path in [file, *sorted(recipes)]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return cache_folder() / "questions" / f"{digest.hexdigest()[:32]}.json"


def _names_files(ablation: Ablation) -> bool:
    """Does the file depend on more than is in the digest: profiles, recipes or images of the user's
    own?
    """
    return any(
        cell.data not in PROFILES or cell.recipe.endswith((".yaml", ".yml"))
        for cell in ablation.cells
    )


def _write(record: Path, question: Question) -> None:
    cells = [
        {key: value for key, value in asdict(cell).items() if key != "plan"}
        for cell in question.cells
    ]
    identities = [
        [name, seed, run.prefix, run.science] for (name, seed), run in question.identities.items()
    ]
    content = {**vars(question), "cells": cells, "identities": identities}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(content).encode())
    except OSError:
        pass  # without a cache it is only slower


def _read(record: Path) -> Question:
    content = json_file(record)
    cells = tuple(
        Cell(**{**cell, "levels": tuple((factor, level) for factor, level in cell["levels"])})
        for cell in content["cells"]
    )
    identities = {(name, seed): RunIdentity(*run) for name, seed, *run in content["identities"]}
    tuples = {"seeds": tuple(content["seeds"]), "prefixes": tuple(content["prefixes"])}
    return Question(**{**content, **tuples, "cells": cells, "identities": identities})
