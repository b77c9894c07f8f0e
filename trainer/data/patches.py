"""What a plan takes from the training images themselves before the first step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.data.datasets.builtin import ImageSet
from trainer.data.decode import BadImage
from trainer.data.evaluation import whole_image
from trainer.recipe.plan import PatchSums, Plan


def planned_over(plan: Plan, images: ImageSet) -> Plan:
    """The same plan over these training images: with the number of each class where the loss
    depends on it, and with sums over their patches where the model's first weights do.

    Raises BadImage for one that cannot be decoded, unless the plan skips them.
    """
    plan = plan.with_counts(images)
    whitening = plan.recipe.model and plan.recipe.model.whitening
    if not whitening:
        return plan
    number = min(whitening.images, images.num_images)
    places = np.arange(number) * images.num_images // number
    return replace(plan, patches=_sums(plan, images, places, whitening.patch_px))


def _sums(plan: Plan, images: ImageSet, places: np.ndarray, side_px: int) -> PatchSums:
    """Over all patches of the images at some places. Grey levels are whole numbers, whose sums
    float64 holds exactly: the same in any order, and by any number of threads.
    """
    size = plan.profile.channels * side_px**2
    number, sums, products = 0, np.zeros(size), np.zeros((size, size))
    for place in places.tolist():
        try:
            image = whole_image(images.read(place), plan)[0].numpy()
        except BadImage:
            if plan.bad_images != "skip":
                raise
            continue
        windows = np.lib.stride_tricks.sliding_window_view(image, (side_px, side_px), axis=(1, 2))
        patches = windows.transpose(1, 2, 0, 3, 4).reshape(-1, size).astype(np.float64)
        number += len(patches)
        sums += patches.sum(0)
        products += patches.T @ patches
    whole = [tuple(map(int, row)) for row in products]
    return PatchSums(number, tuple(map(int, sums)), tuple(whole))
