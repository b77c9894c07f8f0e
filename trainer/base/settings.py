"""Where and on what a run runs: nothing here may move its score by more than noise."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

from trainer.base.cores import num_cores
from trainer.base.devices import kind_of, resolve_device, use_device
from trainer.base.errors import UserError, did_you_mean

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
# of torch.compile; its others put CUDA graphs around parts of a pass, in which gradients of several
# micro-batches do not add up
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
_CHANNELS_LAST_PX = 128
LOADERS = ("auto", "torch", "pil", "ffcv")
MICRO_BATCHES = ("recipe", "auto")
STOP_REASONS = ("off_track",)
DEBUG_KINDS = ("nan",)
KEPT_WEIGHTS = ("best",)
# how ranks are bound to the cores near their GPUs, in torchrun's words
NUMA_BINDINGS = ("off", "node", "socket", "exclusive", "core-complex")
# what track= takes: the first is always on, each other is a package, and an extra of ours
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_SIDES_PX = range(8, 2049)  # of images, as recipes have them


@dataclass(frozen=True)
class Settings:
    """Resolved settings: no `auto` is left.

    device: "cpu", "cuda[:n]", "xpu[:n]" or "mps". precision: of the forward pass; weights are
    always float32. tf32: float32 whose convolutions and matrix products round their factors to 10
    bits, on a GPU. num_workers: loader processes, or ffcv's threads. num_threads: torch's threads
    on the CPU. checkpoint_s: least time between two checkpoints. log_steps: optimizer steps between
    two lines of metrics. micro_batch: "recipe" as the recipe says, or "auto" to split it where
    memory runs out. activation_checkpointing: are activations recomputed in the backward pass?
    compile: are the model's passes compiled? compile_mode: by which of torch.compile's modes.
    cuda_graphs: are the passes over a micro-batch captured, and launched as one? half_group_norm:
    under bf16 and fp16 group norms read and write these, with statistics in float32, where autocast
    on a GPU would convert to float32 and back. profile: is a trace of a few steps written?
    keep_every_epochs: whose checkpoints stay, 0 for none but the last two. loader: "torch", "pil"
    for the same with every JPEG file decoded whole by PIL, or "ffcv". stop_if: "off_track" to end a
    run that is off the track of earlier ones. expect: which those are, "" for those of the same
    recipe. debug: "nan" to have the source of numbers that are not finite named. keep: "best" to
    keep the weights of the best epoch beside the last. trackers: where curves go beside
    TensorBoard. test_px: image sizes at which the finished model is scored too; the result is at
    the recipe's own. eval_every_epochs: from one evaluation to the next; the last epoch always has
    one. eval_images: at once in an evaluation. numa: how the ranks are bound to cores.
    """

    device: str
    precision: str
    channels_last: bool
    num_workers: int
    num_threads: int
    runs: Path
    results: Path
    checkpoint_s: float
    log_steps: int = 10
    micro_batch: str = "recipe"
    activation_checkpointing: bool = False
    compile: bool = False
    compile_mode: str = "default"
    cuda_graphs: bool = False
    half_group_norm: bool = False
    profile: bool = False
    keep_every_epochs: int = 0
    loader: str = "torch"
    stop_if: str = ""
    expect: str = ""
    debug: str = ""
    keep: str = ""
    trackers: tuple[str, ...] = ()
    test_px: tuple[int, ...] = ()
    eval_every_epochs: int = 1
    eval_images: int = 128  # not the recipe's batch, so that a score does not depend on that
    numa: str = "off"

    def is_channels_last(self, px: int) -> bool:
        """Do the values of a place lie together in memory, for images of px? On a CPU only for
        large ones, where it takes a sixth to a third off a step; of small ones oneDNN's own blocks
        are faster.
        """
        return self.channels_last or (self.device == "cpu" and px >= _CHANNELS_LAST_PX)

    @property
    def is_bitwise(self) -> bool:
        """May a rerun here be compared bit for bit?"""
        return self.device == "cpu"


class SettingsOptions(TypedDict, total=False):
    """What make_settings takes beside where a run runs, as a user writes it; what is left out
    stands as in Settings.
    """

    micro_batch: str
    activation_checkpointing: bool
    compile: bool
    compile_mode: str
    cuda_graphs: bool
    half_group_norm: bool
    profile: bool
    keep_every: int
    loader: str
    stop_if: str
    expect: str
    debug: str
    keep: str
    track: str
    test_px: str
    eval_every: int
    eval_batch: int
    log_every: int
    numa: str


# a choice -> its field of Settings, where that has another name
_FIELDS = {
    "keep_every": "keep_every_epochs",
    "eval_every": "eval_every_epochs",
    "eval_batch": "eval_images",
    "log_every": "log_steps",
    "track": "trackers",
}


def settings_from_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that make_settings takes, but for the device.

    Raises UserError for what could be no setting on any machine.
    """
    choices = {name: given[name] for name in SettingsOptions.__annotations__ if name in given}
    _resolved(choices)
    names = "precision", "workers", "runs", "results", "checkpoint_s"
    return {name: given[name] for name in names if name in given} | choices


