"""`make doctor`: does this machine run the suite, and what mends it where it does not?

Every question is asked in a child process of its own: a package that raises, hangs or ends the
process by a signal costs its own line. Nothing but Python itself is needed to ask.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from trainer.base.commands import command
from trainer.base.errors import printable
from trainer.base.provenance import PACKAGE_ROOT
from trainer.tools.doctor_probes import (
    ABSENT,
    BROKEN,
    GOOD,
    PROBES,
    Finding,
    Folders,
    pair_warning,
    unanswered,
)

PATIENCE_S = 300.0  # for one question, on a slow disk or a busy machine
_CHILD = "from trainer.tools.doctor_probes import answer; answer()"
_STYLES = {GOOD: None, ABSENT: "yellow", BROKEN: "bold red"}


def answer_words(words: Sequence[str]) -> None:
    """Answer `doctor` with these words behind it, and end the process; return where they are not
    all its own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("runs", "results"):
        parser.add_argument(f"--{name}", default=name)
    with contextlib.suppress(argparse.ArgumentError):
        given, others = parser.parse_known_args(words)
        if not others:
            sys.exit(diagnose(vars(given)))


def diagnose(folders: Folders) -> int:
    """Look, and print what was found; gives the exit code, 1 where the main job would fail."""
    print("looking at this machine: about a minute", file=sys.stderr, flush=True)
    findings = []
    for one in examine(folders, tuple(PROBES)):
        findings.append(one)
        print(f"{one.state:6}  {printable(one.what)}", file=sys.stderr, flush=True)
    wrong = ", ".join(one.what for one in findings if one.state == BROKEN)
    print_findings(findings, f"fails here: {wrong}" if wrong else "trains here")
    return 0 if is_fit(findings) else 1


def is_fit(findings: Sequence[Finding]) -> bool:
    """Would the main job train here?"""
    return not any(one.state == BROKEN for one in findings)


def examine(folders: Folders, names: Sequence[str] = tuple(PROBES)) -> Iterator[Finding]:
    """What was found of each thing, in the order of the names."""
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # determinism mode wants it before cuBLAS begins
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        # our own package, wherever the user stands
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")))
        ),
    }
    for name in names:
        words = [sys.executable, "-c", _CHILD, name, json.dumps(folders)]
        try:
            done = subprocess.run(
                words, env=environment, capture_output=True, timeout=PATIENCE_S,
                encoding="utf-8", errors="backslashreplace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield unanswered(name, f"no answer within {PATIENCE_S:g} s")
            continue
        if not done.stdout:
            found = f"a child process does not start: {_how_it_ended(done)}"
            yield Finding("python", found, "one", BROKEN, "make clean && make setup")
            return
        if done.stdout.isspace():
            yield unanswered(name, _how_it_ended(done))
        else:
            yield from (Finding(**one) for one in json.loads(done.stdout))


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    code, said = done.returncode, done.stderr.strip().splitlines()
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"ended {how}: {said[-1].strip()[:200]}" if said else f"ended {how}"


def print_findings(findings: Sequence[Finding], verdict: str) -> None:
    """The findings as a table, or as lines where Rich itself is broken; the warning; the verdict.

    What is good needs no mending.
    """
    rows = [
        (one.what, one.found, one.wanted, one.state, "" if one.state == GOOD else one.remedy)
        for one in findings
    ]
    warning = None
    with contextlib.suppress(Exception):  # of broken packages: the table tells of them
        warning = pair_warning()
    lines = [f"warning: {warning}"] if warning else []
    lines.append(f"{command(recipe='A1', model='resnet50')} {verdict}")
    try:
        from trainer.tools.doctor_table import print_table  # here: Rich may be what is broken
    except ImportError:
        print(*(printable(line) for line in [*map(" | ".join, rows), *lines]), sep="\n")
        return
    styles = ["yellow"] * bool(warning) + ["bold green" if is_fit(findings) else "bold red"]
    print_table(rows, [_STYLES[one.state] for one in findings], zip(lines, styles, strict=True))
