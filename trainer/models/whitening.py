"""First filters that make the numbers of an image's patches uncorrelated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from trainer.models.edit.replacement import Replacement, ReplacementError
from trainer.models.spec import Whitening

if TYPE_CHECKING:
    from trainer.recipe.plan import PatchSums, Plan


def whiten(model: nn.Module, whitening: Whitening, plan: Plan) -> Replacement:
    """Set the filters of a model's first convolution as a recipe's `model.whitening` says, and keep
    them from training. Before the images are open they stay random.

    Raises ReplacementError where it has other filters than these.
    """
    side, channels = whitening.patch_px, plan.profile.channels
    number = 2 * channels * side**2
    named = model.named_modules()
    name, first = next(
        ((name, one) for name, one in named if isinstance(one, nn.Conv2d)), ("", None)
    )
    wanted = number, channels, side, side
    if first is None or tuple(first.weight.shape) != wanted:
        raise ReplacementError(
            f"model.whitening: needs a first convolution of {number} filters of {side}x{side}, as"
            " this model has none",
            "use model=airbench94, or leave model.whitening out",
        )
    after = f"{number} filters from the patches of {whitening.images:,} training images"
    if plan.patches is not None:
        profile = plan.profile
        filters = whitening_filters(plan.patches, profile.mean, profile.std, whitening.eps)
        shaped = torch.from_numpy(filters.reshape(wanted))
        with torch.no_grad():
            first.weight.copy_(shaped)
    first.weight.requires_grad_(False)
    return Replacement("whitening", (("Conv2d", 1),), after, (name,))


def whitening_filters(
    patches: PatchSums, mean: Sequence[float], std: Sequence[float], eps: float
) -> np.ndarray:
    """The filters [2 * N, N] float64 for patches of N values, normalized by mean and std: the
    eigenvectors of their mean outer product, from the smallest eigenvalue on, each over
    sqrt(eigenvalue + eps), and then their negatives.

    An eigenvector has two signs: here its largest number is positive.
    """
    size = len(patches.sums)
    each = size // len(mean)
    shift, scale = (255 * np.repeat(np.array(one), each) for one in (mean, std))
    first = np.array(patches.sums) / patches.number - shift
    products = np.array(patches.products) / patches.number
    # E[(p - s)(p - s)'] = E[pp'] - ss' - s(E[p] - s)' - (E[p] - s)s'
    crossed = np.outer(shift, first)
    moment = products - np.outer(shift, shift) - crossed - crossed.T
    values, vectors = np.linalg.eigh(moment / np.outer(scale, scale))
    rows = vectors.T
    rows = rows * np.sign(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], axis=1))
    filters = rows / np.sqrt(values + eps)[:, None]
    return np.concatenate([filters, -filters])
