"""Is the recommended learning rate a good one? Trains it, and a grid around it, on the digits;
writes results/lr-find.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/study_lr_find.py --runs runs --results results
    [--pairs "A1-resnet18"] [--no-others] [--seeds]

To be started in a clean checkout, as every row says whether it was one; --results may name another
one's store. Resumable: a pair's range test is done once (results/lr-find/<pair>.json), a run that
has its row is skipped, and the page is written anew after every run. --seeds: where a rate of the
grid beats the recommended one by more than a point, both on two more seeds. --again "A1-resnet18"
forgets a pair's range test; --page only writes the page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import foreign_rules

PAGES = ("A1", "A3", "torchvision-v1", "gn-ws", "convnext")
MODELS = ("resnet18", "convnext_atto")
NOT_ALLOWED = {("gn-ws", "convnext_atto"): "32 groups do not divide its 40 channels"}
# 0.9999 over a few hundred steps is the first weights: its score would say nothing of the rate
ALSO_SET = {"convnext": "average=null"}
STEPS = (-2, -1, 0, 1, 2)  # of the grid: powers of three
SEEDS = (0, 1, 2)  # the grid is of the first
NEAR_PCT = 1.0  # points below the grid's best
OURS = "recommended"


@dataclass(frozen=True)
class Pair:
    """A page on a model."""

    page: str
    model: str

    def __str__(self) -> str:
        return f"{self.page}-{self.model}"

    @property
    def also(self) -> str:
        return ALSO_SET.get(self.page, "")

    def overrides(self, peak: str) -> str:
        """The text of set= of a run at a peak. A warm-up or an end above the peak comes down in
        proportion, as the page wants.
        """
        from trainer.recipe.schema import load_recipe
        from trainer.recipe.shipped import find_recipe

        lr = load_recipe(find_recipe(self.page)).lr
        ends = {
            "lr.warmup_from": lr.warmup_from,
            "lr.schedule.end": getattr(lr.schedule, "end", None),
        }
        lower = [
            f"{path}={peak_text(end * float(peak) / lr.peak)}"
            for path, end in ends.items()
            if (end or 0) > float(peak)
        ]
        return " ".join(filter(None, (f"lr.peak={peak}", *lower, self.also)))


PAIRS = [
    Pair(page, model) for model in MODELS for page in PAGES if (page, model) not in NOT_ALLOWED
]


def peak_text(value: float) -> str:
    """A learning rate as it is written into a run: three digits, so that neighbouring grids meet."""
    return f"{value:.3g}"


class Store:
    """What is there of the study: range tests and rows."""

    def __init__(self, results: Path) -> None:
        self.results = results
        rows = [json.loads(path.read_text()) for path in sorted((results / "rows").glob("*.json"))]
        self.rows = {place: row for row in rows for place in [self._place(row)] if place}

    @staticmethod
    def _place(row: dict) -> tuple[str, str, float, int] | None:
        """(page, model, peak, seed) of a row of this study; None for any other."""
        pair = Pair(row["recipe"], row["model"])
        changed = {
            change["path"]: change["after"]
            for change in row["deviations"]
            if change["origin"] == "set"
        }
        if (
            pair not in PAIRS
            or row["data"] != "digits"
            or row["seed"] not in SEEDS
            or "lr.peak" not in changed
        ):
            return None
        others = {
            path: after
            for path, after in changed.items()
            if path not in ("lr.peak", "lr.warmup_from", "lr.schedule.end")
        }
        return (
            (pair.page, pair.model, float(changed["lr.peak"]), row["seed"])
            if others == ({"average": "off"} if pair.also else {})
            else None
        )

    def range_test(self, pair: Pair) -> dict | None:
        path = self.path(pair)
        return json.loads(path.read_text()) if path.exists() else None

    def path(self, pair: Pair) -> Path:
        return self.results / "lr-find" / f"{pair}.json"

    def row(self, pair: Pair, peak: float, seed: int = 0) -> dict | None:
        return self.rows.get((pair.page, pair.model, float(peak_text(peak)), seed))

    def score(self, pair: Pair, peak: float, seed: int = 0) -> float | None:
        """Top-1 per cent at a peak: 0 where the run diverged, None where it was not run."""
        row = self.row(pair, peak, seed)
        return None if row is None else row["top1_pct"] or 0.0


# ---- the study: range tests, then the grids, then what other rules suggest


def wanted(store: Store, pairs: list[Pair], with_others: bool) -> Iterator[tuple[Pair, float]]:
    """Every run that the tables need and that has no row, the grids first."""
    for pair in pairs:
        found = store.range_test(pair)
        if found and found["value"]:
            for step in STEPS:
                yield pair, found["value"] * 3.0**step
    for pair in pairs if with_others else ():
        found = store.range_test(pair)
        if found and found["value"]:
            for value in foreign(found).values():
                if value is not None:
                    yield pair, on_ladder(found["value"], value)


def on_ladder(recommended: float, value: float) -> float:
    """The nearest rate, on the logarithm, of the grid gone on in both directions."""
    return recommended * 3.0 ** round(math.log(value / recommended, 3))


def foreign(found: dict) -> dict[str, float | None]:
    """What every other rule makes of the same ramps."""
    ramps = [(ramp["values"], ramp["losses"]) for ramp in found["ramps"]]
    return {rule: foreign_rules.suggestion(rule, ramps) for rule in foreign_rules.RULES}


def find(pair: Pair, runs: Path) -> dict:
    """The range test of a pair with its defaults, as it is kept."""
    from trainer import lr_find
    from trainer.base import provenance

    made = lr_find(pair.page, pair.model, "digits", set=pair.also, device="cpu", runs=runs)
    commit, is_dirty = provenance.commit()
    return {"commit": commit, "dirty": is_dirty, **kept(made.suggestion)}


def kept(suggestion) -> dict:
    """A suggestion with the training curves of its ramps, as JSON: numbers as measured."""
    ramps = [curve for curve in suggestion.curves if curve.purpose == "ramp"]
    return {
        "value": suggestion.value,
        "reason": suggestion.reason,
        "num_steps": sum(len(curve.losses) for curve in suggestion.curves),
        "rules": {rule: found and found.median for rule, found in suggestion.rules.items()},
        "edge": suggestion.edge and suggestion.edge.median,
        "stable": suggestion.stable,
        "candidates": [
            [one.value, {str(seed): loss for seed, loss in one.losses.items()}]
            for one in suggestion.candidates
        ],
        "ramps": [
            {"seed": ramp.seed, "values": list(ramp.values), "losses": list(ramp.losses)}
            for ramp in ramps
        ],
    }


def train(pair: Pair, peak: float, runs: Path, results: Path, seed: int = 0) -> int:
    """One run on the road of `make recipe=... set=...`; its exit code."""
    from rich.console import Console

    from trainer.base.settings import make_settings
    from trainer.base.signals import StopRequest
    from trainer.data.dataset import open_data
    from trainer.runs.job import Job, plan_of, run_job

    job = Job(pair.page, pair.model, seed=seed, overrides=pair.overrides(peak_text(peak)))
    plan = plan_of(job)
    data = open_data(plan.profile, None)
    settings = make_settings("cpu", runs=runs, results=results, in_memory=True)
    with StopRequest() as stop:
        return run_job(job, plan, settings, data, Console(quiet=True), stop)[0]


def study(pairs: list[Pair], runs: Path, results: Path, with_others: bool) -> int:
    from trainer.base.exits import EXIT_STOPPED

    for pair in pairs:
        store = Store(results)
        if store.range_test(pair) is None:
            store.path(pair).parent.mkdir(parents=True, exist_ok=True)
            store.path(pair).write_text(json.dumps(find(pair, runs)) + "\n")
            print(
                f"{pair}: {store.range_test(pair)['value']} {store.range_test(pair)['reason']}",
                flush=True,
            )
        for each, peak in wanted(store, [pair], with_others=False):
            if (
                Store(results).row(each, peak) is None
                and train(each, peak, runs, results) == EXIT_STOPPED
            ):
                return EXIT_STOPPED
            told(each, peak, results)
    for pair, peak in wanted(Store(results), pairs, with_others):
        if Store(results).row(pair, peak) is None:
            if train(pair, peak, runs, results) == EXIT_STOPPED:
                return EXIT_STOPPED
            told(pair, peak, results)
    return 0


def beaten(store: Store, pairs: list[Pair]) -> Iterator[tuple[Pair, list[float]]]:
    """The pairs whose recommended rate is not near the grid's best: that rate, and all that beat
    it.
    """
    for pair in pairs:
        value = (store.range_test(pair) or {}).get("value")
        if (distance_of(store, pair, value) or 0) > NEAR_PCT:
            grid = [value * 3.0**step for step in STEPS]
            yield (
                pair,
                [
                    value,
                    *(peak for peak in grid if store.score(pair, peak) > store.score(pair, value)),
                ],
            )


def more_seeds(pairs: list[Pair], runs: Path, results: Path) -> int:
    from trainer.base.exits import EXIT_DONE, EXIT_STOPPED

    for pair, peaks in beaten(Store(results), pairs):
        for peak, seed in ((peak, seed) for peak in peaks for seed in SEEDS[1:]):
            if Store(results).row(pair, peak, seed) is None:
                if train(pair, peak, runs, results, seed) == EXIT_STOPPED:
                    return EXIT_STOPPED
                write_page(Store(results))
                print(
                    f"{pair} lr.peak={peak_text(peak)} seed {seed}:"
                    f" {Store(results).score(pair, peak, seed)}",
                    flush=True,
                )
    return EXIT_DONE


def told(pair: Pair, peak: float, results: Path) -> None:
    store = Store(results)
    write_page(store)
    print(f"{pair} lr.peak={peak_text(peak)}: {store.score(pair, peak)}", flush=True)


# ---- the page: all from the store


def grid_table(store: Store) -> str:
    """Per pair: the recommended rate, the scores of the grid, its best, and how far the recommended
    is from it.
    """
    heads = " | ".join(
        "x 1" if not step else f"x {3**step}" if step > 0 else f"/ {3**-step}" for step in STEPS
    )
    lines = [
        f"| recipe | model | recommended | {heads} | best | points below it |",
        "|---" * (5 + len(STEPS)) + "|",
    ]
    for pair in PAIRS:
        found = store.range_test(pair)
        lines.append(
            f"| {pair.page} | {pair.model} | {' | '.join(grid_cells(store, pair, found))} |"
        )
    return "\n".join(lines)


def grid_cells(store: Store, pair: Pair, found: dict | None) -> list[str]:
    if found is None or found["value"] is None:
        return [
            "none: " + found["reason"].partition(": ")[2] if found else "not run",
            *[""] * (len(STEPS) + 2),
        ]
    scores = [store.score(pair, found["value"] * 3.0**step) for step in STEPS]
    cells = [
        peak_text(found["value"]),
        *("not run" if score is None else f"{score:.2f}" for score in scores),
    ]
    distance = distance_of(store, pair, found["value"])
    return [
        *cells,
        "" if distance is None else f"{max(scores):.2f}",
        "" if distance is None else f"{distance:.2f}",
    ]


def best_of_grid(store: Store, pair: Pair) -> float | None:
    """The best score of a pair's whole grid, None while a part of it is not run."""
    found = store.range_test(pair)
    if not found or not found["value"]:
        return None
    scores = [store.score(pair, found["value"] * 3.0**step) for step in STEPS]
    return None if None in scores else max(scores)


