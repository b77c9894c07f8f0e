"""Tables for tests: cells made by hand, rows with the values that a test says."""

import hashlib

from support.rows import ROW
from trainer.ablation.cells import Cell, plan_of_cell
from trainer.ablation.questions import Question
from trainer.report.tables import METRICS, Table, summarize
from trainer.runs.row import deviation_rows

SEEDS = (0, 1, 2)


def cell(name: str, group: str = "resnet18 on digits", overrides: str = "", **facts) -> Cell:
    """A cell that no recipe has."""
    model, _, data = group.partition(" on ")
    return Cell(
        name,
        "A2",
        model,
        data,
        overrides,
        levels=facts.pop("levels", ()),
        is_base=facts.pop("is_base", False),
        group=group,
        **facts,
    )


def asked(cells, seeds=SEEDS) -> Question:
    return Question(
        "norms",
        "Norms",
        "Which norm?",
        "a paper",
        tuple(seeds),
        tuple(cells),
        identities={},
        prefixes=(),
        smallest=1.0,
    )


def row(name: str, seed: int, top1_pct: float | None, **facts):
    """A row of one seed; without a score it diverged."""
    status = {"status": "finished" if top1_pct is not None else "diverged", "top1_pct": top1_pct}
    run = f"A2.v1-resnet18-digits-s{seed}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return ROW.model_copy(
        update={"run": run, "recipe": "A2", "model": "resnet18", "seed": seed, **status, **facts}
    )


def table_of(
    values: dict[Cell, dict[int, float | None]], seeds=SEEDS, metric="top1", errors=None, **facts
) -> Table:
    """The table of cells whose rows have these values by seed; None is a diverged run. facts: by
    cell's name.
    """
    rows = {
        (one.name, seed): row(one.name, seed, value, **facts.get(one.name, {}))
        for one, by_seed in values.items()
        for seed, value in by_seed.items()
    }
    error_of = (
        (lambda one, seed: (errors or {}).get((one.name, seed)))
        if errors
        else (lambda one, seed: None)
    )
    return summarize(asked(values, seeds), rows, METRICS[metric], error_of)


def stored_row(one: Cell, seed: int, top1_pct: float | None, **facts):
    """The row that a run of a recipe's cell would have."""
    plan = plan_of_cell(one, seed)
    facts = {
        "run": plan.run_name("f" * 64),
        "version": plan.recipe.version,
        "digest": plan.page_digest,
    } | facts
    facts |= {
        "recipe": plan.recipe.name,
        "model": plan.model,
        "data": plan.profile.name,
        "deviations": deviation_rows(plan),
    }
    return row(one.name, seed, top1_pct, **facts)


def key_of(one: Cell, seed: int) -> str:
    return plan_of_cell(one, seed).identity.key
