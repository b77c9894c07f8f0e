"""Every fault of inject= on a small run of the digits: what was promised, and what was seen."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.ablation.backends.local import PRELOADED
from trainer.base.errors import UserError, did_you_mean

LONGEST_S = 240  # of one process
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(list(PRELOADED))
# the distance of weights that only the order of sums tells apart, in lengths of the weights
CLOSE = 1e-5
_FACTS_OF_TIME = (
    "images_per_s",
    "train_s",
    "peak_mem_mib",
    "finished_utc",
    "injected",
    "commit",
    "dirty",
)
_SET = (
    "epochs=1 batch.images=128 batch.norm_images=16 lr.warmup_epochs=null lr.warmup_from=null lr.peak=5e-4 "
    "average='{name: ema, decay: 0.9, every_steps: 2}' drop_path=null"
)
_SMOOTH = " 'model={stem: {name: patchify, patch_px: 4}, activation: {name: silu}%s}'"
_GROUPS = ", norm: {name: group_norm, groups: 4, eps: 1e-5}"
_SETS = {"batch_norm": _SET + _SMOOTH % "", "group_norm": _SET + _SMOOTH % _GROUPS}
_TRAIN = (
    "train",
    "--recipe",
    "A1",
    "--model",
    "test_resnet",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--checkpoint-s",
    "0",
)


@dataclass(frozen=True)
class Drill:
    """One fault and its promise.

    codes: the exit code of each call of the same command; the last one ends the run. ends: what the
    end must be against the undisturbed run: "same" row, curves and weights; "close" weights;
    "other" weights, in a row of its own. is_stored: does the store have the row? deviations: the
    paths that the row names beyond the undisturbed one's.
    """

    fault: str
    promise: str
    codes: tuple[int, ...]
    ends: str = "same"
    words: tuple[str, ...] = ()
    norm: str = "batch_norm"
    is_stored: bool = True
    deviations: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The fault as inject= has it, and what else was asked for."""
        return " ".join(
            [
                f"inject={self.fault}",
                *(f"{name[2:]}={value}" for name, value in zip(self.words[::2], self.words[1::2])),
            ]
        )


