"""What `make doctor` prints: a table, or lines where Rich itself is broken."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from trainer.base.errors import printable
from trainer.tools.doctor import PROBES, examine, is_fit
from trainer.tools.doctor_finding import BROKEN, Asked, cells_of
from trainer.tools.doctor_probes import pair_warning


def answer_words(words: Sequence[str]) -> None:
    """Answer `doctor` with these words behind it, and end the process; return where they are not
    all its own.
    """
    given = dict(word.removeprefix("--").partition("=")[::2] for word in _joined(words))
    if set(given) <= {"runs", "results"}:
        sys.exit(answer(Asked(**given)))


def _joined(words: Sequence[str]) -> list[str]:
    """`--runs x` as `--runs=x`; words that are something else stay as they are, and are
    nobody's.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--runs", "--results"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def answer(asked: Asked) -> int:
    """Look, and print what was found; gives the exit code, 1 where the main job would fail."""
    print("looking at this machine: about a minute", file=sys.stderr, flush=True)
    findings = []
    for one in examine(asked, tuple(PROBES)):
        findings.append(one)
        print(f"{one.state:6}  {printable(one.what)}", file=sys.stderr, flush=True)
    warning = None
    with contextlib.suppress(
        Exception
    ):  # of packages too broken to be asked: the table tells of them
        warning = pair_warning()
    wrong = [one.what for one in findings if one.state == BROKEN]
    verdict = (
        f"make recipe=A1 model=resnet50 fails here: {', '.join(wrong)}"
        if wrong
        else "make recipe=A1 model=resnet50 trains here"
    )
    try:
        from trainer.tools.doctor_table import print_findings  # here: Rich may be what is broken

        print_findings(findings, warning, verdict, "bold red" if wrong else "bold green")
    except ImportError:
        for line in (
            [" | ".join(cells_of(one)) for one in findings]
            + ([f"warning: {warning}"] if warning else [])
            + [verdict]
        ):
            print(printable(line))
    return 0 if is_fit(findings) else 1
