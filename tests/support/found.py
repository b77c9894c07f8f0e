"""Range tests that nothing was trained for: the decision over a made-up trial, with all that the
pictures need.
"""

from dataclasses import asdict

import numpy as np

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.lr_finder.api import LRFinderResult
from trainer.lr_finder.candidates import decide, lengths_for
from trainer.lr_finder.ramp import RATE, Scalar
from trainer.lr_finder.rules import BaselineLosses
from trainer.runs.job import Job


def found_of(
    trial,
    values=None,
    own=5e-3,
    label=RATE,
    curve="both",
    baselines=BaselineLosses(),
    folder=None,
    overrides="",
    job=None,
    num_seeds=3,
):
    """A LRFinderResult whose trials come from a function in place of a model."""
    values = np.geomspace(1e-6, 10, 100) if values is None else values
    lengths = lengths_for(2000, num_seeds, len(values))
    shape = np.ones(lengths.num_race_steps)
    job = job or Job("A1", "test_resnet", overrides=overrides)
    return LRFinderResult(
        suggestion=decide(trial, range(num_seeds), values, baselines, lengths, shape, curve),
        scalar=Scalar(label, own),
        values=values,
        plan=small_plan("A1", overrides=overrides),
        job=job,
        settings=make_settings("cpu", workers="0"),
        data_fingerprint="0" * 64,
        num_held_out=144,
        asked={"curve": curve, "lengths": asdict(lengths)},
        folder=folder,
    )
