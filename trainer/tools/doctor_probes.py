"""What `make doctor` asks of Python, the packages, the driver and the machine; nothing is imported
before it is asked for.
"""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module  # by name, inside the probes: what is asked about may be broken
from pathlib import Path

from trainer.base.cores import num_cores
from trainer.base.provenance import PACKAGE_ROOT
from trainer.tools.doctor_finding import ABSENT, BROKEN, GOOD, Asked, Finding, first_line

OLDEST_PYTHON = (3, 11)
# Three checkpoints of resnet50 under LAMB (weights and two moments, 282 MB) on the disk at a time,
# and the model.
NEEDED_DISK_MIB = 1000
# What 16 loader processes hold ready of 224 px images, two micro-batches of 128 each; docker's own
# limit is 64 MiB.
WANTED_SHARED_MIB = 1024

_MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "markdown-it-py": "markdown_it",
}
_ASKED_ALONE = ("torch", "torchvision", "timm")
# pip takes a local build of it for the CPU, which torchvision's wheels do not fit
_TORCHVISION_WITHOUT_NMS = "2.13.0"


def python(asked: Asked) -> list[Finding]:
    """The interpreter."""
    is_good = sys.version_info >= OLDEST_PYTHON
    remedy = "" if is_good else "make clean && make PYTHON=python3.12 setup"
    found = f"{platform.python_version()} ({sys.executable})"
    return [
        Finding(
            "python",
            found,
            f">= {'.'.join(map(str, OLDEST_PYTHON))}",
            GOOD if is_good else BROKEN,
            remedy,
        )
    ]


def requirements() -> dict[str, str]:
    """What this suite needs, by distribution: `>=2.9,!=2.13.0`. As its checkout says now, else as
    it is installed.
    """
    project = PACKAGE_ROOT / "pyproject.toml"
    if project.exists():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("rsb") or []
    Requirement = import_module("packaging.requirements").Requirement

    needed = [Requirement(line) for line in lines]
    return {
        one.name.lower(): str(one.specifier)
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def torch(asked: Asked) -> list[Finding]:
    """torch imports, and multiplies."""
    torch = import_module("torch")

    product = torch.ones(2, 2) @ torch.ones(2, 2)
    if product.sum().item() != 8:
        raise RuntimeError(f"a product of ones is {product.tolist()}")
    return [_package("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]


def torchvision(asked: Asked) -> list[Finding]:
    """torchvision imports, and its own operators are there: timm needs one of them."""
    torch = import_module("torch")
    torchvision = import_module("torchvision")

    torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    return [_package("torchvision", torchvision.__version__)]


def timm(asked: Asked) -> list[Finding]:
    """timm imports, and knows the main job's model."""
    timm = import_module("timm")

    if not timm.is_model("resnet50"):
        raise RuntimeError("it has no resnet50")
    return [_package("timm", timm.__version__)]


def packages(asked: Asked) -> list[Finding]:
    """All other packages import, in versions that fit."""
    needed = {name: wanted for name, wanted in requirements().items() if name not in _ASKED_ALONE}
    wrong = []
    for name in needed:
        try:
            importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
        except Exception as error:
            wrong.append(
                Finding(
                    name,
                    f"does not import: {first_line(error)}",
                    needed[name],
                    BROKEN,
                    install(name),
                )
            )
        else:
            wrong += [one for one in [_package(name)] if one.state != GOOD]
    return wrong or [
        Finding("other packages", f"{len(needed)} import", f"{len(needed)} in versions that fit")
    ]


def _package(name: str, found: str = "") -> Finding:
    """A distribution's version held against what this suite needs."""
    SpecifierSet = import_module("packaging.specifiers").SpecifierSet

    wanted, version = requirements().get(name, ""), importlib.metadata.version(name)
    is_good = SpecifierSet(wanted).contains(version, prereleases=True)
    return Finding(
        name,
        found or version,
        wanted,
        GOOD if is_good else BROKEN,
        "" if is_good else install(name),
    )


def install(name: str) -> str:
    """The command that puts a package of the suite in order."""
    if (PACKAGE_ROOT / "Makefile").exists() and Path(sys.prefix) == PACKAGE_ROOT / ".venv":
        return "make clean && make setup"
    try:
        wanted = requirements().get(name, "")
    except Exception:
        wanted = ""
    return f"{sys.executable} -m pip install --force-reinstall '{name}{wanted}'"


def pair_warning() -> str | None:
    """The line that says that torch and torchvision are known not to fit; None where they are not,
    or are not there.
    """
    try:
        versions = [importlib.metadata.version(name) for name in ("torch", "torchvision")]
        wanted = [
            line
            for line in importlib.metadata.requires("torchvision") or []
            if line.split(";")[0].strip().startswith("torch")
        ]
    except importlib.metadata.PackageNotFoundError:
        return None
    return unfit_pair(*versions, wanted[0] if wanted else "torch")


def unfit_pair(torch: str, torchvision: str, wanted: str) -> str | None:
    """What does not fit of two versions. wanted: torchvision's own requirement of torch, as its
    wheel states it.
    """
    Requirement = import_module("packaging.requirements").Requirement
    Version = import_module("packaging.version").Version

    if Version(torch).public == _TORCHVISION_WITHOUT_NMS:
        return (
            f"torch {torch} is known not to fit torchvision's wheels (operator torchvision::nms"
            " does not exist); use another torch"
        )
    if not Requirement(wanted).specifier.contains(Version(torch).public, prereleases=True):
        return (
            f"torchvision {torchvision} is built for {wanted}, and torch is {torch}: known not to"
            f" fit; {install('torchvision')}"
        )
    return None


def cuda(asked: Asked) -> list[Finding]:
    """What torch can use of GPUs, and the driver under it."""
    found = _driver()
    driver = Finding(
        "driver",
        found or "none",
        "one for a GPU",
        GOOD if found else ABSENT,
        "" if found else "none is needed on the CPU",
    )
    torch = import_module("torch")

    built, count = torch.version.cuda, torch.cuda.device_count()
    if torch.cuda.is_available() and count:
        names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(count)}))
        return [Finding("CUDA", f"{built}, {count} x {names}", "a GPU, or none"), driver]
    why = "torch is built for the CPU" if built is None else f"built for {built}, torch sees no GPU"
    remedy = (
        "" if not found else "nvidia-smi" if built else install("torch")
    )  # a driver that torch cannot use: it says why
    return [
        Finding(
            "CUDA",
            why,
            "a GPU, or none: the CPU trains too",
            ABSENT,
            remedy or "none is needed on the CPU",
        ),
        driver,
    ]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def ffcv(asked: Asked) -> list[Finding]:
    """The optional loader."""
    wanted = "optional"
    if importlib.util.find_spec("ffcv") is None:
        libraries = "pkg-config libturbojpeg0-dev libopencv-dev"
        by_hand = (
            f"sudo apt-get install -y {libraries} && {sys.executable} -m pip install setuptools"
            " ffcv"
        )
        remedy = "make setup ffcv=1" if (PACKAGE_ROOT / "Makefile").exists() else by_hand
        return [Finding("ffcv", "not here", wanted, ABSENT, remedy)]
    import_module("ffcv")

    return [Finding("ffcv", importlib.metadata.version("ffcv"), wanted)]


