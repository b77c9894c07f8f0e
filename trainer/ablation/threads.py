"""The number of threads of an ablation's processes, chosen before torch is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.base.settings import check_writable, num_cores


def set_num_threads(runs: Path, ablation: str, jobs: int) -> None:
    """Set OMP_NUM_THREADS for this process and all that it starts, unless the user has set it.

    It must come before anything that reads the variable on import, as torch does.
    """
    check_writable("runs", runs)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(choose_threads(runs, ablation, jobs, num_cores()))


def choose_threads(runs: Path, ablation: str, jobs: int, num_cores: int) -> int:
    """Threads of each process: its share of the cores, as the first call of this ablation chose it.

    The number moves the last digits of a result, so later calls keep it, whatever their `jobs`.
    Where two first calls race, both use the number whose file is there first.
    """
    path = Path(runs) / "cells" / f"{Path(ablation).stem[:80]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{os.getpid()}.part")
    own.write_text(json.dumps({"num_threads": max(1, num_cores // jobs)}) + "\n")
    try:
        os.link(own, path)  # unlike a rename, it fails where the file exists
    except FileExistsError:
        pass
    finally:
        own.unlink()
    try:
        return int(json_file(path)["num_threads"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: damaged; remove it, and the number of threads is chosen again"
        ) from None
