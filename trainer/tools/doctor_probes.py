"""What `make doctor` asks of Python, the packages, the driver and the machine; then it decodes an
image, makes the main job's first steps on each device, and the same steps twice.

Nothing is imported before it is asked about: it may be broken.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module  # by name, inside the probes
from pathlib import Path
from types import ModuleType

from trainer.base.cache import cache_folder, cache_note
from trainer.base.cores import num_cores
from trainer.base.devices import pci_address
from trainer.base.numa import node_names
from trainer.base.provenance import PACKAGE_ROOT

GOOD, ABSENT, BROKEN = "good", "absent", "broken"
OLDEST_PYTHON = (3, 11)
# Three checkpoints of resnet50 under LAMB (weights and two moments, 282 MB) on the disk at a time,
# and the model.
NEEDED_DISK_MIB = 1000
# What 16 loader processes hold ready of 224 px images, two micro-batches of 128 each; docker's own
# limit is 64 MiB.
WANTED_SHARED_MIB = 1024
MAIN_RECIPE, MAIN_MODEL = "A1", "resnet50"
# of each of the two modes; the first step of a process also sets up what the others find

Folders = Mapping[str, str]  # "runs", "results": as given
_SET_UP = "make clean && make setup"
_MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "markdown-it-py": "markdown_it",
}
# pip takes a local build of it for the CPU, which torchvision's wheels do not fit
_TORCHVISION_WITHOUT_NMS = "2.13.0"
# 16 x 16 px, red beside blue
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/wAARCAAQABAD"
    "AREAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAAB//EABQQAQAAAAAAAAAAAAAAAAAAAAD/xAAVAQEBAAAAAAAAAAAAAAAAAAAJB//EABQRAQAA"
    "AAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/ABpJCYCctwiiwJEuonLcIp//2Q=="
)
_COLOURS = {(3, 3): (250, 20, 30), (12, 12): (20, 40, 240)}
_MOST_OFF = 12  # decoders round otherwise


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


def judged(
    what: str, found: str, wanted: str, is_good: bool, remedy: str, otherwise: str = ABSENT
) -> list[Finding]:
    """A finding that is good, or else absent or broken."""
    return [Finding(what, found, wanted, *((GOOD, "") if is_good else (otherwise, remedy)))]


def answer() -> None:
    """What the child process does: ask the question named on its command line, and write what was
    found to standard output as JSON.

    Words: the question, the folders as JSON. An empty line says that it has begun.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no answer
    print(file=out, flush=True)
    name, folders = sys.argv[1], json.loads(sys.argv[2])
    try:
        found = PROBES[name].ask(folders)
    except (Exception, SystemExit) as error:
        found = [unanswered(name, first_line(error))]
    json.dump([asdict(one) for one in found], out)


def unanswered(name: str, why: str) -> Finding:
    """What is found where a question has no answer."""
    probe = PROBES[name]
    return Finding(name, why, "an answer", BROKEN if probe.is_needed else ABSENT, probe.remedy)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


# ---- Python and the packages


