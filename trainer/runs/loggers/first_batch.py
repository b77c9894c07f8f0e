"""Pictures that a run leaves for its reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from trainer.base.terminal import readable
from trainer.tasks import Task

NUM_SHOWN = 16


def draw_first_batch(
    path: Path, images: torch.Tensor, targets: torch.Tensor, task: Task, classes: Sequence[str]
) -> None:
    """Draw the first augmented micro-batch as the model sees it, each image with its target as its
    task shows it.

    images: [B, C, H, W] float, normalized; of more than three channels the first three are shown as
    red, green and blue, of two the first in grey. targets: [B, ...].
    """
    profile = task.plan.profile
    first = images[:NUM_SHOWN].detach().float().cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (profile.mean, profile.std))
    pictures = _as_rgb((first * std + mean).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    columns = 8
    shown = task.shown(pictures, targets[:NUM_SHOWN].detach().cpu(), classes)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), dpi=110, layout="constrained")
    for place, (picture, title) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(picture, interpolation="nearest")
        # the name of a class is a folder's: a $ in it is no formula
        axes.set_title(readable(title), fontsize=8, parse_math=False)
        axes.axis("off")
    figure.savefig(path)


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
