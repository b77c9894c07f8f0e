"""Which boxes each of many candidates is to answer with: by overlap, several for each box.

Source: Ouyang-Zhang et al. 2022, arXiv:2212.06137; jozhang97/DETA at 0a9ce48d: models/assigner.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou


class Pairs(NamedTuple):
    """candidates, boxes: [P] int64 each, box after box. A candidate that is among the best of two
    boxes stands with both.
    """

    candidates: Tensor
    boxes: Tensor


@torch.no_grad()
def assigned(boxes: Tensor, candidates: Tensor, least_iou: float, most_per_box: int) -> Pairs:
    """The pairs of boxes [n, 4] and candidates [S, 4], both (left, top, right, bottom).

    A candidate is for the box it overlaps most, where that is least_iou or more, or where no
    candidate overlaps that box more. A box with m candidates, at most most_per_box, is paired with
    the m that overlap it most. One that no candidate touches has none.
    """
    if not len(boxes):
        none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Pairs(none, none)
    overlap = box_iou(boxes, candidates)
    matches = Matcher(least_iou, least_iou, allow_low_quality_matches=True)(overlap)
    is_for = (matches >= 0) & (overlap.amax(0) > 0)
    most = min(most_per_box, len(candidates))
    counts = torch.bincount(matches[is_for], minlength=len(boxes)).clamp(max=most)
    best = overlap.topk(most, dim=1).indices
    is_one = torch.arange(most, device=boxes.device) < counts[:, None]
    return Pairs(best[is_one], is_one.nonzero()[:, 0])


def owners(pairs: Pairs, num_candidates: int) -> Tensor:
    """The box whose class each candidate answers, the last of several, or -1: [S] int64."""
    none = torch.full((num_candidates,), -1, device=pairs.boxes.device)
    return none.scatter_reduce(0, pairs.candidates, pairs.boxes, "amax")
