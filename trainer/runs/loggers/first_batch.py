"""Pictures that a run leaves for its reader."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from trainer.base.terminal import readable

NUM_SHOWN = 16


def draw_first_batch(
    path: Path, images: torch.Tensor, targets: torch.Tensor, profile, classes: list[str]
) -> None:
    """Draw the first augmented micro-batch as the model sees it, each image under its mixed
    targets.

    images: [B, C, H, W] float, normalized; of more than three channels the first three are shown as
    red, green and blue, of two the first in grey. targets: [B, K] float in [0, 1].
    """
    shown = images[:NUM_SHOWN].detach().float().cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (profile.mean, profile.std))
    pictures = _as_rgb((shown * std + mean).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    columns = 8
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), dpi=110, layout="constrained")
    for place, (picture, target) in enumerate(
        zip(pictures, targets[:NUM_SHOWN].detach().float().cpu(), strict=False)
    ):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(picture, interpolation="nearest")
        # the name of a class is a folder's: a $ in it is no formula
        axes.set_title(readable(_target_text(target, classes)), fontsize=8, parse_math=False)
        axes.axis("off")
    figure.savefig(path)


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _target_text(target: torch.Tensor, classes: list[str]) -> str:
    """The two heaviest classes of a target, above what smoothing gives to every class."""
    floor = float(target.min()) + 1e-3
    values, places = target.topk(min(2, len(target)))
    parts = [
        f"{classes[int(place)][:12]} {float(value):.2f}"
        for value, place in zip(values, places, strict=False)
        if float(value) > floor
    ]
    return "\n".join(parts)
