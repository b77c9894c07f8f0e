"""The doctor answers whatever is broken, and says what mends it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.numa import pretend
from trainer.base.numa import node_names
from trainer.base.settings import make_settings
from trainer.data import loader_speed
from trainer.engine.state import set_algorithms
from trainer.tools import doctor, doctor_probes, doctor_steps
from trainer.tools.doctor import examine, is_fit, print_findings
from trainer.tools.doctor_probes import ABSENT, BROKEN, GOOD, PROBES, Finding

ROOT = Path(__file__).parents[2]
QUICK = tuple(
    name
    for name in PROBES
    if name not in ("step", "ffcv", "timm", "torchvision", "other packages", "CUDA", "OpenCV")
)


def by_name(findings) -> dict[str, Finding]:
    return {one.what: one for one in findings}


def test_this_machine_is_found_fit(tmp_path):
    found = by_name(
        examine({"runs": str(tmp_path / "runs"), "results": str(tmp_path / "results")}, QUICK)
    )
    assert {
        "python",
        "torch",
        "cores",
        "shared memory",
        "disk (runs)",
        "disk (results)",
        "cache",
        "locale",
        "JPEG",
    } <= set(found)
    assert is_fit(found.values()), found
    assert found["python"].found.startswith(sys.version.split()[0])
    assert not (tmp_path / "runs").exists()  # it looks, and leaves nothing


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("raise ImportError('libx.so: cannot open\\nmore')", "ImportError: libx.so: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("print('noise'); import os; os.write(1, b'more noise'); raise KeyError", "KeyError"),
    ],
)
def test_a_broken_package_costs_its_own_line(tmp_path, monkeypatch, content, says):
    """A timm of our own in front of the real one: raises, or ends the process."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = by_name(examine({}, ("python", "timm", "cores", "locale")))
    assert list(found) == ["python", "timm", "cores", "locale"]
    assert says in found["timm"].found and found["timm"].state == BROKEN and found["timm"].remedy
    assert found["cores"].state == GOOD and not is_fit(found.values())
    assert (
        f"{loader_speed.CORE_IMAGES_PER_S:.0f}" in found["cores"].wanted
        and "resnet50" in found["cores"].wanted
    )


def test_a_package_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text("import signal; signal.pause()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PATIENCE_S", 10.0)
    found = by_name(examine({}, ("OpenCV", "cores")))
    assert found["OpenCV"].found == "no answer within 10 s" and found["OpenCV"].state == ABSENT
    assert is_fit(found.values()) and "cores" in found


def test_a_python_that_does_not_start_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (found,) = examine({}, ("torch", "timm"))
    assert "does not start" in found.found and found.state == BROKEN


