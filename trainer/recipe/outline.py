"""A recipe's keys without the classes of its components, which need torch: it takes seconds to
import, and a mistyped key can be refused before.
"""

from __future__ import annotations

from typing import Any

from trainer.base.component import StrictModel
from trainer.components.learning_rate import LearningRate
from trainer.recipe.sections import Batch, EarlyStopping, Image, PreciseNorm


class Outline(StrictModel):
    """See schema.Recipe, whose keys these are; what is Any is looked into there."""

    name: Any
    version: Any
    title: Any
    source: Any
    task: Any = None
    epochs: Any
    batch: Batch
    lr: LearningRate
    optimizer: Any
    loss: Any
    smoothing: Any = None
    distill: Any = None
    mix: Any = None
    augment: Any = ()
    repeats: Any = None
    sampling: Any = None
    augment_splits: Any = None
    image: Image
    drop_path: Any = None
    average: Any = None
    precise_norm: PreciseNorm | None = None
    early_stopping: EarlyStopping | None = None
    model: Any = None
    adapted_to: Any = None
    assumed: Any = None
    unconfirmed: Any = ()
    per_model: Any = None
    published: Any = ()
