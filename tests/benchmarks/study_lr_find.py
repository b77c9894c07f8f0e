"""Does `make lr-find` answer the same again, and is the answer a good one? Writes
results/lr-find.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/study_lr_find.py tests --runs runs --results results
    OMP_NUM_THREADS=2 python tests/benchmarks/study_lr_find.py tests --runs runs --results results
    OMP_NUM_THREADS=1 python tests/benchmarks/study_lr_find.py grids --runs runs --results results
    python tests/benchmarks/study_lr_find.py page --results results

tests: each pair's range test from three base seeds, with as many threads as the environment says;
kept in results/lr-find/<pair>.json. grids: runs at the answer, a third and three times it, on three
seeds. To be started in a clean checkout, as every row says whether it was one; --results may name
another one's store. Resumable: what is there is skipped, and the page is written anew after every
step. --pairs "A1-resnet18" does these only, --seeds "0 5" these base seeds or these of the grids.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import foreign_rules

PAGES = ("A1", "A3", "torchvision-v1", "gn-ws", "convnext")
MODELS = ("resnet18", "convnext_atto")
NOT_ALLOWED = {("gn-ws", "convnext_atto"): "32 groups do not divide its 40 channels"}
# 0.9999 over a few hundred steps is the first weights: its score would say nothing of the rate
ALSO_SET = {"convnext": "average=null"}
STEPS = (-1, 0, 1)  # of the grid: powers of three
SEEDS = (0, 1, 2)
BASE_SEEDS = (0, 5, 10)  # a range test takes three seeds from there on, up to five
THREADS = (1, 2)
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
    """A learning rate as it is written into a run: three digits: neighbouring grids meet."""
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

    def tests(self, pair: Pair) -> dict[str, dict]:
        """The range tests of a pair: by "<base seed>/<threads>"."""
        path = self.path(pair)
        return json.loads(path.read_text()) if path.exists() else {}

    def range_test(self, pair: Pair) -> dict | None:
        """The one that the grid is around."""
        return self.tests(pair).get(test_key(BASE_SEEDS[0], THREADS[0]))

    def keep(self, pair: Pair, key: str, found: dict) -> None:
        path = self.path(pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.tests(pair) | {key: found}) + "\n")

    def path(self, pair: Pair) -> Path:
        return self.results / "lr-find" / f"{pair}.json"

    def score(self, pair: Pair, peak: float, seed: int) -> float | None:
        """Top-1 per cent at a peak: 0 where the run diverged, None where it was not run."""
        row = self.rows.get((pair.page, pair.model, float(peak_text(peak)), seed))
        return None if row is None else row["top1_pct"] or 0.0

    def scores(self, pair: Pair, peak: float) -> list[float]:
        """Those of all seeds that were run."""
        found = [self.score(pair, peak, seed) for seed in SEEDS]
        return [score for score in found if score is not None]

    def means(self, pair: Pair) -> dict[float, float]:
        """The mean score at every rate that was ever run."""
        peaks = {key[2] for key in self.rows if key[:2] == (pair.page, pair.model)}
        return {peak: mean(self.scores(pair, peak)) for peak in sorted(peaks)}


def test_key(base_seed: int, threads: int) -> str:
    return f"{base_seed}/{threads}"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


# ---- the study: range tests, then the grids


def find(pair: Pair, base_seed: int, runs: Path) -> dict:
    """The range test of a pair with its defaults but for its first seed, as it is kept."""
    from trainer.base import provenance
    from trainer.lr_finder.api import Request, run, set_up
    from trainer.lr_finder.trial import untouched
    from trainer.runs.job import Job

    with untouched("cpu"):
        job = Job(pair.page, pair.model, seed=base_seed, overrides=pair.also)
        setup = set_up(job, Request(), {"device": "cpu", "runs": runs})
        suggestion = run(setup).suggestion
    commit, is_dirty = provenance.commit()
    facts = {"commit": commit, "dirty": is_dirty, "share": setup.lengths.horizon_share}
    return {**facts, **kept(suggestion, with_ramps=base_seed == BASE_SEEDS[0])}


def kept(suggestion, with_ramps: bool) -> dict:
    """A suggestion, with the training curves of its ramps where asked for, as JSON: numbers as
    measured.
    """
    ramps = [curve for curve in suggestion.curves if curve.purpose == "ramp" and with_ramps]
    return {
        "value": suggestion.value,
        "interval": suggestion.interval and asdict(suggestion.interval),
        "reason": suggestion.reason,
        "num_trials": len(suggestion.curves),
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


def test_all(pairs: list[Pair], seeds: list[int], runs: Path, results: Path) -> int:
    import torch

    threads = torch.get_num_threads()
    for base_seed in seeds:
        for pair in pairs:
            key, store = test_key(base_seed, threads), Store(results)
            if key not in store.tests(pair):
                store.keep(pair, key, find(pair, base_seed, runs / f"threads-{threads}"))
                write_page(Store(results))
                found = store.tests(pair)[key]
                print(f"{pair} {key}: {found['value']} {found['reason']}", flush=True)
    return 0


def train(pair: Pair, peak: float, runs: Path, results: Path, seed: int) -> int:
    """One run on the code path of `make recipe=... set=...`; its exit code."""
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


def wanted(store: Store, pairs: list[Pair], seeds: list[int]) -> Iterator[tuple[Pair, float, int]]:
    """Every run of the grids: all of one seed first."""
    for seed in seeds:
        for pair in pairs:
            found = store.range_test(pair)
            if found and found["value"]:
                yield from ((pair, found["value"] * 3.0**step, seed) for step in STEPS)


def train_all(pairs: list[Pair], seeds: list[int], runs: Path, results: Path) -> int:
    from trainer.base.exits import EXIT_STOPPED

    for pair, peak, seed in wanted(Store(results), pairs, seeds):
        if Store(results).score(pair, peak, seed) is None:
            if train(pair, peak, runs, results, seed) == EXIT_STOPPED:
                return EXIT_STOPPED
            store = Store(results)
            write_page(store)
            score = store.score(pair, peak, seed)
            print(f"{pair} lr.peak={peak_text(peak)} seed {seed}: {score}", flush=True)
    return 0


# ---- the page: all from the store


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows).replace("| --- ", "|---")


def tests_table(store: Store) -> str:
    """Per pair: the answer from every base seed with either number of threads, and the factor
    between the lowest and the highest.
    """
    keys = [test_key(seed, threads) for threads in THREADS for seed in BASE_SEEDS]
    heads = [
        f"{threads} thread{'s' * (threads > 1)}, seeds from {seed}"
        for threads in THREADS
        for seed in BASE_SEEDS
    ]
    lines = []
    for pair in PAIRS:
        tests = store.tests(pair)
        values = [tests[key]["value"] for key in keys if key in tests and tests[key]["value"]]
        cells = [answer_of(tests.get(key)) for key in keys]
        factor = f"{max(values) / min(values):.2f}" if len(values) > 1 else ""
        lines.append([pair.page, pair.model, *cells, factor])
    return table(["recipe", "model", *heads, "highest / lowest"], lines)


def answer_of(found: dict | None) -> str:
    if found is None:
        return "not run"
    ends = found["interval"]
    if found["value"] is None:
        return (
            f"none ({peak_text(ends['lowest'])} to {peak_text(ends['highest'])})"
            if ends
            else "none"
        )
    return (
        f"{peak_text(found['value'])} ({peak_text(ends['lowest'])} to {peak_text(ends['highest'])})"
    )


def grid_table(store: Store) -> str:
    """Per pair: the mean scores at the answer, a third and three times it, with the number of seeds
    and their range, and how far the answer is from the best.
    """
    heads = ["recipe", "model", "recommended", "/ 3", "x 1", "x 3", "points below the best"]
    lines = []
    for pair in PAIRS:
        found = store.range_test(pair)
        cells = [""] * 5
        if found and found["value"]:
            scores = [store.scores(pair, found["value"] * 3.0**step) for step in STEPS]
            cells = [peak_text(found["value"]), *map(scores_text, scores), ""]
            if all(len(some) == len(SEEDS) for some in scores):
                cells[-1] = f"{max(map(mean, scores)) - mean(scores[1]):.2f}"
        elif found:
            cells[0] = found["reason"]
        lines.append([pair.page, pair.model, *cells])
    return table(heads, lines)


def scores_text(scores: list[float]) -> str:
    if not scores:
        return "not run"
    if len(scores) == 1:
        return f"{scores[0]:.2f} (1 seed)"
    return f"{mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"


def share_table(store: Store) -> str:
    """Per pair: where the candidates' parabola is lowest, where that of the full runs is, and the
    ratio of the two.
    """
    lines, logs = [], []
    for pair in PAIRS:
        found, full = store.range_test(pair), best_rate(store.means(pair))
        if not (found and found["value"] and full):
            continue
        short = found["value"] / found["share"]
        logs.append(math.log(full / short))
        cells = [peak_text(short), peak_text(full), f"{full / short:.2f}"]
        lines.append([pair.page, pair.model, *cells])
    if len(logs) > 1:
        error = math.sqrt(
            sum((one - mean(logs)) ** 2 for one in logs) / (len(logs) - 1) / len(logs)
        )
        cells = [f"{math.exp(mean(logs)):.2f}, standard error a factor {math.exp(error):.2f}"]
        lines.append(["geometric mean", "", "", "", *cells])
    return table(["recipe", "model", "trials' best", "runs' best", "ratio"], lines)


def best_rate(means: dict[float, float]) -> float | None:
    """Where a parabola through the logarithm of the error at the best rate and its neighbours is
    lowest, over the logarithm of the rate; None where the best has no neighbour on a side.
    """
    peaks = sorted(means)
    if len(peaks) < 3:
        return None
    place = max(range(len(peaks)), key=lambda place: means[peaks[place]])
    if not 0 < place < len(peaks) - 1:
        return None
    around = peaks[place - 1 : place + 2]
    x = [math.log(peak) for peak in around]
    y = [math.log(max(100 - means[peak], 0.1)) for peak in around]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if right - left < 1e-9:
        return peaks[place]
    # the slope is `left` half-way to the left neighbour, `right` half-way to the right one
    from_left, from_right = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    return math.exp(from_left - left * (from_right - from_left) / (right - left))


def foreign(found: dict) -> dict[str, float | None]:
    """What every other rule makes of the same ramps."""
    ramps = [(ramp["values"], ramp["losses"]) for ramp in found["ramps"]]
    return {rule: foreign_rules.suggestion(rule, ramps) for rule in foreign_rules.RULES}


def rules_table(store: Store) -> str:
    """Per rule: what it suggests for each pair, and the points between the best rate's score and
    that of the rate nearest to it.
    """
    pairs = [
        pair
        for pair in PAIRS
        if (store.range_test(pair) or {}).get("value") and len(store.means(pair)) > 2
    ]
    lines = []
    for rule in (OURS, *foreign_rules.RULES):
        cells, known = [], []
        for pair in pairs:
            found = store.range_test(pair)
            value = found["value"] if rule == OURS else foreign(found)[rule]
            far = distance_of(store, pair, value)
            known += [] if far is None else [far]
            text = "not run" if far is None else f"{far:.2f}"
            cells.append("none" if value is None else f"{peak_text(value)}: {text}")
        known.sort()
        middle = (known[len(known) // 2] + known[(len(known) - 1) // 2]) / 2 if known else None
        ends = ["" if one is None else f"{one:.2f}" for one in (middle, max(known, default=None))]
        lines.append([rule, *cells, *ends])
    return table(["rule", *map(str, pairs), "median", "worst"], lines)


def distance_of(store: Store, pair: Pair, value: float | None) -> float | None:
    """Points between the best mean score and that at the nearest rate that was run; None where none
    is as near as a factor of the root of three.
    """
    means = store.means(pair)
    if value is None or not means:
        return None
    near = min(means, key=lambda peak: abs(math.log(peak / value)))
    if abs(math.log(near / value)) > math.log(3) / 2 + 0.01:
        return None
    return max(means.values()) - means[near]


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
    for name, made in (
        ("tests", tests_table(store)),
        ("grid", grid_table(store)),
        ("share", share_table(store)),
        ("rules", rules_table(store)),
        ("rows", row_list(store)),
    ):
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {name} -->")
        assert start and end, f"{page}: no place for the table of {name}"
        text = f"{before}{start}{made}{end}{after}"
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tests", "grids", "page"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--pairs", default=" ".join(map(str, PAIRS)), help="only these")
    parser.add_argument("--seeds", default="0 1 2 5 10", help="only these")
    given = parser.parse_args()
    pairs = [pair for pair in PAIRS if str(pair) in given.pairs.split()]
    code, given_seeds = 0, [int(seed) for seed in given.seeds.split()]
    if given.part == "tests":
        seeds = [seed for seed in BASE_SEEDS if seed in given_seeds]
        code = test_all(pairs, seeds, given.runs, given.results)
    elif given.part == "grids":
        seeds = [seed for seed in SEEDS if seed in given_seeds]
        code = train_all(pairs, seeds, given.runs, given.results)
    write_page(Store(given.results))
    return code


if __name__ == "__main__":
    sys.exit(main())
