"""How classes share an epoch, and what they weigh in a loss, against closed forms and the papers'
code.
"""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight

from trainer.components.class_weighting import EffectiveNumber, Inverse, InverseSquareRoot
from trainer.components.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    JensenShannon,
)
from trainer.components.mixing import one_hot_targets
from trainer.components.sampling import Balanced, ProgressivelyBalanced, SquareRoot
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe

COUNTS = np.array([900, 90, 10, 0])


@pytest.mark.parametrize(
    ("sampling", "done_share", "expected"),
    [
        (Balanced(), 0.5, [1 / 3, 1 / 3, 1 / 3, 0]),
        (SquareRoot(), 0.5, np.sqrt([900, 90, 10, 0]) / np.sqrt([900, 90, 10]).sum()),
        (ProgressivelyBalanced(), 0.0, [0.9, 0.09, 0.01, 0]),
        (ProgressivelyBalanced(), 0.25, [0.75 * one + 0.25 / 3 for one in (0.9, 0.09, 0.01)] + [0]),
    ],
)
def test_shares_are_kangs_closed_forms(sampling, done_share, expected):
    assert sampling.shares(COUNTS, done_share) == pytest.approx(np.array(expected), abs=1e-12)


def cuis_weights(beta, img_num_per_cls):
    """cifar_main.py of richardaecn/class-balanced-loss at 1d785720."""
    effective_num = 1.0 - np.power(beta, img_num_per_cls)
    weights = (1.0 - beta) / np.array(effective_num)
    return weights / np.sum(weights) * len(img_num_per_cls)


def test_weights_are_scikit_learns_and_cuis():
    counts = [900, 90, 10]
    balanced = compute_class_weight(
        "balanced", classes=np.arange(3), y=np.repeat([0, 1, 2], counts)
    )
    assert Inverse(mean_over="images").weights(counts) == pytest.approx(balanced, rel=1e-9)
    for beta in (0.9, 0.999, 0.9999):
        found = EffectiveNumber(beta=beta, mean_over="classes").weights(counts)
        assert found == pytest.approx(cuis_weights(beta, counts), rel=1e-9)
        terms = [sum(beta**i for i in range(n)) for n in counts]  # the effective numbers
        products = np.array(found) * terms
        assert products == pytest.approx(np.full(3, products[0]), rel=1e-9)
    found = np.array(InverseSquareRoot(mean_over="images").weights(counts))
    assert found * np.sqrt(counts) == pytest.approx(np.full(3, found[0] * 30), rel=1e-9)
    assert found @ counts / 1000 == pytest.approx(1, rel=1e-9)


def test_a_class_without_images_has_a_finite_weight():
    assert np.isfinite(EffectiveNumber(beta=0.99, mean_over="images").weights(COUNTS)).all()


def cuis_focal_loss(labels, logits, alpha, gamma):
    """focal_loss of cifar_main.py there, in NumPy; alpha: the weight of each image's class."""
    cross_entropy = (
        np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    )  # tf.nn.sigmoid_cross_entropy_with_logits
    modulator = np.exp(-gamma * labels * logits - gamma * np.log1p(np.exp(-1.0 * logits)))
    return (alpha[:, None] * modulator * cross_entropy).sum() / labels.sum()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_class_balanced_focal_loss_is_cuis(gamma):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(32, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (32,), generator=generator)
    counts = [900, 90, 10]
    loss = FocalLoss(
        gamma=gamma, sum_classes=True,
        class_weighting=EffectiveNumber(beta=0.9999, mean_over="classes"),
    ).for_counts(np.array(counts))  # fmt: skip
    targets = one_hot_targets(labels, 3, 0.0).double()
    weights = np.array(cuis_weights(0.9999, counts))[labels.numpy()]
    expected = cuis_focal_loss(targets.numpy(), logits.numpy(), weights, gamma)
    assert float(loss(logits, targets)) == pytest.approx(expected, rel=1e-9)
    assert not loss.is_linear and FocalLoss(gamma=gamma).is_linear


@pytest.mark.parametrize("kind", [CrossEntropy, BinaryCrossEntropy])
def test_a_rules_weights_are_those_that_are_written(kind):
    rule = Inverse(mean_over="images")
    by_rule = kind(class_weighting=rule).for_counts(COUNTS[:3])
    assert by_rule == kind(class_weights=rule.weights(COUNTS[:3]))
    both = JensenShannon(weight=12.0, loss=kind(class_weighting=rule))
    assert both.needs_counts and both.for_counts(COUNTS[:3]).loss == by_rule


def test_weights_and_a_rule_for_them_are_refused():
    with pytest.raises(ValidationError, match="keep one"):
        CrossEntropy(class_weights=(1.0, 2.0), class_weighting=Inverse(mean_over="images"))


def test_a_recipe_without_them_has_the_digest_that_it_had():
    recipe = load_recipe(find_recipe("torchvision-v1")).for_model("resnet50")
    text = "sampling={name: balanced} loss.class_weighting={name: inverse, mean_over: images}"
    changed, _ = apply_overrides(recipe, text.replace("={", "='{").replace("}", "}'"))
    assert changed.digest != recipe.digest
    back, _ = apply_overrides(changed, "sampling=null loss.class_weighting=null")
    assert back.digest == recipe.digest
