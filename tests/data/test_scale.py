"""Orders and indexes of millions of images: what they take in memory, and that they are the orders they always were."""

import pickle
import tracemalloc

import numpy as np
import pytest

from trainer import streams
from trainer.data.index import ARRAYS, Index, fingerprint_of, stem_of, store_index
from trainer.data.order import _permutation, micro_batch_ids


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


def test_an_index_of_many_files_is_mapped_not_read(tmp_path):
    num_images, name = 300_000, b"a/00000000.JPEG"
    offsets, labels = np.arange(num_images + 1) * len(name), np.zeros(num_images, np.int32)
    columns = (np.tile(np.frombuffer(name, np.uint8), num_images), offsets, labels, np.full(num_images, 9))
    arrays = dict(zip(ARRAYS, columns, strict=True))
    record, fingerprint = tmp_path / "train.json", fingerprint_of(arrays)
    store_index(arrays, {"fingerprint": fingerprint}, record)
    del arrays, columns
    tracemalloc.start()
    try:
        index = Index(tmp_path, stem_of(record, fingerprint), ("a",), fingerprint)
        index.check()
        copy = pickle.loads(pickle.dumps(index))
        assert copy.path(num_images - 1) == tmp_path / name.decode() and copy.num_images == num_images
        assert tracemalloc.get_traced_memory()[1] < 2**21  # the files are 10 MB
    finally:
        tracemalloc.stop()
    assert len(pickle.dumps(index)) < 2000
