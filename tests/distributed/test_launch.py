"""gpus= and procs= start ranks from inside the command; their end is the command's. What they do at
work: test_launched.
"""

import inspect
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.plans import small_set
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.distributed import launch
from trainer.distributed.env import find_place, first_host, rank_device
from trainer.distributed.launch import asked_ranks, exit_code, slurm_job

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "r",
    "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_torchrun_and_srun_say_which_rank_this_is():
    place = find_place(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 8, 1, 2)
    assert (place.host, place.port, place.serves, place.by) == ("node7", 29500, False, "torchrun")
    assert find_place(TORCHRUN | {"RANK": "0"}).serves is False  # torchrun keeps the port itself
    assert find_place(TORCHRUN | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}).serves
    place = find_place(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 6, 1, 2)
    assert (place.host, place.serves, place.by) == ("gpu07", False, "srun")
    assert find_place(SRUN | {"SLURM_PROCID": "0"}).serves
    assert find_place(SRUN | {"SLURM_STEP_NUM_NODES": "1"}).host == "127.0.0.1"
    assert find_place(SRUN | {"SLURM_JOB_ID": "124"}).port != place.port


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        # the script of sbatch, and the shell of salloc, are no tasks of a step
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_a_process_by_itself_has_no_place(environment):
    assert find_place(environment) is None


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_half_an_environment_is_refused(environment, found):
    with pytest.raises(UserError, match=found):
        find_place(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("gpu[07-09,12],big1", "gpu07"),
        ("a-b[3],c", "a-b3"),
        ("n1.x.org,n2.x.org", "n1.x.org"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert first_host(hosts) == first


def test_gpus_and_procs_must_fit_each_other_the_device_and_what_was_started():
    place = find_place(TORCHRUN)
    assert asked_ranks(None, None, "auto", None) == 1 and asked_ranks(4, None, "auto", None) == 4
    assert asked_ranks(None, 2, "cpu", place) == asked_ranks(None, None, "auto", place) == 2
    for asked in (
        (4, 4, "auto", None),
        (None, 2, "cuda:0", None),
        (2, None, "cpu", None),
        (4, None, "auto", place),
    ):
        with pytest.raises(UserError, match="; (use|valid|leave|run|try)"):
            asked_ranks(*asked)


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = find_place(TORCHRUN)
    assert rank_device("auto", place) == rank_device("cuda", place) == "cuda:1"
    assert rank_device("auto", None) == "auto" and rank_device("cpu", place) == "cpu"
    with pytest.raises(UserError, match="device=cuda gives each its own"):
        rank_device("cuda:0", place)
    with pytest.raises(UserError, match="gpus=2, or procs=4"):
        rank_device("auto", find_place(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert rank_device("auto", find_place(SRUN)) == "cuda:0"  # Slurm shows each task its own alone
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rank_device("auto", place) == "auto"


def test_a_rank_has_as_many_workers_as_its_own_cores_bear(monkeypatch):
    monkeypatch.setattr("trainer.base.settings.num_cores", lambda: 16)
    assert [make_settings("cpu", cores=own).num_workers for own in (None, 8, 2, 1)] == [8, 4, 1, 1]


def ended(*codes: int) -> dict:
    return {
        rank: SimpleNamespace(exitcode=code, pid=100 + rank, timestamp=rank)
        for rank, code in enumerate(codes)
        if code
    }


def test_the_command_ends_as_the_first_rank_that_did(capsys):
    assert exit_code({}, False) == 0
    assert exit_code(ended(0, 3), False) == 3 and exit_code(ended(75, 75), True) == 75
    assert exit_code(ended(2, -15), False) == 2
    for codes in (
        (-15, -15),
        (-15, 1),
        (-10, 75),
        (75, -9),
    ):  # a signal before a rank could listen, or while it left
        assert exit_code(ended(*codes), True) == 75
    assert exit_code(ended(2, -15), True) == 2
    assert capsys.readouterr().err == ""
    assert exit_code(ended(0, -9, 1), False) == 1
    assert "rank 1 (process 101) was ended by SIGKILL" in capsys.readouterr().err


def test_torchs_launcher_takes_the_time_it_may_wait_for_a_rank_that_hangs():
    """By its public parameter, or for an older torch by private names that must be there then."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Newer:
        def __init__(self, spec, shutdown_timeout=30):
            self.shutdown_timeout = shutdown_timeout

    class Older:
        def __init__(self, spec):
            self.closed = []

        def _start_workers(self, group):
            self._pcontext = SimpleNamespace(
                close=lambda death_sig, timeout: self.closed.append(timeout)
            )

    assert launch.agent_class(Newer)("spec").shutdown_timeout == launch.RANKS_END_S
    older = launch.agent_class(Older)("spec")
    older._start_workers("group")
    older._pcontext.close()
    assert older.closed == [launch.RANKS_END_S]
    made = launch.agent_class(LocalElasticAgent)
    if isinstance(made, type):
        assert callable(LocalElasticAgent._start_workers) and "_pcontext" in inspect.getsource(
            LocalElasticAgent
        )


def test_a_signal_before_there_are_ranks_starts_none(monkeypatch, capsys):
    """It comes while the launcher's own libraries are imported."""
    monkeypatch.setattr(launch, "_agent", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(launch.os, "environ", dict(os.environ))
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    with StopRequest() as stop:
        assert launch.launch(2, ["train"], stop) == 75
    said = capsys.readouterr().out
    assert said.startswith("stopped by SIGTERM") and "to resume" in said and said.count("\n") == 1


def test_what_every_rank_would_refuse_is_refused_once(tmp_path):
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        "--recipe",
        "A1",
        "--model",
        "test_resnet",
        "--procs",
        "3",
        "--runs",
        str(tmp_path),
    ]
    words = ["--set", small_set("batch.images=4 batch.norm_images=4")]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "cannot be shared by 3 ranks" in line and "use 1 or 2 ranks" in line


def test_the_job_file_is_one_that_sbatch_takes():
    words = ["train", "--recipe", "A1", "--set", "epochs=5 loss.name='ce'"]
    text = slurm_job(
        words,
        "A1-resnet50",
        nodes=2,
        gpus=4,
        cpus=8,
        hours=24.5,
        extra='--partition big --comment="a b"',
    )
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8",
        "--time=24:30:00", "--signal=USR1@120", "--requeue", '--partition big --comment="a b"',
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < min(
        number for number, line in enumerate(lines[1:], 1) if line and not line.startswith("#")
    )
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert shlex.split(srun)[:3] == [
        "srun",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=0",
    ]  # which srun no longer takes from sbatch
    assert shlex.split(srun)[3:] == [sys.executable, "-m", "trainer", *words]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    with pytest.raises(UserError, match="line breaks"):
        slurm_job(words, "A1\nrm -rf", nodes=1, gpus=1, cpus=1, hours=1)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_job_that_was_stopped_puts_itself_into_the_queue_again(tmp_path, code):
    for name, text in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > asked')):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    script = slurm_job(["train"], "A1", nodes=1, gpus=0, cpus=2, hours=1).replace(
        f"cd {shlex.quote(str(Path.cwd()))}", f"cd {tmp_path}"
    )
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(["bash"], input=script, text=True, env=environment)
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == (code == 75)
    if code == 75:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
