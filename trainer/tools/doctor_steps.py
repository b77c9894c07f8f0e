"""What `make doctor` tries out: an image decoded, the main job's first step on each device, the
same step twice.
"""

from __future__ import annotations

import base64
import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from importlib import import_module  # by name, inside the probes: what is asked about may be broken
from pathlib import Path

from trainer.tools.doctor_finding import ABSENT, BROKEN, GOOD, Asked, Finding, first_line

MAIN_RECIPE, MAIN_MODEL = "A1", "resnet50"
# 16 x 16 px, red beside blue
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/wAARCAAQABAD"
    "AREAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAAB//EABQQAQAAAAAAAAAAAAAAAAAAAAD/xAAVAQEBAAAAAAAAAAAAAAAAAAAJB//EABQRAQAA"
    "AAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/ABpJCYCctwiiwJEuonLcIp//2Q=="
)
_COLOURS = {(3, 3): (250, 20, 30), (12, 12): (20, 40, 240)}
_MOST_OFF = 12  # decoders round otherwise


def jpeg(asked: Asked) -> list[Finding]:
    """The suite's own reader gives a JPEG's colours."""
    read_image = import_module("trainer.data.decode").read_image
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        path.write_bytes(_JPEG)
        image = read_image(path)
    off = max(
        abs(found - wanted)
        for place, colour in _COLOURS.items()
        for found, wanted in zip(image.getpixel(place), colour, strict=True)
    )
    if image.size != (16, 16) or off > _MOST_OFF:
        raise RuntimeError(f"its colours are {off} off")
    return [Finding("JPEG", "decoded, its colours right", "decoded")]


def devices() -> list[str]:
    """All devices of this machine; what device=auto takes is the first."""
    torch = import_module("torch")

    return [
        f"cuda:{number}"
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ] + ["cpu"]


def steps(asked: Asked) -> list[Finding]:
    """The main job's first steps on each device, and whether the same step gives the same bits."""
    findings = []
    for number, device in enumerate(devices()):
        try:
            findings += _on(device)
        except Exception as error:
            state = ABSENT if number else BROKEN  # the main job takes the first
            remedy = (
                "device=cpu trains without it" if device != "cpu" else "make clean && make setup"
            )
            findings.append(
                Finding(f"step on {device}", first_line(error), "a step", state, remedy)
            )
    return findings


def _on(device: str) -> list[Finding]:
    what, wanted = f"step on {device}", f"a step of {MAIN_RECIPE} {MAIN_MODEL}"
    digests, seconds = zip(
        *(import_module("trainer.tools.doctor_trial").trained(device) for _ in range(2)),
        strict=True,
    )
    median_s = statistics.median(seconds[1])
    done = Finding(
        what,
        f"{1000 * median_s:.0f} ms{' of processor time' * (device == 'cpu')} for 32 images of"
        " 32 px",
        wanted,
    )
    return [done, determinism(device, digests[0] == digests[1], median_s)]


def determinism(device: str, is_same: bool, median_s: float) -> Finding:
    """The same steps in torch's determinism mode: are they the same bits there, and what does it
    cost?

    is_same: were they without it? median_s: the time of a step without it.
    """
    wanted = "the same bits twice" if device == "cpu" else "the same bits in determinism mode"
    plain = f"the same steps twice: {'the same' if is_same else 'other'} bits"
    try:
        with _deterministic():
            digests, seconds = zip(
                *(import_module("trainer.tools.doctor_trial").trained(device) for _ in range(2)),
                strict=True,
            )
    except RuntimeError as error:  # torch refuses what it has no deterministic way for
        return _judged(device, f"{plain}; determinism mode: {first_line(error)}", wanted, is_same)
    cost = statistics.median(seconds[1]) / median_s - 1
    in_mode = (
        f"determinism mode: {'the same' if digests[0] == digests[1] else 'other'} bits,"
        f" {100 * cost:+.0f} % time"
    )
    return _judged(
        device,
        f"{plain}; {in_mode}",
        wanted,
        is_same if device == "cpu" else digests[0] == digests[1],
    )


def _judged(device: str, found: str, wanted: str, is_good: bool) -> Finding:
    remedy = (
        ""
        if is_good
        else "export OMP_NUM_THREADS=1"
        if device == "cpu"
        else "device=cpu is the same bit for bit"
    )
    return Finding(f"determinism on {device}", found, wanted, GOOD if is_good else ABSENT, remedy)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Torch's determinism mode. Source: torch's notes on reproducibility."""
    torch = import_module("torch")

    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # without effect once cuBLAS has begun: `doctor` sets it before
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = (
        True,
        False,
    )  # which algorithm was the fastest is not the same twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = before
