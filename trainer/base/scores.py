"""Names of scores: in percent, they end in _pct wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASSIFICATION = "classification"  # the task of a recipe, of data and of a row that name none
_LABELS = {"top1_pct": "top-1", "top5_pct": "top-5", "map_pct": "mAP", "map50_pct": "mAP@50"}


def score_label(name: str) -> str:
    """A score's name for a reader, without its unit: mIoU of mIoU_pct."""
    return _LABELS.get(name, name.removesuffix("_pct").replace("_", " "))


def main_score(line: Mapping[str, Any]) -> tuple[str, float] | None:
    """The main score in a line of metrics.jsonl, by its name: the first of its percentages."""
    found = next((item for item in line.items() if item[0].endswith("_pct")), None)
    is_number = found and isinstance(found[1], int | float) and not isinstance(found[1], bool)
    return found if is_number else None
