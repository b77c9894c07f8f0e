"""One line of `make doctor`."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, ABSENT, BROKEN = "good", "absent", "broken"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, what was wanted, and the one command that mends it.

    state: "good"; "absent", an optional thing that is missing or does less than it might; "broken",
    without it the main job, `make recipe=A1 model=resnet50`, fails.
    """

    what: str
    found: str
    wanted: str
    state: str = GOOD
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """What probes look at beside the machine: the folders of runs and of results."""

    runs: str = "runs"
    results: str = "results"


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def cells_of(one: Finding) -> tuple[str, ...]:
    """A finding in words; what is good needs no mending."""
    return one.what, one.found, one.wanted, one.state, "" if one.state == GOOD else one.remedy