def python(_: Folders) -> list[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    wanted = f">= {'.'.join(map(str, OLDEST_PYTHON))}"
    is_good = sys.version_info >= OLDEST_PYTHON
    return judged(
        "python", found, wanted, is_good, "make clean && make PYTHON=python3.12 setup", BROKEN
    )


def requirements() -> dict[str, str]:
    """What this suite needs, by distribution: `>=2.9,!=2.13.0`. As its checkout says now, else as
    it is installed.
    """
    project = PACKAGE_ROOT / "pyproject.toml"
    if project.exists():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("rsb") or []
    needed = map(import_module("packaging.requirements").Requirement, lines)
    return {
        one.name.lower(): str(one.specifier)
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def torch(_: Folders) -> list[Finding]:
    """torch imports, and multiplies."""
    torch = import_module("torch")
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    if product.sum().item() != 8:
        raise RuntimeError(f"a product of ones is {product.tolist()}")
    return _package("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def torchvision(_: Folders) -> list[Finding]:
    """torchvision imports, and its own operators are there: timm needs one of them."""
    torch = import_module("torch")
    ops = import_module("torchvision").ops
    ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    return _package("torchvision")


def timm(_: Folders) -> list[Finding]:
    """timm imports, and knows the main job's model."""
    if not import_module("timm").is_model(MAIN_MODEL):
        raise RuntimeError(f"it has no {MAIN_MODEL}")
    return _package("timm")


def packages(_: Folders) -> list[Finding]:
    """All other packages import, in versions that fit."""
    needed = {name: wanted for name, wanted in requirements().items() if name not in PROBES}
    wrong = []
    for name, wanted in needed.items():
        try:
            import_module(_MODULES.get(name, name.replace("-", "_")))
        except Exception as error:
            found = f"does not import: {first_line(error)}"
            wrong.append(Finding(name, found, wanted, BROKEN, install(name)))
        else:
            wrong += [one for one in _package(name) if one.state != GOOD]
    wanted = f"{len(needed)} in versions that fit"
    return wrong or [Finding("other packages", f"{len(needed)} import", wanted)]


def _package(name: str, found: str = "") -> list[Finding]:
    """A distribution's version held against what this suite needs."""
    SpecifierSet = import_module("packaging.specifiers").SpecifierSet
    wanted, version = requirements().get(name, ""), importlib.metadata.version(name)
    is_good = SpecifierSet(wanted).contains(version, prereleases=True)
    return judged(name, found or version, wanted, is_good, install(name), BROKEN)


def install(name: str) -> str:
    """The command that puts a package of the suite in order."""
    if (PACKAGE_ROOT / "Makefile").exists() and Path(sys.prefix) == PACKAGE_ROOT / ".venv":
        return _SET_UP
    wanted = ""
    with contextlib.suppress(Exception):  # of a broken `packaging`
        wanted = requirements().get(name, "")
    return f"{sys.executable} -m pip install --force-reinstall '{name}{wanted}'"


def pair_warning() -> str | None:
    """The line that says that torch and torchvision are known not to fit; None where they are not,
    or are not there.
    """
    try:
        torch, torchvision = map(importlib.metadata.version, ("torch", "torchvision"))
        lines = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = [line for line in lines if line.split(";")[0].strip().startswith("torch")]
    return unfit_pair(torch, torchvision, wanted[0] if wanted else "torch")


def unfit_pair(torch: str, torchvision: str, wanted: str) -> str | None:
    """What does not fit of two versions. wanted: torchvision's own requirement of torch, as its
    wheel states it.
    """
    version = import_module("packaging.version").Version(torch).public
    if version == _TORCHVISION_WITHOUT_NMS:
        return (
            f"torch {torch} is known not to fit torchvision's wheels (operator torchvision::nms"
            " does not exist); use another torch"
        )
    needed = import_module("packaging.requirements").Requirement(wanted).specifier
    if not needed.contains(version, prereleases=True):
        return (
            f"torchvision {torchvision} is built for {wanted}, and torch is {torch}: known not to"
            f" fit; {install('torchvision')}"
        )
    return None


# ---- the machine


def cuda(_: Folders) -> list[Finding]:
    """What torch can use of GPUs, and the driver under it."""
    none = "none is needed on the CPU"
    version = _driver()
    driver = judged("driver", version or "none", "one for a GPU", version is not None, none)
    torch = import_module("torch")
    built, count = torch.version.cuda, torch.cuda.device_count()
    if torch.cuda.is_available() and count:
        names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(count)}))
        near = " ".join(node_names(map(pci_address, range(count))))
        found = f"{built}, {count} x {names}" + (f", on NUMA nodes {near}" if near else "")
        return [Finding("CUDA", found, "a GPU, or none"), *driver]
    why = "torch is built for the CPU" if built is None else f"built for {built}, torch sees no GPU"
    # a driver that torch cannot use: it says why
    remedy = none if version is None else "nvidia-smi" if built else install("torch")
    return [Finding("CUDA", why, "a GPU, or none: the CPU trains too", ABSENT, remedy), *driver]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def ffcv(_: Folders) -> list[Finding]:
    """The optional loader."""
    by_hand = (
        "sudo apt-get install -y pkg-config libturbojpeg0-dev libopencv-dev &&"
        f" {sys.executable} -m pip install setuptools ffcv"
    )
    remedy = "make setup ffcv=1" if (PACKAGE_ROOT / "Makefile").exists() else by_hand
    # its own __version__ is older than it is
    version = importlib.metadata.version
    return _optional("ffcv", "ffcv", "optional", remedy, lambda ffcv: version(ffcv.__name__))


