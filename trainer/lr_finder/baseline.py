"""What trials are measured against: a held-out slice of train, and the baseline loss of a constant
prediction.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trainer.base import streams
from trainer.base.errors import PlanError
from trainer.base.settings import Settings
from trainer.components.losses import Loss
from trainer.components.mixing import UnitMixes, one_hot_targets
from trainer.data.dataset import OpenedData
from trainer.data.datasets.builtin import ImageSet
from trainer.data.order import micro_batch_ids
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.models.build import running_norms
from trainer.recipe.overrides import as_set
from trainer.recipe.plan import Plan, largest_batch
from trainer.recipe.sections import Batch
from trainer.tasks import task_of

SHARE = 0.1
MOST_IMAGES, LEAST_IMAGES = 1024, 10
_FORWARD_IMAGES = 128  # at once, where no norm asks for a sample of its own
_LEAST_SAMPLE = 32  # where one does: statistics of fewer images would make the measure itself noisy
# so that the mean target is that of the set, not of a sample
_LEAST_IMAGES, _IMAGES_PER_CLASS = 8192, 20
_SMALLEST = 1e-9  # a class that never comes has no finite best logit


class Slice:
    """Some images of a set, as a set. places: [n] int64, ascending, of the whole.

    labels: [n] integers. fingerprint: sha256 (hex) over the whole set's and the places.
    """

    def __init__(self, whole: ImageSet, places: np.ndarray) -> None:
        self.whole, self.places, self.num_images = whole, places, len(places)
        self.num_channels, self.classes = whole.num_channels, whole.classes
        self.is_in_memory = whole.is_in_memory
        self.labels = np.asarray(whole.labels)[places]
        digest = hashlib.sha256(whole.fingerprint.encode() + places.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, i: int):
        """Image i of the slice. Raises BadImage."""
        return self.whole.read(int(self.places[i]))


def hold_out(data: OpenedData, batch: Batch) -> OpenedData:
    """The training images cut in two: `train` is what is left, `val` the slice. The val split
    itself is not looked at.

    The slice is the same for every seed and recipe of one batch size: a tenth, 10 to 1,024
    images, every class with its share of them, none its last image. At least one full step is left,
    and no step of a single image.

    batch: one that check_hold_out has let pass.
    """
    images = data.train
    num_held = _num_held(images.num_images, batch)
    is_held = np.zeros(images.num_images, dtype=bool)
    is_held[_stratified(np.asarray(images.labels), num_held)] = True
    left, held = (Slice(images, np.flatnonzero(chosen)) for chosen in (~is_held, is_held))
    return OpenedData(left, held)


def check_hold_out(plan: Plan) -> None:
    """Raises PlanError where a full batch leaves fewer than ten training images to hold out."""
    num_train = plan.profile.num_train
    if num_train - plan.recipe.batch.images >= LEAST_IMAGES:
        return
    most = num_train - _wanted(num_train)
    fix = largest_batch(most, plan.recipe) if most > 1 else {}
    raise PlanError(
        f"lr-find holds out at least {LEAST_IMAGES} of the {num_train} training images of"
        f" {plan.profile.name}, and one batch has to fit into the others",
        f"use {as_set(fix) if fix else 'more images'}",
        path=("batch", "images"),
        fix=fix,
    )


def _wanted(num_images: int) -> int:
    return max(LEAST_IMAGES, min(MOST_IMAGES, round(SHARE * num_images)))


def _num_held(num_images: int, batch: Batch) -> int:
    num_held = min(_wanted(num_images), num_images - batch.images)
    is_single = not batch.drop_last and (num_images - num_held) % batch.images == 1
    return num_held - is_single if num_held > LEAST_IMAGES else num_held + is_single


def _stratified(labels: np.ndarray, num_held: int) -> np.ndarray:
    """Places of num_held images, each class with its share to within one image."""
    share = np.full(len(labels), np.inf)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        order = streams.permutation(0, "split", int(label), len(of_class))
        # where in its class an image comes; the start differs from class to class, else all would
        # round the same way
        start = streams.uniforms(0, "split", np.array([[int(label), len(of_class)]]), 1)[0, 0]
        share[of_class[order[:-1]]] = (np.arange(len(of_class) - 1) + start) / len(of_class)
    chosen = np.argsort(share, kind="stable")[:num_held]
    return chosen[np.isfinite(share[chosen])]


class HeldOut:
    """The slice as the device holds it, to be measured again and again, always by the loss of one
    plan.

    Decoded once, in the evaluation's geometry; uint8 until it is measured.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        data: OpenedData,
        ranks: Ranks = alone(),
        watch: Watch = Watch(),
    ) -> None:
        self.plan, self.settings, self.ranks = plan, settings, ranks
        images, labels = zip(*data.val_batches(plan, settings, watch=watch), strict=True)
        self.images = torch.cat(images).to(settings.device)
        self.labels = torch.cat(labels).to(settings.device)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The recipe's own loss and smoothing, mean over the slice, in nats; nothing of the model
        moves.

        Nothing is dropped. Ranks share the samples, and all get the same number. Norms take the
        statistics of these images, in samples of about batch.norm_images or 32: their running ones
        lag behind weights that move fast.
        """
        plan, task = self.plan, task_of(self.plan, self.settings)
        norms = running_norms(model)
        sample = max(_LEAST_SAMPLE, plan.recipe.batch.norm_images) if norms else _FORWARD_IMAGES
        num_parts = max(1, len(self.labels) // sample)
        total = torch.zeros((), dtype=torch.float64, device=self.settings.device)
        samples = zip(
            self.images.tensor_split(num_parts), self.labels.tensor_split(num_parts), strict=True
        )
        with _measuring(model, norms):
            for images, labels in self.ranks.share(samples):
                total += task.validation_loss(model, images, labels).double() * len(labels)
        self.ranks.sum(total)
        return float(total) / len(self.labels)


@contextmanager
def _measuring(model: nn.Module, norms: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode but for the norms, whose buffers are put back: a momentum of 0 would still
    let a NaN in.
    """
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def bias_only_loss(plan: Plan, labels: np.ndarray, is_mixed: bool = True) -> float:
    """The loss of the best constant logits under a recipe's own loss, smoothing and mixing, in
    nats.

    Binary cross-entropy over many classes starts at log 2 and falls steeply to this level by the
    classifier's bias alone. labels: [N], of the images trained on. is_mixed: as in training; False
    is the level of an evaluation.
    """
    loss = plan.recipe.loss.of_image
    targets_of = mean_targets if loss.is_linear else _targets
    return lowest_constant_loss(loss, targets_of(plan, labels, is_mixed))


def equal_odds_loss(plan: Plan, labels: np.ndarray) -> float:
    """The loss of logits of zero, which say the same of every class, under a recipe's own loss and
    smoothing, in nats. labels: [N].
    """
    loss = plan.recipe.loss.of_image
    targets = torch.atleast_2d(_targets(plan, labels, is_mixed=False))
    return float(loss(torch.zeros_like(targets), targets))


def mean_targets(plan: Plan, labels: np.ndarray, is_mixed: bool = True) -> Tensor:
    """The mean over images of what the loss makes of their targets: [K] float64.

    A loss that is linear in its targets, once they have passed its threshold, is told all of them
    by their mean. Smoothing and mixing keep it; a threshold on mixed targets does not, and is
    measured on the recipe's own draws.
    """
    num_classes, smoothing = plan.profile.num_classes, plan.recipe.smoothing
    counts = torch.from_numpy(np.bincount(labels, minlength=num_classes)).double()
    of_each = one_hot_targets(torch.arange(num_classes), num_classes, smoothing).double()
    threshold = plan.recipe.loss.of_image.target_threshold
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
