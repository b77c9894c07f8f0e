"""What trials are measured against: a held-out slice of train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from trainer.base import streams
from trainer.base.devices import sum_dtype
from trainer.base.errors import PlanError
from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.datasets.builtin import ImageSet
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.models.norm_statistics import running_norms
from trainer.recipe.overrides import as_set
from trainer.recipe.plan import Plan, largest_batch
from trainer.recipe.sections import Batch
from trainer.tasks import task_of

SHARE = 0.1
MOST_IMAGES, LEAST_IMAGES = 1024, 10
FEW_HELD = 50  # images, of which a class or two decides
FEW_TRAIN = 500  # images, from which first weights hardly learn in any number of steps
_FORWARD_IMAGES = 128  # at once, where no norm asks for a sample of its own
_LEAST_SAMPLE = 32  # where one does: statistics of fewer images would make the measure itself noisy


class Slice:
    """Some images of a set, as a set. places: [n] int64, ascending, of the whole.

    labels: [n] integers. fingerprint: sha256 (hex) over the whole set's and the places. Targets
    that are not labels are read from the whole.
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

    def read_target(self, i: int):
        """Target i, of a TargetSet. Raises BadImage."""
        return self.whole.read_target(int(self.places[i]))  # type: ignore[attr-defined]


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
        device = self.settings.device
        norms = running_norms(model)
        sample = max(_LEAST_SAMPLE, plan.recipe.batch.norm_images) if norms else _FORWARD_IMAGES
        num_parts = max(1, len(self.labels) // sample)
        total = torch.zeros((), dtype=sum_dtype(device), device=device)
        samples = zip(
            self.images.tensor_split(num_parts), self.labels.tensor_split(num_parts), strict=True
        )
        with _measuring(model, norms):
            for images, labels in self.ranks.share(samples):
                loss = task.validation_loss(model, images, labels)
                total += loss.to(total.dtype) * len(labels)
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
