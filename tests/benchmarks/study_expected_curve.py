"""Is a run with ten times the learning rate called off track, and are healthy ones not? Writes
results/expected-curve.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/study_expected_curve.py [--page]

Resumable: a run that has its row is not trained again. To be started in a clean checkout, as every
row says whether it was one. --page only writes the page, of the rows in results/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.data.dataset import open_data
from trainer.runs.expected import ExpectedCurve, Verdict
from trainer.runs.job import Job, plan_of
from trainer.runs.results import Row, read_row

ROOT = Path(__file__).parents[2]
RECIPE, MODEL, DATA = "A3.v1", "test_resnet", "digits"
EARLIER, HEALTHY, WILD = range(5), range(5, 8), range(8, 11)  # seeds
OVERRIDES = (
    "epochs=4 lr.warmup_epochs=null lr.warmup_from=null"  # else epoch 1 is at a rate of 1e-6
)
WILD_OVERRIDES = f"{OVERRIDES} lr.peak=0.08"  # the recipe has 0.008


def run_of(seed: int, overrides: str) -> str:
    """The name of a run of the study."""
    plan = plan_of(Job(RECIPE, MODEL, DATA, seed=seed, overrides=overrides))
    return plan.run_name(open_data(plan.profile, None).fingerprint)


def row_of(seed: int, overrides: str, results: Path) -> Row:
    """A run's row. Raises UserError where there is none."""
    run = run_of(seed, overrides)
    row = read_row(results, run)
    if row is None:
        raise UserError(f"{run}: no row in {results}", "run this script without --page")
    return row


def verdicts(row: Row, earlier: ExpectedCurve) -> list[Verdict]:
    """What each evaluation of a row's run says beside earlier ones."""
    curve: dict[int, int] = {}
    found = []
    for epoch, score in enumerate(row.by_epoch_pct, start=1):
        curve[epoch] = score
        found.append(earlier.verdict(curve))
    return found


def train(seed: int, overrides: str, *more: str) -> int:
    """Train one run into results/; gives the program's exit code."""
    words = [f"recipe={RECIPE}", f"model={MODEL}", f"data={DATA}", f"seed={seed}", "device=cpu"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "trainer", "train", *words, f"set={overrides}", *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
    ).returncode


def run_all() -> None:
    """Every run of the study; those with ten times the rate twice, first to be ended."""
    for seed in (*EARLIER, *HEALTHY):
        assert train(seed, OVERRIDES) == 0
    expect = f"expect={run_of(EARLIER[0], OVERRIDES)}"
    for seed in WILD:
        assert train(seed, WILD_OVERRIDES, expect, "stop_if=off_track") == 1
        assert train(seed, WILD_OVERRIDES, expect) == 0


def page(results: Path) -> str:
    """The study as a page, of its rows."""
    earlier_rows = [row_of(seed, OVERRIDES, results) for seed in EARLIER]
    expected = verdicts(earlier_rows[0], ExpectedCurve(earlier_rows))
    lines, ended = [], list(earlier_rows)
    kinds = [(seed, OVERRIDES, "healthy") for seed in HEALTHY]
    for seed, overrides, what in [*kinds, *((seed, WILD_OVERRIDES, "LR x 10") for seed in WILD)]:
        row = row_of(seed, overrides, results)
        ended.append(row)
        before = [row_of(seed, OVERRIDES, results) for seed in range(min(seed, HEALTHY[-1] + 1))]
        earlier = ExpectedCurve(before)
        cells = [
            f"{one.score_pct:.1f}, {one.sigma:+.1f}: {one.state}" for one in verdicts(row, earlier)
        ]
        what = f"{what}, beside {len(before)}"
        lines.append(f"| `{row.run}` | {what} | " + " | ".join(cells) + " |")
    spread = " | ".join(f"{one.mean_pct:.1f} ± {one.std_pct:.1f}" for one in expected)
    heads = " | ".join(f"epoch {one.epoch}" for one in expected)
    names = ", ".join(f"`{row.run}`" for row in earlier_rows)
    wild = row_of(WILD[0], WILD_OVERRIDES, results)
    return _PAGE.format(
        recipe=RECIPE, model=MODEL, data=DATA, overrides=OVERRIDES, wild=WILD_OVERRIDES,
        wild_seed=WILD[0], names=names, heads=heads, rules="|---" * (2 + len(expected)) + "|",
        spread=spread, rows="\n".join(lines), ends=", ".join(f"`{row.run}` {row.top1_pct:.2f}" for row in ended),
        first=earlier_rows[0].run,
        version=f"{wild.recipe}.v{wild.version}", num_val=wild.num_val_images,
    )  # fmt: skip


_PAGE = """# Is a run on the track of earlier ones?

{version}, {model}, {data} ({num_val} val images), `set="{overrides}"`, one thread of a CPU. Seeds 0 to 4 are the first rows: {names}. Three more
seeds of the same recipe are compared with those before them, and three runs with ten times the learning rate with these eight:

```sh
make recipe={recipe} model={model} data={data} seed={wild_seed} set="{wild}" expect={first} stop_if=off_track
```

Top-1 in percent of val, how many sigma from the earlier rows, and what is said. The rule is in [trainer/README.md](../trainer/README.md#watching-a-run).

| run | | {heads} |
{rules}
| seeds 0 to 4 | mean ± s | {spread} |
{rows}

Top-1 at the end, in percent: {ends}.

Each run with ten times the rate was first trained with `stop_if=off_track`, which ended it with exit 1 and no row where the table first says so; the
same command without it resumed it to the row above. torchvision-v1 (SGD) was tried before, with one seed: there a rate ten times as high has caught up
by the second epoch, and is not off track. That one evaluation far outside is enough was made a rule after the first run with ten times the rate, of seed 8,
had been seen. Only the first five rows as the earlier ones would not do for the runs with ten times the rate: the second evaluation of the first of
them is then at 3.0 sigma, and far outside begins at 3.1; it would be called at the third.
Written by `tests/benchmarks/study_expected_curve.py`.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        run_all()
    write_atomically(ROOT / "results" / "expected-curve.md", page(ROOT / "results").encode())
