"""What is learned: a sample's target, the forward pass with its loss, and the score of an
evaluation.
"""

from __future__ import annotations

from trainer.base.settings import Settings
from trainer.recipe.plan import Plan
from trainer.tasks.base import Scores, Task
from trainer.tasks.classification import Classification, ClassificationScores
from trainer.tasks.teacher import Teacher

__all__ = ["Classification", "ClassificationScores", "Scores", "Task", "task_of"]


def task_of(plan: Plan, settings: Settings, teacher: Teacher | None = None) -> Task:
    """The task of a plan; the only place that chooses one. teacher: for the loss of its training,
    without which that is the one of its labels.
    """
    return Classification(plan, settings, teacher)
