"""What is learned: a sample's target, the forward pass with its loss, and the score of an
evaluation.
"""

from __future__ import annotations

from trainer.base.settings import Settings
from trainer.recipe.plan import Plan
from trainer.tasks.base import Scores, Task
from trainer.tasks.classification import Classification, ClassificationScores

__all__ = ["Classification", "ClassificationScores", "Scores", "Task", "task_of"]


def task_of(plan: Plan, settings: Settings) -> Task:
    """The task of a plan; the only place that chooses one."""
    return Classification(plan, settings)
