"""A GPU that computes nothing: torch's own CUDA code runs, and what the host does is counted.

`runtime.cpp` (the CUDA runtime) and `libraries.cpp` (cuBLAS, cuDNN, NCCL) are preloaded under
torch's CUDA wheel, `driver.c` stands for libcuda. Dispatch, autograd's threads, the caching
allocators, streams, events and pinned memory are torch's own; kernels compute nothing and what is
read back is zero. `watch.py` says which line of trainer/ made the host wait.

It shows no values, no times and no races between kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
_LIBRARY = "libgpu_stub.so"


class NoCompiler(RuntimeError):
    """The pretended GPU cannot be built here."""


def is_loaded() -> bool:
    """Is this process's GPU the pretended one?"""
    return _LIBRARY in os.environ.get("LD_PRELOAD", "")


def build(folder: Path) -> dict[str, str]:
    """Environment variables under which a process finds a pretended GPU, built in `folder` unless
    it lies there for this torch. Raises NoCompiler.
    """
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".h", ".cpp", ".c"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    built = folder / f"{torch.__version__}-{digest}"
    if not (built / _LIBRARY).exists():
        made = folder / f"{built.name}.{os.getpid()}"  # test processes build at the same time
        made.mkdir(parents=True, exist_ok=True)
        _compile(made)
        try:
            made.rename(built)
        except OSError:  # another was first
            shutil.rmtree(made)
    return {"LD_PRELOAD": str(built / _LIBRARY), "LD_LIBRARY_PATH": str(built)}


def _compile(made: Path) -> None:
    for program, package in (("g++", "g++"), ("cc", "gcc")):
        if shutil.which(program) is None:
            raise NoCompiler(f"no {program} here: apt-get install {package}")
    options = ["-O2", "-fPIC", "-shared"]
    runtime = ["g++", "-std=c++17", *options, *(f"-I{path}" for path in _include_folders())]
    sources = [HERE / "runtime.cpp", HERE / "libraries.cpp"]
    driver = ["cc", *options, HERE / "driver.c", "-Wl,-soname,libcuda.so.1", "-ldl"]
    for command in (
        [*runtime, *sources, "-o", made / _LIBRARY],
        [*driver, "-o", made / "libcuda.so.1"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise NoCompiler(done.stderr)


def _include_folders() -> list[Path]:
    """Of the wheels that torch's CUDA build brings: first the runtime's own headers, as a structure
    changes with the version; then Triton's, which alone have crt/.
    """
    packages = Path(sysconfig.get_path("purelib"))
    headers = sorted(packages.glob("nvidia/*/include/cuda_runtime_api.h"))
    crt = packages / "triton/backends/nvidia/include"
    if not headers or not (crt / "crt").exists():
        raise NoCompiler("no CUDA headers here: torch's CUDA wheels bring them, its CPU wheel none")
    return [headers[0].parent, crt]


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """What made the host wait for the GPU inside the block, at its end: on the pretended one with
    the lines of trainer/, copies of memory that is not pinned included; on a real one as far as
    torch knows.
    """
    found: list[str] = []
    if is_loaded():
        from support.gpu_stub.watch import Watch  # needs the library

        with Watch() as watch:
            yield found
        found += [f"{what}: {line}" for what, line in watch.found]
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(warning.message) for warning in warned if "synchronizing" in str(warning.message)]


@pytest.fixture(scope="session")
def gpu_stub(request, tmp_path_factory) -> dict[str, str]:
    """The environment of a process with a pretended GPU; built once per torch version.

    Without a compiler its tests are skipped; with RSB_CI=1, as in .ci/run, they fail.
    """
    cache = getattr(request.config, "cache", None)  # -p no:cacheprovider
    try:
        found = build(cache.mkdir("gpu_stub") if cache else tmp_path_factory.mktemp("gpu_stub"))
    except NoCompiler as error:
        sentence = f"the pretended GPU cannot be built: {error}"
        pytest.fail(sentence) if os.environ.get("RSB_CI") == "1" else pytest.skip(sentence)
    return os.environ | found | {"OMP_NUM_THREADS": "1"}
