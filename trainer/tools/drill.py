"""Fault-injection tests: every fault of inject= on a small run of digits, against its promise."""

from __future__ import annotations

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

import torch
from safetensors.torch import load_file

from trainer.ablation.backends.local import PRELOADED
from trainer.base.errors import UserError, did_you_mean

TIMEOUT_S = 240  # of one process
_FORKED = multiprocessing.get_context("forkserver")
# relative distance of weights that differ by the order of floating-point sums alone
CLOSE = 1e-5
# of a row: they differ between two equal runs
_FIELDS_OF_THE_PROCESS = (
    "images_per_s", "train_s", "step_s", "step_spread_share", "load_per_core", "peak_mem_mib",
    "finished_utc", "injected", "commit", "dirty",
)  # fmt: skip
_SET = (
    "epochs=1 batch.images=128 batch.norm_images=16 "
    "lr.warmup_epochs=null lr.warmup_from=null lr.peak=5e-4 "
    "average='{name: ema, decay: 0.9, every_steps: 2}' drop_path=null"
)
_SMOOTH = " 'model={stem: {name: patchify, patch_px: 4}, activation: {name: silu}%s}'"
_GROUPS = ", norm: {name: group_norm, groups: 4, eps: 1e-5}"
_SETS = {"batch_norm": _SET + _SMOOTH % "", "group_norm": _SET + _SMOOTH % _GROUPS}
_TRAIN = (
    "train", "--recipe", "A1", "--model", "test_resnet", "--device", "cpu", "--workers", "0",
    "--checkpoint-s", "0",
)  # fmt: skip


