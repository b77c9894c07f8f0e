"""keep=best: beside a run's last weights those of the epoch with the best score.

Which epoch that is the validation images have chosen, so its score on them is no result: the row's
score stays that of the last epoch, and `Row.best_epoch` says that there are other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from trainer.base.disk import write_atomically

BEST_FILE = "best.safetensors"


def keep_if_best(folder: Path, model: nn.Module, curve: Mapping[int, float]) -> None:
    """Write a model's weights where its last epoch is better than all before. curve: the main score
    by epoch. Raises OSError.
    """
    epoch = max(curve)
    if any(curve[epoch] <= score for before, score in curve.items() if before < epoch):
        return
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    facts = {"format": "pt", "epoch": str(epoch), "score_pct": repr(curve[epoch])}
    write_atomically(folder / BEST_FILE, safetensors.torch.save(tensors, metadata=facts))


def best_epoch(folder: Path, curve: Mapping[int, float]) -> int | None:
    """The epoch whose weights were kept; None where there are none, or they are not this curve's
    best: a process that was killed had written them, and the epoch came out otherwise when it was
    trained again.
    """
    try:
        with safetensors.safe_open(folder / BEST_FILE, "pt") as file:
            facts = file.metadata() or {}
        epoch, score = int(facts["epoch"]), float(facts["score_pct"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        return None
    return epoch if curve.get(epoch) == score == max(curve.values()) else None
