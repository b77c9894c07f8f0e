"""What is learned: a sample's target, the forward pass with its loss, and the score of an
evaluation. Every module of this folder is imported with it: a task is a file, and no list.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

from trainer.base.settings import Settings
from trainer.recipe.plan import Plan
from trainer.tasks.base import Scores, Task
from trainer.tasks.classification import Classification, ClassificationScores
from trainer.tasks.teacher import Teacher

__all__ = ["Classification", "ClassificationScores", "Scores", "Task", "task_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def task_of(plan: Plan, settings: Settings, teacher: Teacher | None = None) -> Task:
    """The task of a plan's recipe. teacher: for the loss of its training, without which that is the
    one of its labels.
    """
    task = plan.recipe.of_task.bound(plan, settings)
    return task if teacher is None else replace(task, teacher=teacher)
