"""What the command latency does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from trainer.base.cores import load_per_core, num_cores
from trainer.base.disk import why
from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.base.plural import counted, duration
from trainer.base.provenance import device_name, package_version, running_program, versions
from trainer.base.settings import make_settings
from trainer.cli.export_commands import default_folder
from trainer.cli.inference_commands import Asked
from trainer.data.transforms import scored_inputs
from trainer.inference.classifier import Classifier
from trainer.inference.export.compare import as_exported, drawn_batches
from trainer.inference.export.formats import Format, Onnx, OpenVino, write_model
from trainer.inference.export.latency import Opened, Timing, compiled, eager, measure, of_file
from trainer.inference.export.latency_page import table_head, table_line, write_latencies
from trainer.inference.export.write import FACTS, example_of
from trainer.runs import summary

__all__ = ["Asked", "latency"]

_BUSY_LOAD = 0.3  # per core, of other work


def latency(
    asked: Asked,
    out: Path | None,
    batches: str,
    threads: str,
    seconds: float,
    num_rounds: int,
    is_compiled: bool,
    again: bool,
    check: Callable[[], None],
) -> None:
    """Time a model by everything that runs it here, print each line of the table once it is
    measured, and write the table. Raises UserError.
    """
    sizes, counts = _numbers("batches", batches), _numbers("threads", threads or f"1 {num_cores()}")
    classifier, run_folder = asked.at_one_size()
    own = default_folder(classifier, run_folder)
    out = out or own / "latency"
    page = out.with_name(f"{out.name}.md")
    if page.exists() and not again:
        raise UserError(f"{page}: is there already", "use again=1, or out=<another name>")
    console, load = summary.console(), load_per_core()
    if load is not None and load > _BUSY_LOAD:
        line = f"this machine is busy: {load:.2f} of each core; the times are of a busy machine"
        console.print(line, style="yellow", markup=False)
    with tempfile.TemporaryDirectory() as folder:
        engines = _engines(classifier, Path(folder), own, is_compiled, console)
        pixels = next(drawn_batches(classifier.image))
        settings = make_settings("cpu", "float32")
        inputs = scored_inputs(pixels, classifier.image, settings).contiguous().numpy()
        cases = len(engines) * len(sizes) * len(counts)
        total = cases * num_rounds
        least = (
            f"{counted(cases, 'case')} of {seconds:g} s each: at least {duration(cases * seconds)}"
        )
        console.print(least, markup=False)
        with summary.progress(console, "turns", total) as each:
            for line in table_head():
                each.say(line)
            timings = measure(
                engines,
                {size: np.resize(inputs, (size, *inputs.shape[1:])) for size in sizes},
                counts,
                seconds,
                num_rounds,
                check,
                each,
                lambda timing: each.say(table_line(timing)),
            )
    facts = _facts(classifier, seconds, num_rounds, load)
    _write(out, timings, f"{classifier.name}: latency", facts)
    console.print(f"page  {page}", markup=False)


def _numbers(name: str, text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 0 < int(word) < 10_000 for word in words):
        raise UserError(f"{name}={text}: not numbers of 1 and more", f'use {name}="1 32"')
    return sorted(set(map(int, words)))


def _engines(
    classifier: Classifier, folder: Path, own: Path, is_compiled: bool, console
) -> dict[str, Opened]:
    """All that runs the model here, by name. folder: for its files. own: where export leaves int8
    ones.
    """
    model = as_exported(classifier)
    engines = {"torch": eager(model)}
    if is_compiled and shutil.which("g++"):
        engines["torch, compiled"] = compiled(model)
    forms: tuple[Format, ...] = (Onnx(), OpenVino())
    for form in forms:
        try:
            form.check_installed()
        except UserError as error:
            console.print(f"without {form.runs_by}: {error}", style="yellow", markup=False)
            continue
        path = folder / form.name / form.file
        path.parent.mkdir()
        write_model(form, model, example_of(classifier), path)
        engines[form.runs_by] = of_file(form, path)
        int8 = own / f"{form.name}-int8"
        if _is_of(int8, classifier):
            engines[f"{form.runs_by}, int8"] = of_file(form, int8 / form.file)
        else:
            line = f"without int8: {int8} has none of these weights (export to={form.name} int8=1)"
            console.print(line, style="yellow", markup=False)
    return engines


def _is_of(folder: Path, classifier: Classifier) -> bool:
    """Is an exported model of these weights there, for images of this size?"""
    try:
        facts = json_file(folder / FACTS)
    except (OSError, ValueError):
        return False
    return (
        isinstance(facts, dict)
        and facts.get("weights_sha256") == classifier.weights_sha256
        and facts.get("size_px") == classifier.image.test_px
    )


def _facts(
    classifier: Classifier, seconds: float, num_rounds: int, load: float | None
) -> Sequence[str]:
    """What was measured, on what machine, by what program."""
    px, program = classifier.image.test_px, running_program()
    packages = ("torch", "timm", "onnxruntime", "openvino")
    known = versions() | {name: package_version(name) for name in packages}
    named = ", ".join(f"{name} {known[name]}" for name in ("python", *packages))
    busy = "" if load is None else f", {load:.2f} of each core busy before"
    return [
        f"{classifier.name} at {px} px, float32 but where it says int8; weights"
        f" {classifier.weights_sha256[:12]}.",
        f"{device_name('cpu')} ({torch.backends.cpu.get_cpu_capability()}), {num_cores()} cores"
        f"{busy}; {named}; program {program}.",
        f"Engines take turns: {num_rounds} rounds of {seconds / num_rounds:g} s each, without"
        " warm-up and without decoding images.",
    ]


def _write(out: Path, timings: list[Timing], title: str, facts: Sequence[str]) -> None:
    try:
        write_latencies(out, timings, title, facts)
    except OSError as error:
        raise UserError(
            f"{out}.md: cannot be written ({why(error)})", "use out=<another name>"
        ) from None
