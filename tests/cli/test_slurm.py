"""A job file on a real Slurm: two ranks, a signal before the time is over, the queue again, the
same run.
"""

import json
import subprocess
import sys

import pytest

from support import forked
from support.endings import ending
from support.slurm import Slurm, wait_for


def job_file(folder, *more: str):
    """The job file that launch-slurm writes for a run of two ranks in a folder."""
    path = folder / "job.sh"
    asked = ["launch-slurm", "--gpus=0", "--cpus=1", "--hours=0.2", f"--job={path}"]
    asked += [
        f"--sbatch=--ntasks-per-node=2 --mem=1 --output={folder}/%j.log",
        *forked.words(folder)[1:],
        *more,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *asked], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "submit it with: sbatch" in done.stdout, done.stderr
    return path


@pytest.mark.drill  # CI runs it by itself
def test_a_job_that_slurm_signals_is_saved_queued_again_and_ends_as_one_run(tmp_path):
    alone = tmp_path / "alone"
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *forked.words(alone), "--procs=2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with Slurm() as slurm:
        # the loader waits long enough for the signal to come in the middle
        path = job_file(tmp_path, "--inject=slow@9:6s")
        job = slurm.ask("sbatch", "--parsable", str(path)).strip()
        log = tmp_path / f"{job}.log"
        wait_for(
            slurm,
            lambda: (
                "slow@9" in "".join(mark.read_text() for mark in tmp_path.glob("runs/*/injected"))
            ),
            "step",
            log,
        )
        slurm.ask(
            "scancel", "--signal=USR1", job
        )  # what --signal=USR1@120 does two minutes before the end
        wait_for(slurm, lambda: slurm.state(job) == ("COMPLETED", 1), "second end", log)
        text = log.read_text()
    assert "stopped by SIGUSR1 after step 9" in text and "resumed after step 9" in text, text
    assert {**ending(tmp_path), "row": 0} == {**ending(alone), "row": 0}
    rows = [
        json.loads(one.read_text())
        for folder in (alone, tmp_path)
        for one in folder.glob("results/rows/*.json")
    ]
    assert len(rows) == 2 and rows[0]["world_size"] == rows[1]["world_size"] == 2
    assert (
        rows[0]["weights_sha256"] == rows[1]["weights_sha256"]
        and rows[0]["top1_pct"] == rows[1]["top1_pct"]
    )