def make_settings(
    device: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    runs: Path = Path("runs"),
    results: Path = Path("results"),
    checkpoint_s: float = 60.0,
    in_memory: bool = False,
    cores: int | None = None,
    **choices: Unpack[SettingsOptions],
) -> Settings:
    """Resolve what was asked against this machine.

    in_memory: the data set is held in memory and small, so that loader processes would cost more
    than they save. cores: this process's own, where others of its run share the machine; None for
    all that it may use.

    Raises UserError for a device that is not here and for values outside the lists.
    """
    import torch  # seconds, which commands that only check their options need not wait for

    chosen = _resolved(choices)
    device = resolve_device(device)
    kind = kind_of(device)
    if chosen["cuda_graphs"]:
        _check_cuda_graphs(
            kind == "cuda", chosen["micro_batch"], chosen["activation_checkpointing"]
        )
    use_device(device)  # what names none means this one, the question for bf16 included
    num_auto = _auto_workers(kind != "cpu", in_memory, cores or num_cores())
    return Settings(
        device=device,
        precision=_resolve_precision(precision, kind),
        channels_last=kind in ("cuda", "xpu"),
        num_workers=worker_count(str(workers), auto=num_auto),
        num_threads=torch.get_num_threads(),
        runs=Path(runs),
        results=Path(results),
        checkpoint_s=checkpoint_s,
        **chosen,
    )


def _resolved(choices: Mapping[str, Any]) -> dict[str, Any]:
    """SettingsOptions by the names of Settings' fields, those that were left out too.

    Raises UserError for a value in none of the lists above or below 1, a tracker that is not
    installed, and two that exclude each other.
    """
    chosen = {one.name: one.default for one in fields(Settings) if one.default is not MISSING}
    for name, value in choices.items():
        field = _FIELDS.get(name, name)
        chosen[field] = bool(value) if isinstance(chosen.get(field), bool) else value
    if chosen["micro_batch"] == "page":
        chosen["micro_batch"] = "recipe"  # its name before
    words = (chosen[name] for name in ("micro_batch", "loader", "stop_if", "debug", "keep"))
    _check_words(*words)
    if chosen["loader"] == "auto":
        chosen["loader"] = "torch"
    if chosen["debug"] and (chosen["compile"] or chosen["cuda_graphs"]):
        raise UserError(
            "debug=nan: looks at every layer, which compile=1 and cuda_graphs=1 join into one; use"
            " it without them"
        )
    check_numa(chosen["numa"])
    chosen["trackers"] = trackers_of(choices.get("track", ""))
    chosen["test_px"] = sizes_of(choices.get("test_px", ""))
    counts = ("eval_every", "eval_batch", "log_every")
    _check_counts(**{name: chosen[_FIELDS[name]] for name in counts})
    _check_compile(chosen["compile"], chosen["compile_mode"], chosen["activation_checkpointing"])
    return chosen


def _check_words(micro_batch: str, loader: str, stop_if: str, debug: str, keep: str) -> None:
    """Refuse what is in none of the lists above. Raises UserError."""
    if micro_batch not in MICRO_BATCHES:
        raise UserError(
            f"micro_batch={micro_batch}: unknown{did_you_mean(micro_batch, MICRO_BATCHES)}; valid:"
            " recipe, auto"
        )
    check_loader(loader)
    _check_word("stop_if", stop_if, STOP_REASONS)
    _check_word("debug", debug, DEBUG_KINDS)
    _check_word("keep", keep, KEPT_WEIGHTS)


