"""Have runs learned anything that their score shows?"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.base.stats import is_above_pct
from trainer.runs.results import Row


def chance_warning(rows: Sequence[Row]) -> str:
    """One line where none of the finished runs, of two at least, is above what always answering
    the most frequent class scores, at 95 %; empty where one is, or where a row does not know.
    """
    scores = [
        (row.top1_pct, row.majority_pct, row.num_val_images)
        for row in rows
        if row.status == "finished"
    ]
    if len(scores) < 2 or any(
        top1 is None or constant is None or is_above_pct(top1, constant, number)
        for top1, constant, number in scores
    ):
        return ""
    return (
        f"no run is above chance: always answering the most frequent class has top-1 of"
        f" {scores[0][1]:.1f} %, and none of the {len(scores)} is better beyond noise: their"
        " differences say nothing; train longer, or at another rate"
    )