def opencv(asked: Asked) -> list[Finding]:
    """OpenCV, which ffcv decodes with."""
    if importlib.util.find_spec("cv2") is None:
        remedy = f"{sys.executable} -m pip install opencv-python-headless"
        return [Finding("OpenCV", "not here", "optional, for ffcv", ABSENT, remedy)]
    cv2 = import_module("cv2")

    return [Finding("OpenCV", cv2.__version__, "optional, for ffcv")]


def turbojpeg(asked: Asked) -> list[Finding]:
    """The JPEG library that ffcv is built against."""
    found = ctypes.util.find_library("turbojpeg")
    remedy = "" if found else "sudo apt-get install -y libturbojpeg0-dev"
    return [
        Finding(
            "TurboJPEG",
            found or "not here",
            "optional, for ffcv",
            GOOD if found else ABSENT,
            remedy,
        )
    ]


def cores(asked: Asked) -> list[Finding]:
    """Cores of this process: its affinity and its control group, not the machine's number."""
    own, there = num_cores(), os.cpu_count() or 1
    found = f"{own}" + (f" of the machine's {there}" if own != there else "")
    return [Finding("cores", found, "1; a GPU wants 8 or more", GOOD)]


def shared_memory(asked: Asked, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Where NCCL lets the ranks of several GPUs meet; loader processes do without."""
    wanted = f"{WANTED_SHARED_MIB} MiB for several GPUs (NCCL)"
    if not folder.is_dir():
        return [
            Finding(
                "shared memory",
                f"no {folder}",
                wanted,
                GOOD if sys.platform == "darwin" else ABSENT,
                "",
            )
        ]
    free_mib = shutil.disk_usage(folder).free / 2**20
    is_good = free_mib >= WANTED_SHARED_MIB
    remedy = "" if is_good else "docker run --shm-size=8g ..."
    return [
        Finding(
            "shared memory",
            f"{free_mib:.0f} MiB free in {folder}",
            wanted,
            GOOD if is_good else ABSENT,
            remedy,
        )
    ]


def disk(asked: Asked) -> list[Finding]:
    """Both folders can be written, and there is room for the main job."""
    findings = []
    for what, folder in (("runs", Path(asked.runs)), ("results", Path(asked.results))):
        wanted = f"{NEEDED_DISK_MIB if what == 'runs' else 1} MiB free, to be written"
        there = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
        )
        free_mib = shutil.disk_usage(there).free / 2**20
        is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        is_good = is_writable and free_mib >= (NEEDED_DISK_MIB if what == "runs" else 1)
        found = f"{free_mib:.0f} MiB free in {folder}" + (
            "" if is_writable else f", where {there} cannot be written"
        )
        findings.append(
            Finding(
                f"disk ({what})",
                found,
                wanted,
                GOOD if is_good else BROKEN,
                "" if is_good else f"{what}=<another folder>",
            )
        )
    return findings


def cache(asked: Asked) -> list[Finding]:
    """Where the lists of images and what is compiled are kept."""
    index = import_module("trainer.data.index")
    state, remedy = (ABSENT, "XDG_CACHE_HOME=<a folder>") if index.cache_note() else (GOOD, "")
    return [Finding("cache", str(index.cache_folder()), "a home to write to", state, remedy)]


def locale(asked: Asked) -> list[Finding]:
    """Text is UTF-8: pages and rows hold other letters than ASCII's."""
    found = {
        "files": import_module("locale").getpreferredencoding(False),
        "names": sys.getfilesystemencoding(),
    }
    wrong = [
        name for name, encoding in found.items() if encoding.lower().replace("-", "") != "utf8"
    ]
    shown = ", ".join(f"{name} {encoding}" for name, encoding in found.items())
    return [
        Finding(
            "locale",
            shown,
            "UTF-8",
            BROKEN if wrong else GOOD,
            "export LC_ALL=C.UTF-8" if wrong else "",
        )
    ]