def _check_word(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuse a value outside a list; none is valid. Raises UserError."""
    if value and value not in valid:
        raise UserError(
            f"{name}={value}: unknown{did_you_mean(value, valid)}; valid: {', '.join(valid)}"
        )


def _check_counts(**given: int) -> None:
    """Refuse a number below 1. Raises UserError."""
    for name, value in given.items():
        if value < 1:
            raise UserError(f"{name}={value}: below 1", f"use {name}=1 or more")


def _check_compile(is_compiled: bool, mode: str, is_checkpointing: bool) -> None:
    if is_compiled and is_checkpointing:
        raise UserError(
            "compile=1 activation_checkpointing=1: each changes how a pass runs; use one of the two"
        )
    if mode not in COMPILE_MODES:
        raise UserError(
            f"compile_mode={mode}: unknown{did_you_mean(mode, COMPILE_MODES)}; valid:"
            f" {', '.join(COMPILE_MODES)} (for CUDA graphs use cuda_graphs=1)"
        )
    if mode != "default" and not is_compiled:
        raise UserError(f"compile_mode={mode}: says how to compile; use it with compile=1")


def _check_cuda_graphs(on_gpu: bool, micro_batch: str, is_checkpointing: bool) -> None:
    if not on_gpu:
        raise UserError("cuda_graphs=1: needs an NVIDIA GPU; use cuda_graphs=0")
    if is_checkpointing:
        raise UserError(
            "cuda_graphs=1 activation_checkpointing=1: recomputing asks the generator for its"
            " state, which a graph cannot; use one of the two"
        )
    if micro_batch == "auto":
        raise UserError(
            "cuda_graphs=1 micro_batch=auto: a graph keeps the memory that a split wants back; use"
            " one of the two"
        )


def check_precision(precision: str) -> None:
    """Refuse a precision that is not there. Raises UserError."""
    if precision not in ("auto", *PRECISIONS):
        raise UserError(
            f"precision={precision}: unknown{did_you_mean(precision, PRECISIONS)}; valid: auto,"
            f" {', '.join(PRECISIONS)}"
        )


def _resolve_precision(precision: str, kind: str) -> str:
    import torch

    check_precision(precision)
    if precision == "auto":
        if kind == "cuda":
            # GPUs before Ampere only emulate bf16
            is_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return "bf16" if is_bf16 else "fp16"
        return "bf16" if kind == "xpu" and torch.xpu.is_bf16_supported() else "float32"
    if precision == "fp16" and kind not in ("cuda", "xpu"):
        raise UserError("precision=fp16: needs a GPU (its gradient scaler); use precision=float32")
    if precision == "tf32" and not (kind == "cuda" and torch.cuda.is_tf32_supported()):
        raise UserError("precision=tf32: needs an NVIDIA GPU since Ampere; use precision=float32")
    return precision


def _auto_workers(has_accelerator: bool, in_memory: bool, cores: int) -> int:
    if in_memory and not has_accelerator:
        return 0
    return min(16, cores) if has_accelerator else max(1, cores // 2)


def worker_count(workers: str, auto: int) -> int:
    """The number asked for, 0 .. 256, or `auto`.

    Raises UserError for anything else.
    """
    if workers == "auto":
        return auto
    if not workers.isdigit() or int(workers) > 256:
        raise UserError(f"workers={workers}: not a number of processes; valid: auto, 0 .. 256")
    return int(workers)


def sizes_of(test_px: str) -> tuple[int, ...]:
    """The sides in px of "224 256", each once; empty where none is given.

    Raises UserError for what is no side of an image.
    """
    words = test_px.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdecimal()) or int(word) not in _SIDES_PX:
            raise UserError(
                f"test_px={test_px}: {word!r} is no number of pixels",
                f"use 224, or 224 256, each {_SIDES_PX[0]} to {_SIDES_PX[-1]}",
            )
    return tuple(dict.fromkeys(map(int, words)))


def check_writable(what: str, folder: Path) -> None:
    """Make a folder and write into it, before hours of training depend on it.

    Raises UserError where that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise UserError(
            f"{what}={folder}: cannot write there ({error.strerror}); use {what}=<another folder>"
        ) from None


def check_loader(loader: str) -> None:
    """Refuse a loader that is not there.

    Raises UserError.
    """
    if loader not in LOADERS:
        raise UserError(
            f"loader={loader}: unknown{did_you_mean(loader, LOADERS)}; valid: {', '.join(LOADERS)}"
        )


def check_numa(numa: str) -> None:
    """Refuse a binding that is not there. Raises UserError."""
    _check_word("numa", numa, NUMA_BINDINGS)


def trackers_of(track: str) -> tuple[str, ...]:
    """The trackers of track=, beside TensorBoard, whose packages are installed: "wandb, mlflow".

    Raises UserError for one that is unknown or not installed.
    """
    names = tuple(dict.fromkeys(track.replace(",", " ").split()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"track={name}: unknown{did_you_mean(name, TRACKERS)}; valid: {', '.join(TRACKERS)}"
            )
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without: a mere folder of that name
            raise UserError(
                f"track={name}: not installed",
                f'run .venv/bin/python -m pip install "rsb[{name}]"',
            )
    return tuple(name for name in names if name != TRACKERS[0])