def test_the_command_ends_with_1_where_the_main_job_would_fail(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from trainer.cli.main import app

    monkeypatch.setattr(doctor, "PROBES", {name: PROBES[name] for name in ("python", "disk")})
    (tmp_path / "file").touch()
    for runs, code in ((tmp_path / "runs", 0), (tmp_path / "file" / "runs", 1)):
        done = CliRunner().invoke(app, ["doctor", "--runs", str(runs), "--results", str(tmp_path)])
        assert done.exit_code == code, done.output
        assert ("trains here" if code == 0 else "fails here: disk (runs)") in done.output
        assert code == 0 or "runs=<another folder>" in done.output


@pytest.mark.parametrize("is_checkout", [True, False])
def test_a_missing_ffcv_is_named_with_what_mends_it_and_the_main_job_trains(
    tmp_path, monkeypatch, is_checkout
):
    """Nothing of the main job asks for it: exit 0."""
    from typer.testing import CliRunner

    from trainer.cli.main import app

    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['ffcv'] = None  # as if it were not installed\n"
    )
    if not is_checkout:  # as a wheel is installed: no Makefile beside the package
        content = "\nfrom pathlib import Path; import trainer.tools.doctor_probes as probes; probes.PACKAGE_ROOT = Path('/nowhere')\n"
        (tmp_path / "sitecustomize.py").write_text(
            (tmp_path / "sitecustomize.py").read_text()
            + f"sys.path.insert(0, {str(ROOT)!r})"
            + content
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBES", {name: PROBES[name] for name in ("python", "ffcv")})
    (found,) = examine({}, ("ffcv",))
    by_hand = f"sudo apt-get install -y pkg-config libturbojpeg0-dev libopencv-dev && {sys.executable} -m pip install setuptools ffcv"
    assert (found.found, found.state, found.remedy) == (
        "not here",
        ABSENT,
        "make setup ffcv=1" if is_checkout else by_hand,
    )
    done = CliRunner().invoke(
        app, ["doctor", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    )
    assert done.exit_code == 0 and "make recipe=A1 model=resnet50 trains here" in done.output
    assert "ffcv" in done.output and (not is_checkout or "make setup ffcv=1" in done.output)


@pytest.mark.parametrize("missing", ["", "rich"])
def test_the_doctor_needs_no_package_to_start(tmp_path, missing):
    """Not even those of the command line: it is asked because they may be broken."""
    for name in filter(None, ("torch", "pydantic", "numpy", "timm", "yaml", "typer", missing)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('broken on purpose')")
    script = (
        "import trainer.tools.doctor as d; d.PROBES = {name: d.PROBES[name] for name in ('python', 'torch', 'timm', 'JPEG', 'locale')};"
        "import sys; sys.argv = ['rsb', 'doctor', '--runs', 'r', '--results=s']; from trainer.__main__ import main; main()"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "fails here: torch, timm, JPEG" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.stdout.count("broken on purpose") == 3 and "Traceback" not in done.stderr


def test_each_gpu_is_told_with_its_numa_node_where_there_are_several(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "H200")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda gpu: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B + gpu, pci_device_id=0),
    )
    monkeypatch.setattr(
        doctor_probes, "node_names", lambda addresses: node_names(addresses, tmp_path)
    )
    gpus = {"0000:1b:00.0": 1, "0000:1c:00.0": 0, "0000:1d:00.0": -1}
    for nodes, told in (({0: "0-3"}, "3 x H200"), ({0: "0-1", 1: "2-3"}, "NUMA nodes 1 0 ?")):
        pretend(tmp_path, nodes, gpus)
        found = by_name(doctor_probes.cuda({}))["CUDA"]
        assert found.state == GOOD and found.found.endswith(told)


def test_words_of_another_command_are_left_to_it():
    for words in (["--help"], ["--runs", "a", "--all"], ["x"]):
        assert doctor.answer_words(words) is None


@pytest.mark.parametrize(
    ("torch", "torchvision", "wanted", "fits"),
    [
        ("2.15.0", "0.29.2", "torch>=2.14", True),
        ("2.11.0+cu128", "0.26.0", "torch==2.11.0", True),
        ("2.11.0", "0.29.0", "torch==2.14.0", False),
        (
            "2.13.0+cpu",
            "0.28.0",
            "torch==2.13.0",
            False,
        ),  # a local build without what timm needs of torchvision
        ("2.14.0", "0.26.0", "torch==2.11.0", False),
    ],
)
def test_pairs_known_not_to_fit_are_told(torch, torchvision, wanted, fits):
    line = doctor_probes.unfit_pair(torch, torchvision, wanted)
    assert (line is None) is fits
    assert fits or (torch in line and "known not to fit" in line and "\n" not in line)


def test_what_is_wanted_is_what_the_package_states():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor_probes.requirements()) == {
        line.split(">")[0].split("=")[0].lower() for line in project["dependencies"]
    }
    assert "2.13.0" in doctor_probes.requirements()["torch"]


def test_a_container_with_little_shared_memory_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: type("Usage", (), {"free": 64 * 2**20})()
    )
    (found,) = doctor_probes.shared_memory({}, tmp_path)
    assert found.state == ABSENT and "64 MiB" in found.found and "--shm-size" in found.remedy
    (runs, _) = doctor_probes.disk({"runs": str(tmp_path), "results": str(tmp_path)})
    assert runs.state == BROKEN


def test_an_ascii_machine_is_broken_and_told_what_to_export():
    script = "from trainer.tools.doctor_probes import locale; one, = locale({}); print(one.state, one.remedy)"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "broken export LC_ALL=C.UTF-8", done.stderr


