"""`make doctor`: does this machine run the suite, and what mends it where it does not?

Every question is asked in a child process, one after the other, which says after each what it
found: a package that raises, hangs or ends the process by a signal costs its own line, and the
questions after it are asked by another child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from trainer.base.json_text import json_of
from trainer.base.provenance import PACKAGE_ROOT
from trainer.tools import doctor_probes as probes
from trainer.tools import doctor_steps
from trainer.tools.doctor_finding import ABSENT, BROKEN, Asked, Finding, first_line

PATIENCE_S = 300.0  # for one question, on a slow disk or a busy machine
_MARK = "\x1e"  # before a line of ours: packages write on standard output too


@dataclass(frozen=True)
class Probe:
    """One question. is_needed: does the main job fail where it cannot be answered? remedy: what
    would mend that.
    """

    ask: Callable[[Asked], list[Finding]]
    is_needed: bool = True
    remedy: str = "make clean && make setup"


# ffcv comes last: its import changes torch's number of threads
PROBES = {
    "python": Probe(probes.python),
    "torch": Probe(probes.torch),
    "torchvision": Probe(probes.torchvision),
    "timm": Probe(probes.timm),
    "other packages": Probe(probes.packages),
    "CUDA": Probe(probes.cuda, is_needed=False, remedy="device=cpu"),
    "OpenCV": Probe(probes.opencv, is_needed=False),
    "TurboJPEG": Probe(probes.turbojpeg, is_needed=False),
    "cores": Probe(probes.cores, is_needed=False),
    "shared memory": Probe(probes.shared_memory, is_needed=False),
    "disk": Probe(probes.disk),
    "cache": Probe(probes.cache, is_needed=False),
    "locale": Probe(probes.locale),
    "JPEG": Probe(doctor_steps.jpeg),
    "step": Probe(doctor_steps.steps),
    "ffcv": Probe(probes.ffcv, is_needed=False),
}


def examine(asked: Asked, names: Sequence[str] = tuple(PROBES)) -> Iterator[Finding]:
    """What was found of each thing, in the order of the names."""
    left = list(names)
    while left:
        child = _Child(asked, left)
        yield from child.findings()
        if child.asked_last is None:  # not one question was asked
            yield Finding(
                "python",
                f"a child process does not start: {child.end}",
                "one",
                BROKEN,
                "make clean && make setup",
            )
            return
        if child.is_open:
            probe = PROBES[child.asked_last]
            state, remedy = (BROKEN, probe.remedy) if probe.is_needed else (ABSENT, probe.remedy)
            yield Finding(child.asked_last, child.end, "an answer", state, remedy)
        left = left[left.index(child.asked_last) + 1 :]


class _Child:
    """A process that asks some questions. asked_last: the one it came to; is_open: it ended before
    the answer; end: how.
    """

    def __init__(self, asked: Asked, names: Sequence[str]) -> None:
        self.asked_last: str | None = None
        self.is_open = False
        self.end = ""
        words = [
            sys.executable,
            "-c",
            "from trainer.tools.doctor import answer; answer()",
            json.dumps(asdict(asked)),
            *names,
        ]
        # for cuBLAS, before it begins; and our own package, wherever the user stands
        environment = {
            **os.environ,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTHONIOENCODING": "utf-8:backslashreplace",
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")))
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            words, env=environment, text=True, encoding="utf-8", errors="backslashreplace", **pipes
        )
        self._is_late = False
        self._said: list[str] = []

    def findings(self) -> Iterator[Finding]:
        """What the child finds, as it comes."""
        listener = threading.Thread(
            target=lambda: self._said.extend(self._process.stderr), daemon=True
        )
        listener.start()
        watch = self._watch()
        for line in self._process.stdout:
            if not line.startswith(_MARK):
                continue
            watch.cancel()
            watch = self._watch()
            what, value = json_of(line[1:])
            if what == "ask":
                self.asked_last, self.is_open = value, True
            elif what == "answered":
                self.is_open = False
            else:
                yield Finding(**value)
        watch.cancel()
        code = self._process.wait()
        listener.join(1.0)
        self.end = self._how_it_ended(code)

    def _watch(self) -> threading.Timer:
        watch = threading.Timer(PATIENCE_S, self._give_up)
        watch.daemon = True
        watch.start()
        return watch

    def _give_up(self) -> None:
        self._is_late = True
        self._process.kill()

    def _how_it_ended(self, code: int) -> str:
        if self._is_late:
            return f"no answer within {PATIENCE_S:g} s"
        said = [line.strip() for line in self._said if line.strip()]
        how = (
            f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        )
        return f"{how}: {said[-1][:200]}" if said else how


def answer() -> None:
    """What the child does: ask the questions named on its command line, and say what was found."""
    asked = Asked(**json.loads(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no answer

    def say(what: str, value) -> None:
        out.write(_MARK + json.dumps([what, value]) + "\n")
        out.flush()

    for name in sys.argv[2:]:
        say("ask", name)
        for finding in _answers(name, asked):
            say("found", asdict(finding))
        say("answered", name)


def _answers(name: str, asked: Asked) -> list[Finding]:
    probe = PROBES[name]
    try:
        return probe.ask(asked)
    except (Exception, SystemExit) as error:
        return [
            Finding(
                name,
                first_line(error),
                "an answer",
                BROKEN if probe.is_needed else ABSENT,
                probe.remedy,
            )
        ]


def is_fit(findings: Sequence[Finding]) -> bool:
    """Would the main job train here?"""
    return not any(one.state == BROKEN for one in findings)