def distance_of(store: Store, pair: Pair, value: float | None) -> float | None:
    """Points between the grid's best and the run at the ladder's rate nearest to a value; below 0
    where that is better.
    """
    best = best_of_grid(store, pair)
    if best is None or value is None:
        return None
    score = store.score(pair, on_ladder(store.range_test(pair)["value"], value))
    return None if score is None else best - score


def rules_table(store: Store) -> str:
    """Per rule: what it suggests for each pair, and the points between the grid's best and that."""
    pairs = [pair for pair in PAIRS if best_of_grid(store, pair) is not None]
    lines = [
        f"| rule | {' | '.join(map(str, pairs))} | median | worst |",
        "|---" * (len(pairs) + 3) + "|",
    ]
    for rule in (OURS, *foreign_rules.RULES):
        values = [
            (
                store.range_test(pair)["value"]
                if rule == OURS
                else foreign(store.range_test(pair))[rule]
            )
            for pair in pairs
        ]
        distances = [
            distance_of(store, pair, value) for pair, value in zip(pairs, values, strict=True)
        ]
        cells = [
            "none" if value is None else f"{peak_text(value)}: {shown(far)}"
            for value, far in zip(values, distances, strict=True)
        ]
        known = sorted(far for far in distances if far is not None)
        middle = (known[len(known) // 2] + known[(len(known) - 1) // 2]) / 2 if known else None
        lines.append(
            f"| {rule} | {' | '.join(cells)} | {shown(middle)} |"
            f" {shown(max(known, default=None))} |"
        )
    return "\n".join(lines)


def shown(points: float | None) -> str:
    return "not run" if points is None else f"{points:.2f}"


def seeds_table(store: Store) -> str:
    """Of the pairs whose recommended rate was beaten: every seed, and the mean."""
    lines = [
        f"| recipe | model | lr.peak | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean | |",
        "|---" * (5 + len(SEEDS)) + "|",
    ]
    for pair, (value, *others) in beaten(store, PAIRS):
        for peak in (value, *others):
            scores = [store.score(pair, peak, seed) for seed in SEEDS]
            mean = None if None in scores else sum(scores) / len(scores)
            cells = [shown(score) for score in (*scores, mean)]
            lines.append(
                f"| {pair.page} | {pair.model} | {peak_text(peak)} | {' | '.join(cells)} |"
                f" {OURS if peak == value else ''} |"
            )
    return "\n".join(lines)


def row_list(store: Store) -> str:
    """Every row of the study: its run and its score."""
    lines = ["| recipe | model | lr.peak | seed | top-1 % | run |", "|---|---|---|---|---|---|"]
    for (page, model, peak, seed), row in sorted(store.rows.items()):
        score = "diverged" if row["top1_pct"] is None else f"{row['top1_pct']:.2f}"
        lines.append(
            f"| {page} | {model} | {peak_text(peak)} | {seed} | {score} | `{row['run']}` |"
        )
    return "\n".join(lines)


def write_page(store: Store) -> None:
    """Put the tables between the marks of results/lr-find.md; the words around them stay."""
    page = store.results / "lr-find.md"
    text = page.read_text()
    for name, table in (
        ("grid", grid_table(store)),
        ("seeds", seeds_table(store)),
        ("rules", rules_table(store)),
        ("rows", row_list(store)),
    ):
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {name} -->")
        assert start and end, f"{page}: no place for the table of {name}"
        text = f"{before}{start}{table}{end}{after}"
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--pairs", default=" ".join(map(str, PAIRS)), help="only these")
    parser.add_argument("--again", default="", help="pairs whose range test is done anew")
    parser.add_argument(
        "--no-others", action="store_true", help="no runs at what other rules suggest"
    )
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="two more seeds where the grid beats the recommended rate by over a point",
    )
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    store, pairs = (
        Store(given.results),
        [pair for pair in PAIRS if str(pair) in given.pairs.split()],
    )
    for pair in PAIRS:
        if str(pair) in given.again.split():
            store.path(pair).unlink(missing_ok=True)
    code = 0
    if given.seeds:
        code = more_seeds(pairs, given.runs, given.results)
    elif not given.page:
        code = study(pairs, given.runs, given.results, not given.no_others)
    write_page(Store(given.results))
    return code


if __name__ == "__main__":
    sys.exit(main())
