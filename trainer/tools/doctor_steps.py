"""The main job's first steps, as `make doctor` tries them."""

from __future__ import annotations

import time

from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.runs.export import weights_digest
from trainer.runs.job import Job, plan_of
from trainer.tools.doctor_probes import MAIN_MODEL, MAIN_RECIPE

NUM_STEPS = 3


def trained(device: str) -> tuple[str, list[float]]:
    """The digest of the main job's weights after its first steps, and the time of each but the
    first.

    On the CPU it is the process's own time, so that a busy machine counts for nothing.
    """
    plan = plan_of(Job(MAIN_RECIPE, MAIN_MODEL))
    settings = make_settings(device, workers="0")
    set_algorithms(settings)
    clock, seconds = (time.process_time if device == "cpu" else time.perf_counter), []
    state = TrainingState(plan, settings)
    window = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(1 + NUM_STEPS):
        started_s = clock()
        loss = optimizer_step(state, window, step).item()  # waits for the device
        seconds.append(clock() - started_s)
    if loss != loss:
        raise RuntimeError(f"the loss after {NUM_STEPS + 1} steps is {loss}")
    return weights_digest(state.model), seconds[1:]
