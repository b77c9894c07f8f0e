"""Settings are resolved against this machine, or refused."""

import pytest

from trainer.errors import UserError
from trainer.settings import check_loader, make_settings


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
