"""Settings are resolved against this machine, or refused."""

import pytest
import torch

from trainer.errors import UserError
from trainer.settings import check_loader, check_writable, make_settings, num_cores, worker_count


def test_the_cpu_takes_float32_and_is_bitwise():
    settings = make_settings("cpu")
    assert (settings.device, settings.precision, settings.channels_last, settings.is_bitwise) == ("cpu", "float32", False, True)


def test_a_small_set_in_memory_needs_no_workers():
    assert make_settings("cpu", in_memory=True).num_workers == 0
    assert make_settings("cpu", in_memory=False).num_workers >= 1
    assert make_settings("cpu", workers="3", in_memory=True).num_workers == 3


@pytest.mark.parametrize(
    "asked",
    [{"device": "gpu"}, {"device": "cuda:99"}, {"precision": "half"}, {"workers": "-1"}, {"workers": "1000"}],
    ids=lambda asked: "-".join(asked.values()),
)
def test_what_is_not_there_is_refused_with_what_would_do(asked):
    with pytest.raises(UserError, match="would do"):
        make_settings(**asked)


def test_an_unknown_loader_is_refused():
    check_loader("auto")
    with pytest.raises(UserError, match="torch would do"):
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
    assert (settings.device, settings.precision, settings.channels_last) == (device, precision, True)
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
        with pytest.raises(UserError, match="results: cannot write into .*results=<another folder> would do"):
            check_writable("results", folder)
