"""Where the benchmarks leave what they found."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.base.disk import write_atomically

BENCH = Path(__file__).parents[2] / "results" / "bench"


def write(name: str, facts: dict, table: str | None = None) -> None:
    """results/bench/<name>.json, and .md where there is a table."""
    BENCH.mkdir(parents=True, exist_ok=True)
    if table is not None:
        write_atomically(BENCH / f"{name}.md", table.encode())
    write_atomically(BENCH / f"{name}.json", (json.dumps(facts, indent=2) + "\n").encode())
