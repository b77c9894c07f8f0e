"""How well a model's features tell classes apart without any training: the nearest training images
vote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from trainer.base.errors import UserError
from trainer.base.settings import Settings
from trainer.data.datasets.builtin import ImageSet
from trainer.data.datasets.layouts import TargetSet
from trainer.data.evaluation import evaluation_batches, whole_images
from trainer.data.transforms import autocast, scored_inputs
from trainer.data.workers import Watch
from trainer.runs.rescore import data_of_run
from trainer.runs.results import read_row_file
from trainer.runs.run_folder import open_model, plan_of_run
from trainer.tasks import task_of

TEMPERATURE = 0.07


@dataclass(frozen=True)
class NearestScores:
    """Of the validation images: how many of them the neighbours give the right class first, and
    among the first five. num_train: images that are neighbours.
    """

    num_top1: int
    num_top5: int
    num_images: int
    num_train: int
    num_classes: int


def votes(features: Tensor, known: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """The votes for each class [B, num_classes]: of the k features of `known` [N, D] whose cosine
    to each of `features` [B, D] is largest, each for its label [N], with a weight of
    exp(cosine / 0.07).

    Source: Wu et al. 2018, arXiv:1805.01978; as in DINO's eval_knn.py (Caron et al. 2021,
    arXiv:2104.14294).
    """
    cosines = functional.normalize(features, dim=1) @ functional.normalize(known, dim=1).T
    nearest = cosines.topk(k, dim=1)
    weights = (nearest.values / TEMPERATURE).exp()
    found = torch.zeros(len(features), num_classes, dtype=weights.dtype, device=weights.device)
    return found.scatter_add_(1, labels[nearest.indices], weights)


@torch.no_grad()
def score_nearest(
    folder: Path,
    k: int,
    settings: Settings,
    data_dir: Path | None,
    watch: Watch = Watch(),
    each: Callable[[int], None] = lambda number: None,
) -> NearestScores:
    """Score a finished run's features on its own data: both splits shown as its evaluation shows
    them. each: called with the number of images after every batch.

    Raises UserError for data without classes, and for more neighbours than there are images.
    """
    plan = plan_of_run(folder)
    data = data_of_run(folder, read_row_file(folder / "row.json"), data_dir)
    if isinstance(data.train, TargetSet):
        raise UserError(f"knn={k}: the images of {folder.name} have no classes", "leave knn= out")
    if k > data.train.num_images:
        raise UserError(
            f"knn={k}: there are {data.train.num_images} training images", "use fewer neighbours"
        )
    task = task_of(plan, settings)
    is_last = settings.is_channels_last(plan.recipe.image.test_px)
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    model = open_model(folder).to(settings.device).to(memory_format=memory_format)

    def shown(images: ImageSet) -> Iterable[tuple[Tensor, Tensor]]:
        image_px = plan.recipe.image.test_px
        stream = whole_images(images, plan, settings.eval_images, image_px)
        batches = evaluation_batches(stream, settings.num_workers, settings.device, watch=watch)
        for pixels, labels in batches:
            inputs = scored_inputs(pixels.to(settings.device), plan.profile, settings)
            with autocast(settings):
                features = task.features(model, inputs).float()
            yield features, labels.to(settings.device)
            each(len(labels))

    known, labels = (torch.cat(parts) for parts in zip(*shown(data.train), strict=True))
    known, num_classes = functional.normalize(known, dim=1), len(data.classes)
    num_top1 = num_top5 = 0
    for features, right in shown(data.val):
        order = votes(features, known, labels, k, num_classes).argsort(
            dim=1, descending=True, stable=True
        )
        is_right = order[:, :5] == right[:, None]
        num_top1 += int(is_right[:, 0].sum())
        num_top5 += int(is_right.sum())
    number = data.val.num_images
    return NearestScores(num_top1, num_top5, number, len(known), num_classes)