def opencv(_: Folders) -> list[Finding]:
    """OpenCV, which ffcv decodes with."""
    remedy = f"{sys.executable} -m pip install opencv-python-headless"
    return _optional("OpenCV", "cv2", "optional, for ffcv", remedy, lambda cv2: cv2.__version__)


def _optional(
    what: str, module: str, wanted: str, remedy: str, version: Callable[[ModuleType], str]
) -> list[Finding]:
    if importlib.util.find_spec(module) is None:
        return [Finding(what, "not here", wanted, ABSENT, remedy)]
    return [Finding(what, version(import_module(module)), wanted)]


def turbojpeg(_: Folders) -> list[Finding]:
    """The JPEG library that ffcv is built against."""
    found = ctypes.util.find_library("turbojpeg")
    remedy = "sudo apt-get install -y libturbojpeg0-dev"
    return judged("TurboJPEG", found or "not here", "optional, for ffcv", found is not None, remedy)


def cores(_: Folders) -> list[Finding]:
    """Cores of this process: its affinity and its control group, not the machine's number."""
    own, there = num_cores(), os.cpu_count() or 1
    found = f"{own}" + (f" of the machine's {there}" if own != there else "")
    speed = import_module("trainer.data.loader_speed")
    number = speed.cores_for(speed.A100_RESNET50_IMAGES_PER_S)
    wanted = (
        f"1; for a GPU one for each {speed.CORE_IMAGES_PER_S:.0f} photographs of 224 px a second:"
        f" {number} for an A100 with resnet50"
    )
    return [Finding("cores", found, wanted)]


