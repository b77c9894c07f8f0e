"""What a model of any kind may ask of its training and of its export, module by module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy

from torch import nn


class ChangesInTraining(nn.Module, ABC):
    """A module that changes as its training goes on, such as one that prunes itself.

    What it becomes may depend on its weights and on the progress alone, and has to be in its
    buffers: then a resumed run goes on with the same bits, and all ranks agree. An average of the
    weights takes buffers that are no floats as they are; it is never told of the progress itself.
    """

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Called before each step, with the share of the run's steps that are done, in [0, 1)."""


class ConvertedForUse(nn.Module, ABC):
    """A module with a form of its own for use after training: the same answers, less work."""

    @abstractmethod
    def converted(self) -> nn.Module:
        """That form, in evaluation mode; the module itself where it has none (yet)."""


def converted(model: nn.Module) -> nn.Module:
    """A model as it is used after training: itself, or a copy where modules of it have a form for
    that. In evaluation mode, on the CPU or wherever it is.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ConvertedForUse)]
    if not names:
        return model
    model = deepcopy(model)
    for name in names:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(name)
        assert isinstance(module, ConvertedForUse)
        setattr(model.get_submodule(parent), own, module.converted().eval())
    return model
