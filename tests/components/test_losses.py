"""The losses against timm, torch, torchvision and float64 NumPy."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.loss import AsymmetricLossMultiLabel, JsdCrossEntropy
from timm.loss import BinaryCrossEntropy as TimmBinary
from timm.loss import SoftTargetCrossEntropy as TimmSoft
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from trainer.base.component import registered
from trainer.base.errors import PlanError
from trainer.components.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    JensenShannon,
    Loss,
    SquaredError,
)
from trainer.components.mixing import one_hot_targets
from trainer.runs.job import Job, plan_of


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


def test_class_weights_are_torchs_and_a_sum_over_classes():
    logits, targets, x, t = micro_batch()
    weights = tuple(np.linspace(0.2, 3.0, 10).tolist())
    found = float(CrossEntropy(class_weights=weights)(logits, targets))
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    assert found == pytest.approx(-np.mean(np.sum(np.array(weights) * t * log_p, axis=1)), rel=1e-6)
    labels = torch.arange(16) % 10
    ours = CrossEntropy(class_weights=weights)(logits, one_hot_targets(labels, 10, 0.0))
    total = functional.cross_entropy(logits, labels, torch.tensor(weights), reduction="sum")
    torch.testing.assert_close(ours, total / 16, rtol=1e-6, atol=1e-6)
    found = float(BinaryCrossEntropy(class_weights=weights)(logits, targets))
    yes, no = np.array(weights) * t * np.logaddexp(0, -x), (1 - t) * np.logaddexp(0, x)
    assert found == pytest.approx(np.mean(yes + no), rel=1e-6)
    torchs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, targets)
    assert found == pytest.approx(float(torchs), rel=1e-6)


@pytest.mark.parametrize("loss", [CrossEntropy, BinaryCrossEntropy])
def test_the_best_constant_answer_to_weighted_classes_is_a_minimum(loss):
    weighted = loss(class_weights=(0.5, 1.0, 4.0))
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    best = weighted.best_logits(shares).requires_grad_()
    weighted(best[None], shares[None]).backward()
    assert best.grad.abs().max() < 1e-9


def test_weights_of_another_number_of_classes_are_refused():
    job = Job("A3", "resnet18", overrides="loss={name: ce, class_weights: [1.0, 2.0]}")
    with pytest.raises(PlanError) as refused:
        plan_of(job)
    assert refused.value.path == ("loss", "class_weights")


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


@pytest.mark.parametrize(
    "loss", [BinaryCrossEntropy(), BinaryCrossEntropy(sum_classes=True), CrossEntropy()]
)
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


def test_the_squared_error_is_a_loop_over_numbers():
    logits, targets = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    pairs = zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / 15
    assert SquaredError()(logits, targets).item() == pytest.approx(expected, rel=1e-12)


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
        {"name": "rmse"},
        {},
    ],
)
def test_pages_that_mean_nothing_are_refused(page):
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(page)


LOSSES = [
    FocalLoss(gamma=2.0, alpha=0.25),
    FocalLoss(gamma=0.5),
    AsymmetricLoss(gamma_negative=4.0, gamma_positive=1.0, clip=0.05),
    AsymmetricLoss(gamma_negative=0.5, gamma_positive=0.0, clip=0.2),
    AsymmetricLoss(gamma_negative=2.0, gamma_positive=1.0),
    JensenShannon(weight=12.0, loss=CrossEntropy()),
]


@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_equals_torchvisions_on_hard_targets(gamma, alpha):
    logits = micro_batch(spread=3.0)[0]
    targets = one_hot_targets(torch.arange(16) % 10, 10)
    theirs = sigmoid_focal_loss(
        logits, targets, -1 if alpha is None else alpha, gamma, reduction="mean"
    )
    torch.testing.assert_close(
        FocalLoss(gamma=gamma, alpha=alpha)(logits, targets), theirs, rtol=1e-5, atol=1e-7
    )


def test_focal_loss_weighs_yes_and_no_by_a_soft_target():
    """A plain float64 loop over images and classes, from the paper's definition for y = 1 and y =
    0.
    """
    logits, targets, x, t = micro_batch(spread=3.0)
    total = 0.0
    for score, target in zip(x.ravel(), t.ravel(), strict=True):
        p = 1 / (1 + np.exp(-score))
        total += -target * 0.25 * (1 - p) ** 2 * np.log(p) - (1 - target) * 0.75 * p**2 * np.log(
            1 - p
        )
    ours = FocalLoss(gamma=2.0, alpha=0.25)
    assert float(ours(logits, targets)) == pytest.approx(total / x.size, rel=1e-5)
    summed = ours.model_copy(update={"sum_classes": True})
    assert float(summed(logits, targets)) == pytest.approx(total / len(x), rel=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize(
    "loss", [FocalLoss(gamma=0.0), AsymmetricLoss(gamma_negative=0.0, gamma_positive=0.0)]
)
def test_without_focus_they_are_binary_cross_entropy(loss, threshold):
    logits, targets, _, _ = micro_batch()
    plain = BinaryCrossEntropy(threshold=threshold)(logits, targets)
    ours = loss.model_copy(update={"threshold": threshold})(logits, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.05, 0.3])
@pytest.mark.parametrize(("negative", "positive"), [(4.0, 1.0), (2.0, 0.0), (1.0, 1.0)])
def test_asymmetric_loss_equals_timms_on_hard_targets(negative, positive, clip):
    logits = micro_batch(spread=3.0)[0].requires_grad_()
    targets = (torch.rand(16, 10, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    ours = AsymmetricLoss(
        gamma_negative=negative, gamma_positive=positive, clip=clip, sum_classes=True
    )(logits, targets)
    theirs = AsymmetricLossMultiLabel(gamma_neg=negative, gamma_pos=positive, clip=clip)(
        logits, targets
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (our_slope,), (their_slope,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=1e-6)


def test_asymmetric_loss_weighs_yes_and_no_by_a_soft_target():
    logits, targets, x, t = micro_batch(spread=3.0)
    p = 1 / (1 + np.exp(-x))
    shifted = np.maximum(p - 0.05, 0)
    expected = np.mean(-t * (1 - p) * np.log(p) - (1 - t) * shifted**4 * np.log(1 - shifted))
    loss = AsymmetricLoss(gamma_negative=4.0, gamma_positive=1.0, clip=0.05)
    assert float(loss(logits, targets)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_jensen_shannon_equals_timms(smoothing):
    logits = (
        torch.randn(3 * 8, 10, generator=torch.Generator().manual_seed(0)).mul(2).requires_grad_()
    )
    labels = torch.arange(8)
    ours = JensenShannon(weight=12.0, loss=CrossEntropy())(
        logits, one_hot_targets(labels, 10, smoothing)
    )
    theirs = JsdCrossEntropy(num_splits=3, alpha=12, smoothing=smoothing)(logits, labels.repeat(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (our_slope,), (their_slope,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=1e-6)


def test_one_split_is_the_plain_loss_and_equal_splits_diverge_by_nothing():
    logits, targets, _, _ = micro_batch()
    for plain in (CrossEntropy(), BinaryCrossEntropy(threshold=0.2), FocalLoss(gamma=2.0)):
        loss = JensenShannon(weight=12.0, loss=plain)
        assert loss(logits, targets) == plain(logits, targets)
        torch.testing.assert_close(
            loss(logits.repeat(3, 1), targets), plain(logits, targets), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_slopes_are_those_of_finite_differences(loss):
    generator = torch.Generator().manual_seed(0)
    splits = 3 if loss.name == "jensen_shannon" else 1
    logits = (
        torch.randn(splits * 4, 5, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    )
    targets = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    targets[0], targets[1] = 0.0, 1.0
    targets = targets.softmax(1) if splits == 3 else targets
    assert torch.autograd.gradcheck(lambda scores: loss(scores, targets), logits)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
def test_sure_answers_have_finite_losses_and_slopes(loss, target):
    for dtype, size in ((torch.float32, 1e4), (torch.float16, 6e4), (torch.bfloat16, 1e4)):
        logits = (
            torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype)
            .repeat(2, 1)
            .requires_grad_()
        )
        targets = torch.full((2 if loss.name == "jensen_shannon" else 4, 3), target)
        value = loss(logits, targets)
        (slope,) = torch.autograd.grad(value, logits)
        assert (
            value.dtype == torch.float32
            and value >= 0
            and value.isfinite()
            and slope.isfinite().all()
        )


@pytest.mark.parametrize("loss", LOSSES[:5], ids=lambda loss: loss.name)
def test_a_split_batch_adds_up(loss):
    logits, targets, _, _ = micro_batch(spread=3.0)
    halves = 0.5 * loss(logits[:8], targets[:8]) + 0.5 * loss(logits[8:], targets[8:])
    torch.testing.assert_close(halves, loss(logits, targets), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", registered(Loss), ids=lambda kind: kind.__name__)
def test_every_loss_has_an_example(kind):
    loss = TypeAdapter(Loss).validate_python(
        {"name": kind.model_fields["name"].default, **kind.example}
    )
    assert loss(torch.zeros(4, 3), torch.full((4, 3), 1 / 3)).isfinite()


@pytest.mark.parametrize(
    "page",
    [
        {"name": "focal"},
        {"name": "focal", "gamma": -1.0},
        {"name": "focal", "gamma": 2.0, "alpha": 1.0},
        {"name": "asymmetric", "gamma_negative": 4.0},
        {"name": "asymmetric", "gamma_negative": 4.0, "gamma_positive": 1.0, "clip": 0.0},
        {"name": "jensen_shannon", "weight": 12.0},
        {"name": "jensen_shannon", "weight": 0.0, "loss": {"name": "ce"}},
        {
            "name": "jensen_shannon",
            "weight": 12.0,
            "loss": {"name": "jensen_shannon", "weight": 1.0, "loss": {"name": "ce"}},
        },
    ],
)
def test_absurd_losses_are_refused(page):
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(page)