def shared_memory(_: Folders, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Where NCCL lets the ranks of several GPUs meet; loader processes do without."""
    what, wanted = "shared memory", f"{WANTED_SHARED_MIB} MiB for several GPUs (NCCL)"
    if not folder.is_dir():
        return judged(what, f"no {folder}", wanted, sys.platform == "darwin", "")
    free_mib = shutil.disk_usage(folder).free / 2**20
    found, is_good = f"{free_mib:.0f} MiB free in {folder}", free_mib >= WANTED_SHARED_MIB
    return judged(what, found, wanted, is_good, "docker run --shm-size=8g ...")


def cache(_: Folders) -> list[Finding]:
    """Where the lists of images and what is compiled are kept."""
    is_good, remedy = not cache_note(), "XDG_CACHE_HOME=<a folder>"
    return judged("cache", str(cache_folder()), "a home to write to", is_good, remedy)


def disk(folders: Folders) -> list[Finding]:
    """Both folders can be written, and there is room for the main job."""
    findings = []
    for what, needed_mib in (("runs", NEEDED_DISK_MIB), ("results", 1)):
        folder = Path(folders[what])
        place = folder.absolute()
        there = next(path for path in (place, *place.parents) if path.exists())
        free_mib = shutil.disk_usage(there).free / 2**20
        is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        found = f"{free_mib:.0f} MiB free in {folder}"
        found += "" if is_writable else f", where {there} cannot be written"
        wanted, is_good = f"{needed_mib} MiB free, to be written", free_mib >= needed_mib
        remedy = f"{what}=<another folder>"
        findings += judged(f"disk ({what})", found, wanted, is_writable and is_good, remedy, BROKEN)
    return findings


def locale(_: Folders) -> list[Finding]:
    """Text is UTF-8: recipes and rows hold other letters than ASCII's."""
    files, names = import_module("locale").getpreferredencoding(False), sys.getfilesystemencoding()
    is_good = all(one.lower().replace("-", "") == "utf8" for one in (files, names))
    remedy = "export LC_ALL=C.UTF-8"
    return judged("locale", f"files {files}, names {names}", "UTF-8", is_good, remedy, BROKEN)


# ---- an image, and the main job's first steps


def jpeg(_: Folders) -> list[Finding]:
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
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["cpu"]
    if found.type == "mps":
        return ["mps", "cpu"]
    return [
        *(f"{found.type}:{number}" for number in range(torch.accelerator.device_count())),
        "cpu",
    ]


def steps(_: Folders) -> list[Finding]:
    """The main job's first steps on each device, and whether the same step gives the same bits."""
    findings = []
    for number, device in enumerate(devices()):
        what = f"step on {device}"
        try:
            is_same, median_s = twice(device)
        except Exception as error:
            state = ABSENT if number else BROKEN  # the main job takes the first
            remedy = _SET_UP if device == "cpu" else "device=cpu"
            if device.startswith("cuda"):
                remedy = _of_gpu(error)
            findings.append(Finding(what, first_line(error), "a step", state, remedy))
            continue
        unit = "ms of processor time" if device == "cpu" else "ms"
        found = f"{1000 * median_s:.0f} {unit} for 32 images of 32 px"
        findings.append(Finding(what, found, f"a step of {MAIN_RECIPE} {MAIN_MODEL}"))
        findings.append(determinism(device, is_same, median_s))
    return findings


def _of_gpu(error: Exception) -> str:
    """What mends a step that failed on a GPU; without it a run on the CPU trains all the same."""
    text, otherwise = str(error), "; device=cpu trains without it"
    if import_module("trainer.base.memory").is_memory_full(error):
        return f"nvidia-smi names who holds its memory: end that{otherwise}"
    if "no kernel image" in text or "not compatible" in text:
        return f"a torch built for this GPU, from pytorch.org's list{otherwise}"
    if any(word in text.lower() for word in ("compiler", "triton", "ptxas")):
        return f"sudo apt-get install -y gcc g++{otherwise}"
    return f"nvidia-smi, and `dmesg | grep -i xid` for what its driver saw{otherwise}"


def determinism(device: str, is_same: bool, median_s: float) -> Finding:
    """The same steps in torch's determinism mode: are they the same bits there, and what does it
    cost?

    is_same: were they without it? median_s: the time of a step without it.
    """
    on_cpu, bits = device == "cpu", {True: "the same bits", False: "other bits"}
    found, is_good = f"the same steps twice: {bits[is_same]}; determinism mode: ", is_same
    try:
        with _deterministic():
            is_same_in_mode, in_mode_s = twice(device)
    except RuntimeError as error:  # torch refuses what it has no deterministic way for
        found += first_line(error)
    else:
        found += f"{bits[is_same_in_mode]}, {100 * (in_mode_s / median_s - 1):+.0f} % time"
        is_good = is_same if on_cpu else is_same_in_mode
    wanted = "the same bits twice" if on_cpu else "the same bits in determinism mode"
    remedy = "export OMP_NUM_THREADS=1" if on_cpu else "device=cpu is the same bit for bit"
    return judged(f"determinism on {device}", found, wanted, is_good, remedy)[0]


def twice(device: str) -> tuple[bool, float]:
    """Does `trained` give the same bits twice? And the median seconds of the second one's steps."""
    # the whole suite, of which any part may be broken
    trained = import_module("trainer.tools.doctor_steps").trained
    (one, _), (other, seconds) = trained(device), trained(device)
    return one == other, statistics.median(seconds)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Torch's determinism mode. Source: torch's notes on reproducibility."""
    torch = import_module("torch")
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # which algorithm was the fastest is not the same twice
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = before


@dataclass(frozen=True)
class Probe:
    """One question. is_needed: does the main job fail where it cannot be answered? remedy: what
    would mend that.
    """

    ask: Callable[[Folders], list[Finding]]
    is_needed: bool = True
    remedy: str = _SET_UP


PROBES = {
    "python": Probe(python),
    "torch": Probe(torch),
    "torchvision": Probe(torchvision),
    "timm": Probe(timm),
    "other packages": Probe(packages),
    "CUDA": Probe(cuda, is_needed=False, remedy="device=cpu"),
    "OpenCV": Probe(opencv, is_needed=False),
    "TurboJPEG": Probe(turbojpeg, is_needed=False),
    "cores": Probe(cores, is_needed=False),
    "shared memory": Probe(shared_memory, is_needed=False),
    "disk": Probe(disk),
    "cache": Probe(cache, is_needed=False),
    "locale": Probe(locale),
    "JPEG": Probe(jpeg),
    "step": Probe(steps),
    "ffcv": Probe(ffcv, is_needed=False),
}
