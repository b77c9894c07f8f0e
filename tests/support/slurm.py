"""A real Slurm of one node for tests: its own munge, ports and folders, bound to 127.0.0.1.

Where Slurm is not installed or this is not root (its daemon starts jobs as their users), a test is
skipped; with RSB_CI=1, as in .ci/run, it fails instead. Settings:
https://slurm.schedmd.com/slurm.conf.html
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
_READY_S, _JOB_S = 60, 180
_CONFIG = """
ClusterName=rsb
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a job that is queued again begins after this many seconds; 120 without it
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerParameters=sched_interval=1
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def refuse_without() -> None:
    """Skip the test, or fail it with RSB_CI=1, where no Slurm can be started."""
    lacking = [name for name in _PROGRAMS if _program(name) is None]
    sentence = None
    if lacking:
        sentence = (
            f"{lacking[0]} is not installed: job files are tested on a real Slurm; "
            "run apt-get install -y --no-install-recommends slurm-wlm munge"
        )
    elif os.geteuid():
        sentence = "Slurm's daemons want root: as root, job files are tested on a real Slurm"
    if sentence:
        pytest.fail(sentence, pytrace=False) if os.environ.get("RSB_CI") == "1" else pytest.skip(
            sentence
        )


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))


class Slurm:
    """One running Slurm; a context. environment: of the commands that talk to it."""

    def __init__(self) -> None:
        refuse_without()
        self.folder = Path(tempfile.mkdtemp(prefix="rsb-slurm-"))
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM")
        }
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        self._configure()
        try:
            self._start("munged", "--foreground", "--force", *self._munge_files())
            _wait(lambda: (self.folder / "munge.socket").exists(), "munge's socket", self)
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-c")
            _wait(
                lambda: self.ask("sinfo", "-h", "-o", "%T", check=False).strip() == "idle",
                "an idle node",
                self,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if len(self._daemons) > 1:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.ask(
                    "scancel",
                    "--full",
                    "--signal=KILL",
                    "--state=RUNNING",
                    "--user=root",
                    check=False,
                )
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, name: str, *words: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            [_program(name), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_JOB_S,
        )
        assert not check or done.returncode == 0, (name, words, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> tuple[str, int]:
        """A job's state in Slurm's words, and how often it has been put into the queue again."""
        found = dict(
            word.split("=", 1)
            for word in self.ask("scontrol", "--oneliner", "show", "job", job).split()
            if "=" in word
        )
        return found["JobState"], int(found["Restarts"])

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.folder.chmod(
            0o755
            # munge wants every folder above its socket to be closed to others' writing, and open to
            # their reading
        )
        host = socket.gethostname().partition(".")[0]
        text = _CONFIG.format(
            host=host, folder=self.folder, ports=_free_ports(2), num_cores=os.cpu_count()
        )
        (self.folder / "slurm.conf").write_text(text)

    def _munge_files(self) -> list[str]:
        names = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        return [f"--{option}={self.folder / name}" for option, name in names.items()]

    def _start(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}.out.log", "wb") as file:
            self._daemons.append(
                subprocess.Popen(
                    [_program(name), *words],
                    env=self.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )


def _free_ports(number: int) -> list[int]:
    opened = [socket.socket() for _ in range(number)]
    for one in opened:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


def _wait(is_there, what: str, slurm: Slurm) -> None:
    until = time.monotonic() + _READY_S
    while not is_there():
        assert time.monotonic() < until, f"no {what} after {_READY_S} s\n{slurm.logs()}"
        time.sleep(0.05)


def wait_for(slurm: Slurm, is_there, what: str, log: Path) -> None:
    """Ask until a thing is there. Fails with the job's log after some minutes."""
    until = time.monotonic() + _JOB_S
    while not is_there():
        said = log.read_text()[-3000:] if log.exists() else "nothing"
        assert time.monotonic() < until, (
            f"no {what} after {_JOB_S} s; the job said:\n{said}\n{slurm.logs()}"
        )
        time.sleep(0.1)
