"""What is installed: the lock is complete and names no index, and the wheel carries the pages."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", one.strip())[0].lower() for one in requirements}


@pytest.mark.parametrize(
    ("file", "extra"), [("requirements.lock", "test"), ("requirements-ffcv.lock", "ffcv")]
)
def test_the_lock_holds_every_requirement_with_hashes_and_no_address(file, extra):
    lock = (ROOT / file).read_text()
    locked = re.split(r"\n(?=[a-z])", lock.strip())
    wanted = names(PROJECT["optional-dependencies"][extra])
    assert wanted | (names(PROJECT["dependencies"]) if extra == "test" else set()) <= names(locked)
    assert all("==" in one and "--hash=sha256:" in one for one in locked)
    assert "://" not in lock and "index-url" not in lock


def test_the_wheel_carries_the_pages_and_the_command(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    pages = {f"trainer/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert pages <= inside and len(pages) >= 7
    assert not [name for name in inside if name.startswith(("tests/", "results/"))]
    entry = (
        zipfile.ZipFile(wheel)
        .read(next(name for name in inside if name.endswith("entry_points.txt")))
        .decode()
    )
    assert "rsb = trainer.__main__:main" in entry


def test_ffcv_that_cannot_be_built_says_the_one_command(tmp_path):
    """Without pkg-config nothing is built, and the line names what to do."""
    for name in ("sh", "dirname", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [str(ROOT / "setup-ffcv.sh"), sys.executable],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "error: ffcv=1: pkg-config is not installed"
    )
    assert "sudo apt-get install -y" in done.stderr and "; run sudo" in done.stderr


def test_tests_of_ffcv_fail_in_ci_where_it_is_missing(monkeypatch):
    from support import built

    monkeypatch.setattr(built.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("RSB_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make setup ffcv=1"):
        built.needs_ffcv()
    monkeypatch.setenv("RSB_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="make setup ffcv=1"):
        built.needs_ffcv()


def dry_setup(tmp_path, *words: str) -> subprocess.CompletedProcess:
    command = [
        "make",
        "-n",
        "setup",
        f"VENV={tmp_path / 'venv'}",
        f"PYTHON={sys.executable}",
        *words,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_setup_without_cuda_installs_the_lock_but_for_torch_and_its_libraries(tmp_path):
    done = dry_setup(tmp_path, "torch=cpu", "index=file:///wheels")
    assert done.returncode == 0, done.stderr
    [program] = re.findall(r"^awk '(.*)' requirements.lock", done.stdout, re.M)
    lock = (ROOT / "requirements.lock").read_text()
    words = ["awk", program, "requirements.lock"]
    kept = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {text: set(re.findall(r"^([a-z0-9_.-]+)==", text, re.M)) for text in (lock, kept)}
    left_out = names[lock] - names[kept]
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= left_out
    assert all(re.match(r"torch(vision)?$|triton$|nvidia-|cuda-", name) for name in left_out)
    assert kept.count("--hash") == lock.count("--hash") - sum(
        block.count("--hash")
        for block in re.split(r"^(?=[a-z])", lock, flags=re.M)
        if block.partition("==")[0] in left_out
    )
    assert "--index-url 'file:///wheels'" in done.stdout and "GB on disk" in done.stdout


@pytest.mark.parametrize("words", [["torch=cpu"], ["torch=cuda"], ["torch=cpu", "indx=x"]])
def test_a_setup_that_cannot_be_is_one_line(tmp_path, words):
    done = dry_setup(tmp_path, *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
