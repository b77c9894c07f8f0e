"""Orders and indexes of millions of images: what they take in memory, and that they are the orders
they always were; and what a long run leaves, which is as long as a short one's.
"""

import io
import json
import multiprocessing
import pickle
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from support.plans import small_plan
from trainer.base import streams
from trainer.base.settings import make_settings
from trainer.components.crops import RandomResizedCrop
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import FolderSet
from trainer.data.index import ARRAYS, Index, fingerprint_of, stem_of, store_index
from trainer.data.loader import TrainStream
from trainer.data.order import _permutation, micro_batch_ids
from trainer.data.workers import items_of
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.runs.row import make_row


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 70_001])
def test_an_order_is_the_plain_argsort_of_its_keys(size):
    indices = np.stack([np.arange(size), np.full(size, 7)], axis=1)
    high, low = streams.words(5, "order", indices, 2).astype(np.uint64).T
    expected = np.argsort((high << np.uint64(32)) | low, kind="stable")
    found = streams.permutation(5, "order", 7, size)
    assert found.dtype == np.int64 and np.array_equal(found, expected)


@pytest.mark.parametrize("modulus", [1, 7, 2**18, 2**40])
def test_things_whose_keys_share_their_upper_bits_follow_by_the_lower_ones(monkeypatch, modulus):
    def keys(seed, purpose, epoch, index):
        mixed = (index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(17)
        return mixed % np.uint64(modulus) << np.uint64(3)

    monkeypatch.setattr(streams, "_sort_keys", keys)
    size = 40_000  # over the border of two parts
    expected = np.argsort(keys(0, "", 0, np.arange(size)), kind="stable")
    assert np.array_equal(streams.permutation(0, "order", 0, size), expected)


def test_an_epoch_of_millions_takes_15_bytes_an_image_and_no_more_as_it_goes_on():
    num_images, steps = 2_000_000, 1000
    _permutation.cache_clear()
    tracemalloc.start()
    try:
        for step in range(0, steps, 100):
            ids = micro_batch_ids(1, step, 0, num_images, 3, num_images // steps, 2, steps, True)
            assert len(ids) == 1000
            if step == 0:
                now, peak = tracemalloc.get_traced_memory()
                assert peak < 15 * num_images + 2**22  # 200 MiB for 14 million
        assert tracemalloc.get_traced_memory()[0] < now + 2**20 < 5 * num_images + 2**21
    finally:
        tracemalloc.stop()
        _permutation.cache_clear()


def stored_index(folder: Path, num_images: int) -> Index:
    """An index of so many files, which are not there, of one class."""
    name = b"a/00000000.JPEG"
    offsets, labels = np.arange(num_images + 1) * len(name), np.zeros(num_images, np.int32)
    columns = (
        np.tile(np.frombuffer(name, np.uint8), num_images),
        offsets,
        labels,
        np.full(num_images, 9),
    )
    arrays = dict(zip(ARRAYS, columns, strict=True))
    record, fingerprint = folder / "train.json", fingerprint_of(arrays)
    store_index(arrays, {"fingerprint": fingerprint}, record)
    return Index(folder, stem_of(record, fingerprint), ("a",), fingerprint)


def test_an_index_of_many_files_is_mapped_not_read(tmp_path):
    num_images = 300_000
    made = stored_index(tmp_path, num_images)
    tracemalloc.start()
    try:
        index = Index(tmp_path, made.stem_of, ("a",), made.fingerprint)
        index.check()
        copy = pickle.loads(pickle.dumps(index))
        assert (
            copy.path(num_images - 1) == tmp_path / "a/00000000.JPEG"
            and copy.num_images == num_images
        )
        assert tracemalloc.get_traced_memory()[1] < 2**21  # the files are 10 MB
    finally:
        tracemalloc.stop()
    assert len(pickle.dumps(index)) < 2000


MOST_GROWN_MIB = 4.0  # of a worker over an epoch; a million objects touched are 30 and more


@dataclass(frozen=True)
class Unread(FolderSet):
    """The files of an index, each looked up as if it were read, all the same small image."""

    def read(self, i: int) -> Image.Image:
        assert self.index.path(i).suffix == ".JPEG"
        return Image.new("RGB", (8, 8), (int(self.labels[i]), 1, 2))


def own_mib(pid: int) -> dict[str, float]:
    """Memory of a process's own: all that is resident and no file's, and the pages that it has
    written, copies of those that it shared with its parent included.
    """
    found = {}
    for name, word in (("status", "RssAnon:"), ("smaps_rollup", "Private_Dirty:")):
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        found[word] = next(int(line.split()[1]) for line in lines if line.startswith(word)) / 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("every", [50, pytest.param(4, marks=pytest.mark.drill)])
def test_a_workers_memory_is_flat_over_an_epoch_of_a_million(tmp_path, every):
    """A worker of its own process over every so-manieth step of an epoch, from its first to its
    last.
    """
    crop = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 4 / 3), interpolation="bilinear")
    images, steps = Unread(stored_index(tmp_path, 1_000_000)), 1000
    stream = TrainStream(
        images, 0, (crop,), 8, 1, images.num_images // steps, 1, steps, True, "fail"
    )
    keys = [key for key in stream.keys(0, steps) if key[0] % every == 0 or key[0] == steps - 1]
    _permutation.cache_clear()
    others, sizes = set(multiprocessing.active_children()), []
    for number, batch in enumerate(items_of(stream, keys, 1, "cpu")):
        if number == 0:
            (worker,) = set(multiprocessing.active_children()) - others
        assert (batch.step, len(batch.ids)) == (keys[number][0], 1000)
        if worker.is_alive():  # it ends after the last one
            sizes.append(own_mib(worker.pid))
    for kind in sizes[0]:
        held = np.array([size[kind] for size in sizes[1:]])
        first, second = np.triu_indices(len(held), 1)
        # By Theil and Sen's median of slopes: a collector or an allocator that reaches further once
        # is no growth.
        grown = np.median((held[second] - held[first]) / (second - first)) * (len(held) - 1)
        assert grown < MOST_GROWN_MIB, (kind, held[:: max(1, len(held) // 20)])


def test_a_row_and_a_checkpoint_are_as_long_after_more_steps(tmp_path):
    """To the digits of their numbers: a byte for each step would be 20 more."""
    plan, settings = (
        small_plan(overrides="batch.images=8"),
        make_settings("cpu", workers="0", runs=tmp_path),
    )
    data = open_data(plan.profile, None)
    state, lengths = TrainingState(plan, settings), []
    window = data.train_stream(plan, settings, 0)
    for step in range(22):
        state.loss_sum += optimizer_step(state, window, step)
        state.progress.step, state.progress.loss_steps = step + 1, step + 1
        if step in (1, 21):
            saved, outcome = (
                io.BytesIO(),
                SimpleNamespace(state=state, status="diverged", run=SimpleNamespace(curve={})),
            )
            torch.save(state.state_dict(), saved)
            row = make_row("name", plan, settings, data, outcome, None)
            lengths.append(
                (
                    len(row.as_json()),
                    len(json.dumps(asdict(state.progress))),
                    len(saved.getbuffer()),
                )
            )
    assert all(abs(late - early) < 20 for early, late in zip(*lengths, strict=True)), lengths