@dataclass(frozen=True)
class Drill:
    """One fault and what is promised under it.

    codes: the exit code of each call of the same command; the last one finishes the run. ends: the
    expected result against the undisturbed run's: "same" row, curves and weights; "close" weights;
    "other" weights. words: further options. is_stored: is the row in the store? deviations: the
    paths in the row beyond those of the undisturbed run.
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
        """The fault as inject= has it, and the further options."""
        pairs = zip(self.words[::2], self.words[1::2], strict=True)
        return " ".join([f"inject={self.fault}", *(f"{name[2:]}={value}" for name, value in pairs)])


_Row = dict[str, Any]
_AUTO, _TWO_RANKS = ("--micro-batch", "auto"), ("--procs", "2")
DRILLS = (
    Drill("kill@7", "killed in a step: resumed by the same command to the same row", (-9, 0)),
    Drill(
        "kill@1,kill@10,kill@11",
        "killed three times, in the first and the last steps: the same row",
        (-9, -9, -9, 0),
    ),
    Drill("term@6", "SIGTERM: saved, exit 75; resumed to the same row", (75, 0)),
    Drill(
        "nan@8", "NaN loss: exit 3, nothing stored; resumed from before it, the same row", (3, 0)
    ),
    Drill("oom@5", "out of memory: one line, exit 2; resumed to the same row", (2, 0)),
    Drill(
        "oom@5",
        "retried in smaller micro-batches: equal weights up to rounding, recorded in the row",
        (0,),
        "close",
        _AUTO,
        "group_norm",
        is_stored=False,
    ),
    Drill(
        "oom@5",
        "BatchNorm sees fewer images from then on: a deviation in the row",
        (0,),
        "other",
        _AUTO,
        is_stored=False,
        deviations=("batch.norm_images",),
    ),
    Drill("enospc@9", "disk full for one write: training continues to the same row", (0,)),
    Drill("slow@3:2s", "slow dataloader: the same row", (0,)),
    Drill("bad_image@300", "unreadable image: one line, exit 2; repaired, the same row", (2, 0)),
    Drill(
        "bad_image@300",
        "unreadable image replaced by another, counted in the row",
        (0,),
        "other",
        ("--bad-images", "skip"),
        is_stored=False,
    ),
    Drill("raise@7", "internal error: exit 1; resumed to the same row", (1, 0)),
    Drill(
        "raise@7",
        "one of two ranks raises: named, exit 1; resumed, weights close to one rank's",
        (1, 0),
        "close",
        _TWO_RANKS,
    ),
    Drill(
        "kill@7",
        "one of two ranks killed: named, exit 1; resumed, weights close to one rank's",
        (1, 0),
        "close",
        _TWO_RANKS,
    ),
    Drill(
        "oom@5",
        "one of two ranks out of memory: both split, weights close to one rank's",
        (0,),
        "close",
        (*_TWO_RANKS, *_AUTO),
        "group_norm",
        is_stored=False,
    ),
)


@dataclass(frozen=True)
class DrillResult:
    """The outcome of one fault-injection test. observed: in words. failures: each broken promise,
    in words; empty where all held.
    """

    drill: Drill
    observed: str
    failures: tuple[str, ...] = ()
    output: str = field(default="", repr=False)


@dataclass(frozen=True)
class _Outcome:
    """What the calls of one command left behind."""

    codes: tuple[int, ...]
    output: str
    row: _Row | None
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
                f"only={word}: unknown fault{did_you_mean(word, kinds)}; valid: {', '.join(kinds)}"
            )
    return tuple(drill for drill in DRILLS if not words or drill.fault.partition("@")[0] in words)


def run_drills(
    drills: tuple[Drill, ...], num_jobs: int, each: Callable[[], None] = lambda: None
) -> list[DrillResult]:
    """Run the tests, num_jobs at a time, each in processes and folders of its own. each: called
    when one is done.
    """

    def tested(drill: Drill) -> DrillResult:
        folder = Path(root) / f"drill-{drills.index(drill)}"
        result = _tested(drill, references[drill.norm].result(), folder)
        each()
        return result

    with (
        tempfile.TemporaryDirectory(prefix="rsb-drill-") as root,
        ThreadPoolExecutor(num_jobs) as pool,
    ):
        references = {
            norm: pool.submit(_run, Drill("", "undisturbed", (0,), norm=norm), Path(root) / norm)
            for norm in dict.fromkeys(drill.norm for drill in drills)
        }
        try:
            return list(pool.map(tested, drills))
        except BaseException:  # no further test starts after an error or Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(drill: Drill, folder: Path) -> _Outcome:
    """The command, called as often as the drill says, or until an exit code is unexpected."""
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
    """Run the program with these arguments in a process of its own, its output appended to a file;
    gives its exit code.

    The process is forked from one that has imported everything: a fresh interpreter takes longer
    for its imports than the whole test does. Raises TimeoutError.
    """
    _FORKED.set_forkserver_preload(list(PRELOADED))
    process = _FORKED.Process(target=_program, args=(words, output))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError
    assert process.exitcode is not None  # it has ended
    return process.exitcode


def _program(words: list[str], output: Path) -> None:
    with open(output, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    sys.argv = ["rsb", *words]
    runpy.run_module("trainer", run_name="__main__")


def _end(folder: Path, codes: tuple[int, ...], output: str) -> _Outcome:
    run = next((path.parent for path in (folder / "runs").glob("*/plan.json")), folder)
    row, metrics = run / "row.json", run / "metrics.jsonl"
    return _Outcome(
        codes=codes,
        output=output,
        row=json.loads(row.read_text()) if row.exists() else None,
        is_stored=any((folder / "results" / "rows").glob("*.json")),
        metrics=metrics.read_bytes() if metrics.exists() else b"",
        weights=run / "model.safetensors",
    )


def _tested(drill: Drill, reference: _Outcome, folder: Path) -> DrillResult:
    try:
        end = _run(drill, folder)
    except TimeoutError:
        return DrillResult(drill, f"no exit within {TIMEOUT_S} s", ("it hangs",))
    codes = f"exit {', '.join(map(str, end.codes))}"
    if reference.row is None:
        return DrillResult(drill, codes, ("the undisturbed run failed",), reference.output)
    if end.row is None or end.codes != drill.codes:
        expected = f"exit {', '.join(map(str, drill.codes))} expected"
        return DrillResult(drill, codes, (expected,), end.output)
    failures = tuple(_failures(drill, reference, reference.row, end, end.row))
    weights, observed = end.row["weights_sha256"], "identical"
    if weights != reference.row["weights_sha256"]:
        observed = f"{distance(reference.weights, end.weights):.1e} relative distance"
    observed = f"{codes}; weights {weights[:8]}, {observed}"
    if end.is_stored != reference.is_stored:
        observed += "; row not stored"
    return DrillResult(drill, observed, failures, end.output if failures else "")


def _failures(
    drill: Drill, reference: _Outcome, expected: _Row, end: _Outcome, row: _Row
) -> Iterator[str]:
    """Each promise that does not hold. expected, row: those of the two outcomes."""
    is_same = row["weights_sha256"] == expected["weights_sha256"]
    if drill.ends == "same":
        differ = [
            name
            for name, value in expected.items()
            if name not in _FIELDS_OF_THE_PROCESS and row[name] != value
        ]
        if differ:
            yield f"the row differs in {', '.join(differ)}"
        if end.metrics != reference.metrics:
            yield "metrics.jsonl differs"
    if drill.ends == "other" and is_same:
        yield "the weights equal the undisturbed run's: the fault had no effect"
    if drill.ends == "close" and not distance(reference.weights, end.weights) < CLOSE:
        yield f"the weights differ by more than {CLOSE:g}"
    if end.is_stored != drill.is_stored:
        yield "the row was stored" if end.is_stored else "the row was not stored"
    paths = [one["path"] for one in row["deviations"] if one not in expected["deviations"]]
    if tuple(paths) != drill.deviations:
        yield f"deviations: {', '.join(paths) or 'none'}"


def distance(one: Path, other: Path) -> float:
    """Of two files of weights: the largest distance between two tensors, relative to the first's
    norm.
    """
    expected, found = load_file(one), load_file(other)
    pairs = [(tensor.double(), found[name].double()) for name, tensor in expected.items()]
    return max(((b - a).norm() / a.norm().clamp_min(1e-12)).item() for a, b in pairs)
