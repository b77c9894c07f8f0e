"""Every test runs on one thread and writes nowhere but its own folder."""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # also for the processes that tests start, and whatever a cluster has set
)

os.environ["RSB_CALLED_AS"] = "make"  # committed tables name commands as `make table` does

import hypothesis
import pytest
import torch
from PIL import Image

from support import gpu_stub as pretended
from support.committed import committed_root
from support.gpu_stub import gpu_stub  # noqa: F401  fixtures of every folder
from support.studies import page, study  # noqa: F401
from trainer.base import provenance

torch.set_num_threads(1)
# recipes and ablations that a user has written beside the project's are not its own
provenance.SHIPPED_ROOT = committed_root()
# the same examples each time, as long as they take on a busy machine
hypothesis.settings.register_profile("rsb", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("rsb")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Indexes of image folders are cached per user: tests get a user of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _own_words(monkeypatch):
    """Neither colours for a terminal nor a cluster come from whoever starts the tests."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


# Where the picture of a run's first batch is itself looked at; elsewhere it is most of a second of
# a run of two.
_DRAWING = ("test_story", "test_channels")


@pytest.fixture(autouse=True, scope="module")
def _small_picture(request):
    """A run's first batch is drawn as two pixels."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in _DRAWING:
            patch.setattr(
                "trainer.runs.run.draw_first_batch",
                lambda path, *_: Image.new("RGB", (2, 2)).save(path),
            )
        yield


# Begun first, so that at the end no worker is left alone with them.
_LONG = (
    "test_gpu_stub",
    "test_resume",
    "test_story",
    "test_cli",
    "test_range_test",
    "test_statistics",
    "test_verify",
    "test_inject",
)


def pytest_collection_modifyitems(config, items):
    """The files whose tests start processes and train come first; the order is otherwise kept.

    Tests for any GPU are left to test_gpu_stub.py where there is none.
    """
    items.sort(key=lambda item: item.path.stem not in _LONG)
    left_out = [item for item in items if _needs_more_gpus(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _needs_more_gpus(item) -> bool:
    marker = item.get_closest_marker("gpu_stub")
    return marker is not None and torch.cuda.device_count() < marker.kwargs.get("devices", 1)


def pytest_runtest_setup(item):
    """A test of values wants a GPU that computes."""
    if item.get_closest_marker("gpu") and (not torch.cuda.is_available() or pretended.is_loaded()):
        pytest.skip("needs a GPU")