_AUTO, _TWO = ("--micro-batch", "auto"), ("--procs", "2")
DRILLS = (
    Drill("kill@7", "killed in a step: the same command ends in the same row", (-9, 0)),
    Drill("kill@1,kill@10,kill@11", "killed three times, in the first step and in the last: the same row", (-9, -9, -9, 0)),
    Drill("term@6", "SIGTERM: saved, exit 75; the same command ends in the same row", (75, 0)),
    Drill("nan@8", "a loss that is no number: exit 3, nothing in the store; the same command goes on before it", (3, 0)),
    Drill("oom@5", "out of memory: one line, exit 2; the same command ends in the same row", (2, 0)),
    Drill("oom@5", "the same step in smaller pieces: the same weights but for rounding; the row says so", (0,), "close", _AUTO, "group_norm", is_stored=False),
    Drill("oom@5", "norms sample less from then on: a deviation in the row", (0,), "other", _AUTO, is_stored=False, deviations=("batch.norm_images",)),
    Drill("enospc@9", "a full disk for one write: training goes on to the same row", (0,)),
    Drill("slow@3:2s", "a slow loader: the same row", (0,)),
    Drill("bad_image@300", "a damaged image: one line, exit 2; mended, the same row", (2, 0)),
    Drill("bad_image@300", "another image in its place, counted in the row", (0,), "other", ("--bad-images", "skip"), is_stored=False),
    Drill("raise@7", "a fault of the program's own: exit 1; the same command ends in the same row", (1, 0)),
    Drill("raise@7", "one of two ranks raises: named, exit 1; the same command ends close to one rank", (1, 0), "close", _TWO),
    Drill("kill@7", "one of two ranks killed: named, exit 1; the same command ends close to one rank", (1, 0), "close", _TWO),
    Drill("oom@5", "one of two ranks out of memory: both go on in smaller pieces, close to one rank", (0,), "close", (*_TWO, *_AUTO), "group_norm", is_stored=False),
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """How a drill went. facts: what was seen, in words. wrong: what was promised otherwise, in
    words; empty where all held.
    """

    drill: Drill
    facts: str
    wrong: tuple[str, ...] = ()
    output: str = field(default="", repr=False)


@dataclass(frozen=True)
class _End:
    """What the calls of one command left."""

    codes: tuple[int, ...]
    output: str
    row: dict[str, Any] | None
    is_stored: bool
    metrics: bytes
    weights: Path


def chosen_drills(only: str) -> tuple[Drill, ...]:
    """The drills whose faults are of these kinds, names with commas between; all for an empty text.
    Raises UserError.
    """
    kinds = sorted({drill.fault.partition("@")[0] for drill in DRILLS})
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if word not in kinds:
            raise UserError(
                f"only={word}: no such fault{did_you_mean(word, kinds)}; valid: {', '.join(kinds)}"
            )
    return tuple(drill for drill in DRILLS if not words or drill.fault.partition("@")[0] in words)


def run_drills(
    drills: tuple[Drill, ...], num_jobs: int, each: Callable[[], None] = lambda: None
) -> list[Seen]:
    """Run the drills, num_jobs at a time, each in processes and folders of its own. each: called
    when one is over.
    """

    def seen(drill: Drill) -> Seen:
        found = _seen(
            drill, references[drill.norm].result(), Path(root) / f"drill-{drills.index(drill)}"
        )
        each()
        return found

    with (
        tempfile.TemporaryDirectory(prefix="rsb-drill-") as root,
        ThreadPoolExecutor(num_jobs) as pool,
    ):
        references = {
            norm: pool.submit(_run, Drill("", "undisturbed", (0,), norm=norm), Path(root) / norm)
            for norm in dict.fromkeys(drill.norm for drill in drills)
        }
        with _stopped_first(pool):
            return list(pool.map(seen, drills))


@contextlib.contextmanager
def _stopped_first(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Of a drill that is broken off, begin nothing more."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _run(drill: Drill, folder: Path) -> _End:
    """The command, called as often as the drill says, or until a call ends otherwise."""
    places = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    injected = ("--inject", drill.fault) if drill.fault else ()
    words = [*_TRAIN, "--set", _SETS[drill.norm], *drill.words, *injected, *places]
    folder.mkdir()
    codes: list[int] = []
    for expected in drill.codes:
        codes.append(call(words, folder / "output.txt"))
        if codes[-1] != expected:
            break
    return _end(folder, tuple(codes), (folder / "output.txt").read_text(errors="replace"))


def call(words: list[str], output: Path) -> int:
    """Call the program with these words in a process of its own, which adds what it says to a file;
    gives its exit code.

    The process is forked from one that has imported everything: a program that starts anew takes
    longer for that than a drill does. Raises TimeoutError.
    """
    process = _FORKED.Process(target=_program, args=(words, output))
    process.start()
    process.join(LONGEST_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError
    return process.exitcode


def _program(words: list[str], output: Path) -> None:
    with open(output, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["rsb", *words]
    runpy.run_module("trainer", run_name="__main__")


def _end(folder: Path, codes: tuple[int, ...], output: str) -> _End:
    run = next(
        (path for path in (folder / "runs").glob("*") if (path / "plan.json").exists()), folder
    )
    row, metrics = run / "row.json", run / "metrics.jsonl"
    return _End(
        codes=codes,
        output=output,
        row=json.loads(row.read_text()) if row.exists() else None,
        is_stored=any((folder / "results" / "rows").glob("*.json")),
        metrics=metrics.read_bytes() if metrics.exists() else b"",
        weights=run / "model.safetensors",
    )


def _seen(drill: Drill, reference: _End, folder: Path) -> Seen:
    try:
        end = _run(drill, folder)
    except TimeoutError:
        return Seen(drill, f"no end within {LONGEST_S} s", ("it hangs",))
    codes = f"exit {', '.join(map(str, end.codes))}"
    if reference.row is None or end.row is None or end.codes != drill.codes:
        wrong = (
            "the undisturbed run failed"
            if reference.row is None
            else f"exit {', '.join(map(str, drill.codes))} was promised"
        )
        return Seen(drill, codes, (wrong,), (reference if reference.row is None else end).output)
    wrong = tuple(_wrong(drill, reference, end))
    facts = (
        f"{codes}; weights {end.row['weights_sha256'][:8]}, {_distance_in_words(reference, end)}"
    )
    if end.is_stored != reference.is_stored:
        facts += "; the row not in the store"
    return Seen(drill, facts, wrong, end.output if wrong else "")


def _wrong(drill: Drill, reference: _End, end: _End) -> Iterator[str]:
    """What is otherwise than promised."""
    is_same = end.row["weights_sha256"] == reference.row["weights_sha256"]
    if drill.ends == "same":
        differ = [
            name
            for name, value in reference.row.items()
            if name not in _FACTS_OF_TIME and end.row[name] != value
        ]
        if differ:
            yield f"the row differs in {', '.join(differ)}"
        if end.metrics != reference.metrics:
            yield "metrics.jsonl differs"
    if drill.ends == "other" and is_same:
        yield "the weights are those of the undisturbed run: the fault did not strike"
    if drill.ends == "close" and not distance(reference.weights, end.weights) < CLOSE:
        yield f"the weights are further off than {CLOSE:g}"
    if end.is_stored != drill.is_stored:
        yield "the store has the row" if end.is_stored else "the store has no row"
    paths = [
        deviation["path"]
        for deviation in end.row["deviations"]
        if deviation not in reference.row["deviations"]
    ]
    if tuple(paths) != drill.deviations:
        yield f"deviations: {', '.join(paths) or 'none'}"


def _distance_in_words(reference: _End, end: _End) -> str:
    if end.row["weights_sha256"] == reference.row["weights_sha256"]:
        return "the same"
    return f"{distance(reference.weights, end.weights):.1e} off"


def distance(one: Path, other: Path) -> float:
    """Of two files of weights: the largest distance of a tensor from its other, in lengths of the
    other.
    """
    from safetensors.torch import load_file

    expected, found = load_file(one), load_file(other)
    return max(
        (
            (found[name].double() - tensor.double()).norm()
            / tensor.double().norm().clamp_min(1e-12)
        ).item()
        for name, tensor in expected.items()
    )
