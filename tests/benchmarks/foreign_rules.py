"""Learning rates that other finders suggest, from the training losses of one ramp; each written
from its description.

fastai's documentation of callback.schedule describes four: "valley" (about two thirds through the
longest valley), "slide" (an interval of fixed width slides from the right until the gradients at
its ends are alike), "minimum" (a tenth of the rate of the lowest loss) and "steep" (the rate of the
steepest slope). They read an exponentially smoothed, bias-corrected training loss, without its
first tenth and its last five steps, of a ramp that ends where the loss is four times its best.
torch-lr-finder's README describes one: the steepest gradient of a loss smoothed with the factor
0.05, without the first ten and the last five steps, of a ramp that ends at five times the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

FASTAI_PAST, FASTAI_MOST = 0.98, 4.0
LR_FINDER_PAST, LR_FINDER_MOST = 0.95, 5.0
SLIDE_STEPS, SLIDE_ALIKE = 15, 0.005


def averaged(losses: Sequence[float], past: float, is_corrected: bool) -> np.ndarray:
    """The exponential moving average of losses [n]; uncorrected it begins at the first loss."""
    out, total = [], 0.0 if is_corrected else losses[0]
    for count, loss in enumerate(losses, start=1):
        total = past * total + (1 - past) * loss
        out.append(total / (1 - past**count) if is_corrected else total)
    return np.array(out)


def until_diverged(
    values: np.ndarray, losses: np.ndarray, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve before its loss passes `most` times the best so far, or is no number."""
    is_over = ~np.isfinite(losses) | (losses > most * np.fmin.accumulate(losses))
    end = int(np.argmax(is_over)) if is_over.any() else len(losses)
    return values[:end], losses[:end]


def fastai_curve(values: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What fastai's rules read."""
    kept, smooth = until_diverged(values, averaged(losses, FASTAI_PAST, True), FASTAI_MOST)
    skipped = len(losses) // 10
    return kept[skipped : len(kept) - 5], smooth[skipped : len(smooth) - 5]


def lr_finder_curve(values: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What torch-lr-finder's rule reads."""
    kept, smooth = until_diverged(values, averaged(losses, LR_FINDER_PAST, False), LR_FINDER_MOST)
    return kept[10 : len(kept) - 5], smooth[10 : len(smooth) - 5]


def valley(values: np.ndarray, losses: np.ndarray) -> float:
    """Two thirds through the longest run of falling losses, rises between left out."""
    lengths, starts = np.ones(len(losses), dtype=int), np.arange(len(losses))
    for place in range(1, len(losses)):
        higher = np.flatnonzero(losses[:place] > losses[place])
        if len(higher):
            before = higher[lengths[higher] == lengths[higher].max()][-1]
            lengths[place], starts[place] = lengths[before] + 1, starts[before]
    end = int(np.argmax(lengths))
    return float(values[starts[end] + round(2 * (end - starts[end]) / 3)])


def slide(values: np.ndarray, losses: np.ndarray) -> float:
    """The left end of the first interval, from the right, whose ends' gradients differ by less than
    SLIDE_ALIKE.
    """
    gradients = np.gradient(losses)
    right = len(losses) - 1
    left = max(right - SLIDE_STEPS, 0)
    while left > 0 and abs(gradients[right] - gradients[left]) > SLIDE_ALIKE:
        left, right = left - 1, right - 1
    return float(values[left])


def minimum(values: np.ndarray, losses: np.ndarray) -> float:
    return float(values[np.argmin(losses)]) / 10


def steep(values: np.ndarray, losses: np.ndarray) -> float:
    """Where the loss falls fastest with the logarithm of the rate."""
    return float(values[np.argmin(np.gradient(losses, np.log(values)))])


def steepest_gradient(values: np.ndarray, losses: np.ndarray) -> float:
    """Where the loss falls fastest from step to step."""
    return float(values[np.argmin(np.gradient(losses))])


RULES: dict[str, tuple[Callable, Callable]] = {
    "fastai valley": (fastai_curve, valley),
    "fastai slide": (fastai_curve, slide),
    "fastai minimum": (fastai_curve, minimum),
    "fastai steep": (fastai_curve, steep),
    "torch-lr-finder": (lr_finder_curve, steepest_gradient),
}


def suggestion(rule: str, ramps: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """The median over ramps (values [n], losses [n]) of what a rule of RULES says; None where it
    can read none.
    """
    curve_of, says = RULES[rule]
    curves = [curve_of(np.asarray(values), np.asarray(losses)) for values, losses in ramps]
    found = [says(*curve) for curve in curves if len(curve[0]) >= 3]
    return float(np.median(found)) if found else None
