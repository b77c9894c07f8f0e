"""Are the lines of metrics.jsonl those of the run: each once, in order, the last ones those of its
row?
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.base.scores import main_score
from trainer.base.settings import Settings
from trainer.recipe.plan import Plan
from trainer.runs.results import Row

_MOST_LINES = 10**7  # that a file can hold, see LARGEST_METRICS_BYTES
_SCORES = {"val_loss_nats": "loss_nats", "num_images": "num_val_images"}


def curve_checks(
    lines: Sequence[dict],
    plan: Plan,
    row: Row | None,
    log_steps: int = Settings.log_steps,
    eval_every_epochs: int = Settings.eval_every_epochs,
) -> Iterator[tuple[str, Any, Any]]:
    """(what, expected, found) of each thing that is checked.

    row: None where the run has not finished: its lines are then as many as there are. log_steps,
    eval_every_epochs: its settings.
    """
    found = [curve_name(line) for line in lines]
    is_finished = row is not None and row.status == "finished"
    wanted: list[str] = []
    ended = row.steps if row and plan.recipe.early_stopping else plan.num_steps
    all_wanted = expected_lines(plan, log_steps, ended, eval_every_epochs)
    if row is not None and row.curves_incomplete:
        there = set(found)
        wanted = [name for name in itertools.islice(all_wanted, _MOST_LINES) if name in there]
    else:  # no more of them than can be there, however many the plan has
        wanted = list(itertools.islice(all_wanted, len(found) + is_finished))
    wrong = next(
        (
            place
            for place in range(max(len(wanted), len(found)))
            if wanted[place : place + 1] != found[place : place + 1]
        ),
        None,
    )
    if wrong is None:
        yield f"metrics.jsonl, {len(found)} lines", "each once", "each once"
    else:
        wanted_here, found_here = (
            "".join(names[wrong : wrong + 1]) or "no line" for names in (wanted, found)
        )
        yield (
            f"metrics.jsonl:{wrong + 1}",
            wanted_here,
            found_here + (" once more" if found_here in found[:wrong] else ""),
        )
    yield from _rates(lines, plan)
    if is_finished:
        yield from _last_scores(lines, row)


def expected_lines(
    plan: Plan, log_steps: int, num_steps: int, eval_every_epochs: int = 1
) -> Iterator[str]:
    """The names of all lines of a run of so many steps: losses every log_steps steps and at each
    epoch's end, then its scores where there is an evaluation.
    """
    average = plan.recipe.average
    kinds = ("model", "average") if average and not average.replaces_model else ("model",)
    step = 0
    while step < num_steps:
        step = min(step - step % each + each for each in (log_steps, plan.steps_per_epoch))
        yield f"loss at step {step}"
        if step == plan.last_evaluation(step, eval_every_epochs):
            yield from (f"scores of the {kind} at step {step}" for kind in kinds)


def curve_name(line: Any) -> str:
    """What a line tells of."""
    if not isinstance(line, dict):
        return "not a JSON object"
    if "loss_nats" in line:
        return f"loss at step {line.get('step')}"
    return f"scores of the {line.get('weights')} at step {line.get('step')}"


def _rates(lines: Sequence[dict], plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """The learning rates are the plan's; the first that is not is told."""
    average = plan.recipe.average
    scored = "average" if average is not None and average.is_scored else "model"
    name = plan.recipe.of_task.scores[0]
    scores: list[float] = []  # before a line, for a rate that follows them
    for line in lines:
        if not isinstance(line, dict) or not isinstance(step := line.get("step"), int):
            continue
        if line.get("weights") == scored and isinstance(line.get(name), float):
            scores.append(line[name])
        if "loss_nats" not in line or not 0 < step <= plan.num_steps:
            continue
        if line.get("lr") != (wanted := plan.lr_at(step - 1, scores)):
            yield f"learning rate at step {step}", wanted, line.get("lr")
            return
    yield "learning rates", "the plan's", "the plan's"


def _last_scores(lines: Sequence[dict], row: Row) -> Iterator[tuple[str, Any, Any]]:
    """The last line of the weights that are scored is the row's result; that of the others its
    other score.
    """
    last = {line["weights"]: line for line in lines if isinstance(line, dict) and "weights" in line}
    if row.curves_incomplete and row.scored not in last:
        return
    scored = last.get(row.scored, {})
    for name, value in row.percentages.items():
        yield f"the row's {name}, as its last line", value, scored.get(name)
    for name, of_row in _SCORES.items():
        yield f"the row's {of_row}, as its last line", getattr(row, of_row), scored.get(name)
    yield "the last line's step", row.steps, scored.get("step")
    other = last.get("average" if row.scored == "model" else "model")
    yield (
        "the score of the weights not scored",
        row.other_top1_pct,
        (main_score(other) or ("", None))[1] if other else None,
    )
