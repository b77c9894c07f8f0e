"""Steps in which memory runs out on one rank, for tests; each rank's own process imports this by
name.
"""

from pathlib import Path

import torch
from rich.console import Console

from support.ranked import noting, ranked_plan
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.engine.state import TrainingState
from trainer.runs.guard import Guard
from trainer.runs.run import TrainingRun
from trainer.tools.faults import Faults, parse_faults


def steps(
    ranks,
    folder: str,
    recipe: str,
    model: str,
    overrides: str,
    num_steps: int,
    inject: str = "",
    **machine,
) -> dict:
    """The first optimizer steps of a run under inject=; all there is to compare."""
    plan = ranked_plan(ranks, recipe, model, overrides)
    settings = make_settings("cpu", workers="0", **machine)
    state = TrainingState(plan, settings, ranks)
    guard = Guard(faults=Faults(parse_faults(inject), plan, Path(folder), ranks))
    run = TrainingRun(Path(folder), state, Console(), StopRequest(), guard)
    seen, losses = [], []
    window = noting(
        open_data(plan.profile, None).train_stream(plan, settings, 0, ranks, run.loader_faults()),
        seen,
    )
    for step in range(num_steps):
        run.start_step(step)
        losses.append(train.optimizer_step(state, window, step).item())
        state.progress.step = step + 1
    state.check_equal()
    return {
        "weights": {
            name: weight.detach().clone() for name, weight in state.model.named_parameters()
        },
        "buffers": {name: buffer.clone() for name, buffer in state.model.named_buffers()},
        "ids": seen,
        "said": [line for line, _ in state.notes],
        "losses": losses,
        "num_pieces": state.progress.num_pieces,
        "changes": state.progress.changes,
        "injected": state.progress.injected,
        "state": state if ranks.is_alone else None,
    }


def relative(found: dict, expected: dict) -> float:
    """The largest distance of a tensor from its other, in lengths of the other."""
    assert found.keys() == expected.keys()
    lengths = [
        (torch.dist(found[name].double(), other.double()), other.double().norm())
        for name, other in expected.items()
    ]
    return max(
        (
            (distance / length.clamp_min(1e-12)).item()
            for distance, length in lengths
            if length or distance
        ),
        default=0.0,
    )


def auto_steps(ranks, *given) -> dict:
    """`steps` under micro_batch=auto."""
    return steps(ranks, *given, micro_batch="auto")
