"""compile=1: the passes of a model compiled for its shapes (torch.compile), and how long
compiling takes.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

from torch import nn

from trainer.base.cache import cache_folder, cache_note
from trainer.base.errors import UserError
from trainer.models.parts.norm_layers import StepNorm

if TYPE_CHECKING:  # two seconds of importing
    from torch._dynamo.callback import CallbackArgs

# of one model: sizes of images and micro-batches, in training and in evaluation; torch gives up
# after 8
_MOST_SHAPES = 64


class Compiled:
    """A model whose passes are compiled as they are first called, under the same names of weights.

    Draws (dropout, stochastic depth) are those of the uncompiled model. Every shape is compiled
    once, when it first comes. num_graphs, seconds: what has been compiled so far.
    """

    def __init__(
        self, model: nn.Module, has_precise_norm: bool = False, mode: str = "default"
    ) -> None:
        """Raises UserError for what would be compiled again at every step, and where there is no
        compiler.
        """
        import torch._dynamo  # two seconds, only where compile=1
        import torch._inductor

        if any(isinstance(module, StepNorm) for module in model.modules()):
            raise UserError(
                "compile=1: norms with estimated statistics count what every micro-batch adds; use"
                " compile=0"
            )
        if has_precise_norm:
            raise UserError(
                "compile=1: the recipe's precise_norm weighs every micro-batch by another number;"
                " use compile=0"
            )
        _check_compiler()
        if cache_note():  # torch asks for the user's name otherwise, and has none
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        # The two settings and the two callbacks have no public names; torch's documentation names
        # _dynamo.config.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, _MOST_SHAPES
        )
        self.num_graphs, self.seconds = 0, 0.0
        self._begun_s, self._num_logged = 0.0, 0
        # else a hook that is added later, as inject= does, would not be seen
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.on_compile_start(self._begin)
        torch._dynamo.on_compile_end(self._end)
        # torch takes a mode or options: a mode is a set of them
        options = torch._inductor.list_mode_options(mode) | {"fallback_random": True}
        model.compile(dynamic=False, options=options)

    def news(self) -> str | None:
        """What has been compiled since the last call, in a line."""
        if self.num_graphs == self._num_logged:
            return None
        new, self._num_logged = self.num_graphs - self._num_logged, self.num_graphs
        return (
            f"compiled {new} part{'s' * (new != 1)} of the model; {self.seconds:.0f} s of compiling"
            " so far"
        )

    def _begin(self, *_) -> None:
        self._begun_s = time.perf_counter()

    def _end(self, call: CallbackArgs) -> None:
        # a backward pass that torch's cache on disk does not hold is compiled later, as a part of
        # the same graph
        self.num_graphs += call.callback_trigger.name == "DYNAMO"
        self.seconds += time.perf_counter() - self._begun_s


def _check_compiler() -> None:
    """torch writes C++ for a CPU and, for a GPU, C: one line where nothing here translates it.
    Raises UserError.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ("g++", "clang++"))):
        raise UserError(
            f"compile=1: no C++ compiler here ({named or 'g++'}); run apt-get install -y g++, or"
            " use compile=0"
        )
