"""`make table` on a store of 20,000 rows: seconds, processor seconds, memory; of the worst kind,
and of the usual one.

All rows of the worst kind have the page, model, data and seeds of the table: each must be opened.
Of the usual kind most belong to other pages. "first" works out the ablation's page, the others find
it in the cache.

    python tests/benchmarks/bench_tables.py [rows]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STUDY = "norm-micro-batch"


def fill(results: Path, num_rows: int, is_worst: bool) -> None:
    """The committed rows, and copies of them under other seeds' or pages' names that no cell of the
    study has.
    """
    rows = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results" / "rows").glob("gn-ws.v1-resnet18-digits-*.json"))
    ]
    (results / "rows").mkdir(parents=True)
    for number in range(num_rows):
        row = dict(rows[number % len(rows)])
        if number >= len(rows):
            recipe = "gn-ws" if is_worst or number % 10 == 0 else "A1"
            row["deviations"] = [
                *row["deviations"],
                {"path": "smoothing", "before": "off", "after": f"0.{number:06d}", "origin": "set"},
            ]
            row["run"] = f"{recipe}.v1-resnet18-digits-s{number % 3}-{number:06x}"
            row["recipe"], row["seed"] = recipe, number % 3
        (results / "rows" / f"{row['run']}.json").write_text(json.dumps(row, indent=2))


def run(results: Path, cache: Path, *words: str) -> str:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "trainer",
        "table",
        "--ablation",
        STUDY,
        "--results",
        results,
        "--runs",
        results / "none",
        *words,
    ]
    # the most memory of a child is only told of all children together: one process for each
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
        " stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        check=True,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        f"{time.perf_counter() - started_s:6.2f} s  {cpu_s:6.2f} processor s "
        f" {int(done.stdout) / 1024:6.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int, nargs="?", default=20_000)
    num_rows = parser.parse_args().rows
    for name, is_worst in (("worst", True), ("usual", False)):
        with tempfile.TemporaryDirectory() as folder:
            results, cache = Path(folder) / "results", Path(folder) / "cache"
            fill(results, num_rows, is_worst)
            for time_of in ("first", "again", "again"):
                print(f"{name:6} {num_rows:,} rows, {time_of}: {run(results, cache)}", flush=True)


if __name__ == "__main__":
    main()
