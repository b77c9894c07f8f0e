"""The loss of the best constant prediction: what knowing nothing of an image costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.components.losses import Loss
from trainer.components.mixing import UnitMixes, one_hot_targets
from trainer.data.order import Sampled, micro_batch_ids
from trainer.recipe.plan import Plan

# so that the mean target is that of the set, not of a sample
_LEAST_IMAGES, _IMAGES_PER_CLASS = 8192, 20
_SMALLEST = 1e-9  # a class that never comes has no finite best logit


def bias_only_loss(plan: Plan, labels: np.ndarray, is_mixed: bool = True) -> float:
    """The loss of the best constant logits under a recipe's own loss, smoothing and mixing, in
    nats.

    Binary cross-entropy over many classes starts at log 2 and falls steeply to this level by the
    classifier's bias alone. labels: [N], of the images trained on. is_mixed: as in training; False
    is the level of an evaluation.
    """
    loss = plan.loss.of_image
    if plan.recipe.sampling is not None and is_mixed:  # as training shows them
        sampled = Sampled(plan.recipe.sampling, labels, plan.recipe.epochs)
        labels = labels[sampled.shown(plan.seed, 0, len(labels))[0]]
    targets_of = mean_targets if loss.is_linear else _targets
    return lowest_constant_loss(loss, targets_of(plan, labels, is_mixed))


def equal_odds_loss(plan: Plan, labels: np.ndarray) -> float:
    """The loss of logits of zero, which say the same of every class, under a recipe's own loss and
    smoothing, in nats. labels: [N].
    """
    targets = torch.atleast_2d(_targets(plan, labels, is_mixed=False))
    return float(plan.loss.of_image(torch.zeros_like(targets), targets))


def mean_targets(plan: Plan, labels: np.ndarray, is_mixed: bool = True) -> Tensor:
    """The mean over images of what the loss makes of their targets: [K] float64.

    A loss that is linear in its targets, once they have passed its threshold, is told all of them
    by their mean. Smoothing and mixing keep it; a threshold on mixed targets does not, and is
    measured on the recipe's own draws.
    """
    num_classes, smoothing = plan.profile.num_classes, plan.recipe.smoothing
    counts = torch.from_numpy(np.bincount(labels, minlength=num_classes)).double()
    of_each = one_hot_targets(torch.arange(num_classes), num_classes, smoothing).double()
    threshold = plan.loss.of_image.target_threshold
    if threshold is None:
        return counts / counts.sum() @ of_each
    if plan.recipe.mix is None or not is_mixed:
        return counts / counts.sum() @ of_each.gt(threshold).double()
    total, num_images = torch.zeros(num_classes, dtype=torch.float64), 0
    for targets in _mixed_targets(plan, labels):
        total += targets.gt(threshold).sum(0)
        num_images += len(targets)
    return total / num_images


def _targets(plan: Plan, labels: np.ndarray, is_mixed: bool) -> Tensor:
    """The targets of enough images, [N, K] float64."""
    if plan.recipe.mix and is_mixed:
        return torch.cat(list(_mixed_targets(plan, labels))).double()
    places = np.linspace(0, len(labels) - 1, min(_num_wanted(plan), len(labels))).astype(np.int64)
    chosen = torch.from_numpy(labels[places].astype(np.int64))
    return one_hot_targets(chosen, plan.profile.num_classes, plan.recipe.smoothing).double()


def _num_wanted(plan: Plan) -> int:
    return max(_LEAST_IMAGES, _IMAGES_PER_CLASS * plan.profile.num_classes)


def _mixed_targets(plan: Plan, labels: np.ndarray) -> Iterator[Tensor]:
    """Targets [b, K] of a recipe's own micro-batches, from the first on until there are enough."""
    recipe, num_classes, num_images = plan.recipe, plan.profile.num_classes, 0
    assert recipe.mix is not None  # they are asked for where it is
    for step in itertools.count():
        for micro_batch in range(plan.micro_batches(step)):
            ids = micro_batch_ids(
                plan.seed, step, micro_batch, plan.profile.num_train, recipe.repeats or 1,
                recipe.batch.images, plan.num_micro_batches, plan.steps_per_epoch,
                recipe.batch.drop_last,
            )  # fmt: skip
            targets = one_hot_targets(
                torch.from_numpy(labels[ids[:, 1]].astype(np.int64)), num_classes, recipe.smoothing
            )
            units = plan.mixing_units(step, micro_batch)
            places = np.arange(len(targets)) // recipe.units_together
            drawn = recipe.mix.drawn(plan.seed, step, units, plan.train_px_at(step), places)
            yield UnitMixes(recipe.mix, drawn, len(targets)).of_targets(targets)
            num_images += len(targets)
        if num_images >= _num_wanted(plan):
            return


def lowest_constant_loss(loss: Loss, targets: Tensor) -> float:
    """The least that a loss can be over constant logits, by a few steps of L-BFGS.

    targets: float64 in [0, 1], the mean ones [K] of a loss that is linear in them, else those of
    many images [N, K].

    They start where cross-entropies have their optimum, log t and log t - log(1 - t), and end there
    at once.
    """
    targets = torch.atleast_2d(targets)
    loss = loss.of_image.without_threshold() if len(targets) == 1 else loss.of_image
    shares = targets.mean(0).clamp(_SMALLEST, 1 - _SMALLEST)
    with torch.enable_grad():
        logits = loss.best_logits(shares).requires_grad_()
        search = torch.optim.LBFGS(
            [logits], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12
        )

        def value() -> Tensor:
            search.zero_grad()
            found = loss(logits.expand(len(targets), -1), targets)
            found.backward()
            return found

        search.step(value)
    return float(loss(logits.detach().expand(len(targets), -1), targets))
