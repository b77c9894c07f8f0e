"""Settings are resolved against this machine, or refused."""

import os

import pytest
import torch

from trainer.base.cores import group_cores
from trainer.base.errors import UserError
from trainer.base.settings import (
    check_loader,
    check_writable,
    make_settings,
    num_cores,
    settings_from_arguments,
    worker_count,
)


def test_the_cpu_takes_float32_and_is_bitwise():
    settings = make_settings("cpu")
    assert (settings.device, settings.precision, settings.channels_last, settings.is_bitwise) == (
        "cpu",
        "float32",
        False,
        True,
    )


def test_a_small_set_in_memory_needs_no_workers():
    assert make_settings("cpu", in_memory=True).num_workers == 0
    assert make_settings("cpu", in_memory=False).num_workers >= 1
    assert make_settings("cpu", workers="3", in_memory=True).num_workers == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"device": "gpu"},
        {"device": "cuda:99"},
        {"precision": "half"},
        {"workers": "-1"},
        {"workers": "1000"},
    ],
    ids=lambda asked: "-".join(asked.values()),
)
def test_what_is_not_there_is_refused_with_what_would_do(asked):
    with pytest.raises(UserError, match="; (use|valid|leave|run|try)"):
        make_settings(**asked)


def test_a_calls_arguments_are_settings_by_their_names_and_refused_before_there_is_a_machine():
    """Whatever else the call has; switches may be 0 or 1, as the program has them."""
    call = {"recipe": "A3", "device": "tpu", "runs": "r", "track": "tensorboard", "compile": 1}
    call |= {"precision": "float32", "keep_every": 3, "test_px": "64, 96", "loader": "auto"}
    machine = settings_from_arguments(call)
    assert "recipe" not in machine and "device" not in machine
    settings = make_settings("cpu", **machine)
    assert settings.compile is True and settings.cuda_graphs is False
    assert (settings.keep_every_epochs, settings.test_px, settings.loader) == (3, (64, 96), "torch")
    assert settings.trackers == () and str(settings.runs) == "r"
    for wrong in ({"eval_every": 0}, {"test_px": "big"}, {"debug": "nan"}, {"loader": "dali"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            settings_from_arguments(call | wrong)  # debug=nan beside compile=1
    with pytest.raises(TypeError, match="no_such"):
        make_settings("cpu", no_such=1)


def test_an_unknown_loader_is_refused():
    check_loader("auto")
    with pytest.raises(UserError, match="; (use|valid|leave|run|try)"):
        check_loader("ffcv2")


@pytest.mark.parametrize(("device", "precision"), [("cuda:0", "bf16"), ("cuda:1", "fp16")])
def test_a_gpu_takes_bf16_where_it_computes_it_itself(monkeypatch, device, precision):
    """Two GPUs made up: the first computes bf16, the second only emulates it."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def is_bf16_supported(including_emulation=True):
        return including_emulation or chosen == ["cuda:0"]

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    settings = make_settings(device)
    assert (settings.device, settings.precision, settings.channels_last) == (
        device,
        precision,
        True,
    )
    assert chosen == [device]  # before it was asked what it can
    assert make_settings(device, "bf16").precision == "bf16"  # what was asked for stays


def test_workers_are_a_number_or_what_auto_stands_for():
    assert worker_count("auto", auto=num_cores()) == num_cores() >= 1
    assert worker_count("7", auto=2) == 7


def test_a_folder_to_write_into_is_made_and_left_empty(tmp_path):
    check_writable("runs", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            UserError, match="results=.*: cannot write there .*results=<another folder>"
        ):
            check_writable("results", folder)


def group(root, lines: str, files: dict) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        (
            "4:memory:/\n2:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            3.0,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_a_control_groups_share_is_counted_in_cores(tmp_path, lines, files, cores):
    group(tmp_path, lines, files)
    assert group_cores(tmp_path) == cores


def test_cores_are_no_more_than_affinity_and_control_group_allow(monkeypatch):
    own = len(os.sched_getaffinity(0))
    for share, expected in ((None, own), (0.2, 1), (1e9, own)):
        monkeypatch.setattr("trainer.base.cores.group_cores", lambda: share)
        assert num_cores() == expected