def test_the_step_is_the_main_jobs_and_the_same_bits_twice(monkeypatch):
    """On a small model here; what is asked for is the real one."""
    assert (doctor_probes.MAIN_RECIPE, doctor_probes.MAIN_MODEL) == ("A1", "resnet50")
    monkeypatch.setattr(doctor_probes, "MAIN_MODEL", "test_resnet")
    monkeypatch.setattr(doctor_steps, "NUM_STEPS", 1)
    findings = by_name(doctor_probes.steps({}))
    assert (
        findings["step on cpu"].state == GOOD
        and "ms of processor time for 32 images" in findings["step on cpu"].found
    )
    told = findings["determinism on cpu"]
    assert (
        told.state == GOOD
        and "the same steps twice: the same bits" in told.found
        and "% time" in told.found
    )


def test_determinism_mode_lets_cudnn_try_no_algorithms(monkeypatch):
    """Which one is the fastest differs from time to time; the step itself asks for the trying."""
    cudnn, seen = torch.backends.cudnn, []
    on_gpu = dataclasses.replace(make_settings("cpu", workers="0"), device="cuda:0")

    def trained(device):
        set_algorithms(on_gpu)
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        )
        return "same", [0.01]

    monkeypatch.setattr(doctor_steps, "trained", trained)
    for before in ((False, True), (True, False)):
        monkeypatch.setattr(cudnn, "deterministic", before[0])
        monkeypatch.setattr(cudnn, "benchmark", before[1])
        doctor_probes.determinism("cuda:0", is_same=False, median_s=0.01)
        assert (cudnn.deterministic, cudnn.benchmark) == before
    assert seen == [(True, True, False)] * 4
    set_algorithms(on_gpu)
    assert cudnn.benchmark


def test_steps_that_differ_are_marked_not_fatal(monkeypatch):
    numbers = iter(range(10))
    monkeypatch.setattr(doctor_steps, "trained", lambda device: (str(next(numbers)), [0.01]))
    findings = by_name(doctor_probes.steps({}))
    assert (
        findings["determinism on cpu"].state == ABSENT
        and "other bits" in findings["determinism on cpu"].found
    )
    assert is_fit(findings.values())


def test_a_step_that_fails_on_the_device_of_the_main_job_is_fatal(monkeypatch):
    def trained(device):
        if device == "cuda:0":
            raise RuntimeError("no kernel image is available\nfor execution")
        return "same", [0.01]

    monkeypatch.setattr(doctor_steps, "trained", trained)
    monkeypatch.setattr(doctor_probes, "devices", lambda: ["cuda:0", "cpu"])
    findings = by_name(doctor_probes.steps({}))
    assert (
        findings["step on cuda:0"].state == BROKEN
        and findings["step on cuda:0"].found == "RuntimeError: no kernel image is available"
    )
    assert findings["step on cpu"].state == GOOD


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "who holds its memory"),
        (RuntimeError("CUDA error: no kernel image is available"), "a torch built for this GPU"),
        (RuntimeError("Failed to find C compiler"), "apt-get install -y gcc"),
        (RuntimeError("CUDA error: uncorrectable ECC error"), "xid"),
    ],
    ids=["memory", "architecture", "compiler", "hardware"],
)
def test_a_step_that_fails_on_a_gpu_has_the_remedy_of_its_cause(error, remedy, monkeypatch):
    def trained(device):
        raise error

    monkeypatch.setattr(doctor_steps, "trained", trained)
    monkeypatch.setattr(doctor_probes, "devices", lambda: ["cuda:0"])
    mended_by = by_name(doctor_probes.steps({}))["step on cuda:0"].remedy
    assert remedy in mended_by and mended_by.endswith("device=cpu trains without it")


def test_the_table_shows_every_finding_as_text(capsys):
    findings = [
        Finding("[x]", "a\x1bb", "w", BROKEN, "mend"),
        Finding("y", "f", "w", GOOD, "unused"),
    ]
    print_findings(findings, "fails here")
    out = capsys.readouterr().out
    assert "[x]" in out and "\\x1b" in out and "mend" in out and "unused" not in out
