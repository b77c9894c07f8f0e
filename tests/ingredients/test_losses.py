"""The losses against timm, torch and float64 NumPy."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.loss import BinaryCrossEntropy as TimmBinary
from timm.loss import SoftTargetCrossEntropy as TimmSoft
from torch.nn import functional

from trainer.ingredients.losses import BinaryCrossEntropy, CrossEntropy, Loss
from trainer.ingredients.mixing import one_hot_targets


def micro_batch(num_images=16, num_classes=10, spread=8.0):
    """Scores and mixed, smoothed targets: float32 tensors and their float64 arrays."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, num_classes, generator=generator) * spread
    targets = one_hot_targets(torch.arange(num_images) % num_classes, num_classes, 0.1)
    targets = 0.3 * targets + 0.7 * targets.flip(0)
    return logits, targets, logits.double().numpy(), targets.double().numpy()


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_binary_cross_entropy_equals_timm(threshold, sum_classes):
    logits, targets, _, _ = micro_batch()
    ours = BinaryCrossEntropy(threshold=threshold, sum_classes=sum_classes)(logits, targets)
    timms = TimmBinary(target_threshold=threshold, sum_classes=sum_classes)(logits, targets)
    torch.testing.assert_close(ours, timms, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_equals_its_formula(threshold):
    logits, targets, x, t = micro_batch()
    if threshold is not None:
        t = (t > threshold).astype(float)
    expected = np.mean(t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x))
    assert abs(float(BinaryCrossEntropy(threshold=threshold)(logits, targets)) - expected) < 1e-6
    total = float(BinaryCrossEntropy(threshold=threshold, sum_classes=True)(logits, targets))
    assert total == pytest.approx(10 * expected, rel=1e-6)


def test_a_target_at_the_threshold_counts_as_no():
    loss = BinaryCrossEntropy(threshold=0.5)
    logits = torch.tensor([[4.0]])
    no, yes = float(functional.softplus(logits)), float(functional.softplus(-logits))
    assert float(loss(logits, torch.tensor([[0.5]]))) == pytest.approx(no)
    assert float(loss(logits, torch.tensor([[0.51]]))) == pytest.approx(yes)


def test_cross_entropy_equals_timm_and_its_formula():
    logits, targets, x, t = micro_batch()
    ours = CrossEntropy()(logits, targets)
    torch.testing.assert_close(ours, TimmSoft()(logits, targets), rtol=1e-6, atol=1e-6)
    expected = np.mean(np.sum(t * (np.log(np.exp(x).sum(1, keepdims=True)) - x), axis=1))
    assert float(ours) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_cross_entropy_equals_torchs_own(smoothing):
    logits = micro_batch()[0]
    labels = torch.arange(16) % 10
    ours = CrossEntropy()(logits, one_hot_targets(labels, 10, smoothing))
    torchs = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), BinaryCrossEntropy(sum_classes=True), CrossEntropy()])
def test_gradients_of_a_split_batch_average_to_the_whole_batchs(loss):
    logits, targets, _, _ = micro_batch()
    whole = logits.clone().requires_grad_()
    loss(whole, targets).backward()
    halves = logits.clone().requires_grad_()
    (0.5 * loss(halves[:8], targets[:8]) + 0.5 * loss(halves[8:], targets[8:])).backward()
    torch.testing.assert_close(whole.grad, halves.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), CrossEntropy()])
def test_half_precision_scores_are_summed_in_single(loss):
    logits, targets, _, _ = micro_batch(num_classes=1000)
    logits = logits.bfloat16()
    given = loss(logits, targets)
    assert given.dtype == torch.float32
    assert given == loss(logits.float(), targets)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), CrossEntropy()])
def test_huge_scores_stay_finite(loss):
    logits, targets, _, _ = micro_batch(spread=1e4)
    assert torch.isfinite(loss(logits, targets))


@pytest.mark.parametrize(
    "page",
    [
        {"name": "bce", "threshold": 1.0},
        {"name": "bce", "threshold": -0.1},
        {"name": "bce", "threshold": float("nan")},
        {"name": "bce", "sum_classes": 1},
        {"name": "ce", "threshold": 0.2},
        {"name": "mse"},
        {},
    ],
)
def test_pages_that_mean_nothing_are_refused(page):
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(page)
