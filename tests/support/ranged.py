"""What ranks do in the tests of a range test: see ranked."""

from pathlib import Path

import numpy as np

from support import ranked
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.lr_finder import baseline
from trainer.lr_finder.api import trial_plan
from trainer.lr_finder.ramp import find_scalar
from trainer.lr_finder.trial import TrialFolder, Trials, curve_to_json
from trainer.tasks import Classification

PAGE = "batch.images=16 batch.norm_images=8 mix=null drop_path=null repeats=null"


def trial(ranks, folder: str, bad_rank: int = -1, bad_step: int = 3) -> dict:
    """The curve of a ramp on a model without batch statistics; one rank's images may be no numbers
    at a step.

    Each rank keeps trials in a folder of its own: which of them wrote there, tells its name.
    """
    prepare = Classification.prepare

    def preparing(task, batch):
        images, targets = prepare(task, batch)
        return images * (
            float("nan") if (ranks.rank, batch.step) == (bad_rank, bad_step) else 1
        ), targets

    Classification.prepare, before = preparing, baseline.MOST_IMAGES
    baseline.MOST_IMAGES = 40
    try:
        plan = ranked.ranked_plan(ranks, "A2", "test_convnext", PAGE)
        cut = baseline.hold_out(open_data(plan.profile, None), plan.recipe.batch)
        settings = make_settings("cpu", workers="0")
        kept = TrialFolder(Path(folder) / str(ranks.rank))
        trials = Trials(
            trial_plan(plan, cut),
            settings,
            cut,
            find_scalar(plan.recipe, "lr.peak"),
            np.ones(6),
            kept,
            ranks=ranks,
        )
        values = np.geomspace(1e-4, 1e-2, 6)
        first = curve_to_json(trials(0, values, "ramp"))
        assert (
            curve_to_json(trials(0, values, "ramp")) == first
        )  # rank 0 has kept it, the others get it from there
        return first
    finally:
        Classification.prepare, baseline.MOST_IMAGES = prepare, before
