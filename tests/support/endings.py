"""What a run left, and whether a process is stopped."""

import json
from pathlib import Path


def ending(folder: Path) -> dict:
    """What must be equal: the row without times, the curves byte for byte."""
    (row_path,) = (folder / "results" / "rows").glob("*.json")
    row = json.loads(row_path.read_text())
    (metrics,) = (folder / "runs").glob("*/metrics.jsonl")
    times = (
        "images_per_s",
        "train_s",
        "step_s",
        "step_spread_share",
        "load_per_core",
        "peak_mem_mib",
        "finished_utc",
        "commit",
        "dirty",
        "num_workers",
    )
    return {
        "row": {key: value for key, value in row.items() if key not in times},
        "metrics": metrics.read_bytes(),
    }


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
