"""The loss of knowing only how often each class comes, against closed forms and a search of
SciPy's.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from support.plans import small_plan
from trainer.components.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    JensenShannon,
)
from trainer.data.dataset import open_data
from trainer.tasks.constant import bias_only_loss, lowest_constant_loss, mean_targets

MEAN = torch.tensor([0.05, 0.15, 0.3, 0.5], dtype=torch.float64)


def entropy(shares):
    shares = np.asarray(shares, dtype=float)
    return -float((shares * np.log(shares)).sum())


def two_sided(shares):
    return [entropy([share, 1 - share]) for share in np.asarray(shares, dtype=float)]


def test_cross_entropies_have_the_entropy_as_their_floor():
    assert lowest_constant_loss(CrossEntropy(), MEAN) == pytest.approx(entropy(MEAN), abs=1e-12)
    assert lowest_constant_loss(BinaryCrossEntropy(), MEAN) == pytest.approx(
        np.mean(two_sided(MEAN)), abs=1e-12
    )
    assert lowest_constant_loss(BinaryCrossEntropy(sum_classes=True), MEAN) == pytest.approx(
        np.sum(two_sided(MEAN)), abs=1e-12
    )


def test_a_thousand_classes_start_at_log_2_and_have_their_floor_near_zero():
    floor = lowest_constant_loss(
        BinaryCrossEntropy(), torch.full((1000,), 1e-3, dtype=torch.float64)
    )
    assert floor == pytest.approx(two_sided([1e-3])[0], rel=1e-9) and floor < 0.01


def test_a_class_that_never_comes_costs_nothing():
    mean = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    assert lowest_constant_loss(BinaryCrossEntropy(), mean) == pytest.approx(
        np.log(2) / 3, abs=1e-7
    )


def yes_and_no(loss, share):
    """The loss of one class by its logit, written out in NumPy from the formulas of the papers."""

    def value(logit):
        p = 1 / (1 + np.exp(-logit))
        if isinstance(loss, FocalLoss):
            of_yes, of_no = (1, 1) if loss.alpha is None else (loss.alpha, 1 - loss.alpha)
            return -of_yes * share * (1 - p) ** loss.gamma * np.log(p) - of_no * (
                1 - share
            ) * p**loss.gamma * np.log1p(-p)
        q = max(p - (loss.clip or 0), 1e-300)
        return -share * (1 - p) ** loss.gamma_positive * np.log(p) - (
            1 - share
        ) * q**loss.gamma_negative * np.log1p(-q)

    return value


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(gamma=2.0, alpha=0.25),
        FocalLoss(gamma=0.5),
        AsymmetricLoss(gamma_negative=4.0, gamma_positive=1.0, clip=0.05),
    ],
    ids=["focal", "focal of one weight", "asymmetric"],
)
def test_losses_without_a_closed_form_against_a_search_of_scipys(loss):
    lowest = [
        minimize_scalar(
            yes_and_no(loss, share), bounds=(-15, 15), method="bounded", options={"xatol": 1e-10}
        ).fun
        for share in MEAN.tolist()
    ]
    assert lowest_constant_loss(loss, MEAN) == pytest.approx(np.mean(lowest), rel=1e-6)


def test_constant_answers_do_not_differ_between_splits():
    assert lowest_constant_loss(
        JensenShannon(weight=12.0, loss=CrossEntropy()), MEAN
    ) == lowest_constant_loss(CrossEntropy(), MEAN)


def digits(overrides):
    plan = small_plan(recipe="A1", overrides=overrides)
    labels = open_data(plan.profile, None).train.labels
    return plan, labels, np.bincount(labels) / len(labels)


def test_smoothing_and_mixing_keep_the_mean_of_soft_targets():
    plan, labels, shares = digits("")
    smoothed = 0.9 * shares + 0.1 / 10
    assert mean_targets(plan, labels).numpy() == pytest.approx(smoothed, abs=1e-7)
    assert bias_only_loss(plan, labels) == pytest.approx(np.mean(two_sided(smoothed)), rel=1e-6)
    assert bias_only_loss(plan, labels, is_mixed=False) == bias_only_loss(plan, labels)


def test_a_threshold_on_mixed_targets_makes_two_classes_a_yes():
    """Mixup with alpha 1 has shares that are uniform: each of two labels is above 0.2 with
    probability 0.8.
    """
    plan, labels, shares = digits(
        "smoothing=null loss.threshold=0.2 mix='{name: mixup, alpha: 1.0, partner: rolled}'"
    )
    mean = mean_targets(plan, labels).numpy()
    same = float((shares**2).sum())
    assert mean.sum() == pytest.approx(1.6 * (1 - same) + same, rel=0.02)
    assert bias_only_loss(plan, labels) == pytest.approx(np.mean(two_sided(mean)), rel=1e-6)
    assert mean_targets(plan, labels, is_mixed=False).numpy() == pytest.approx(shares, abs=1e-12)
