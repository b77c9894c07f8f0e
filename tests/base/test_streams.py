"""The streams against Random123's published answers and against what uniform and independent mean."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.base import streams

WORD = st.integers(0, 2**32 - 1)


def philox_by_hand(counter, key):
    """Philox4x32-10 of one counter in Python's own integers, straight from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right % 2**32,
            (left >> 32) ^ c3 ^ k1,
            left % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert [f"{word:08x}" for word in streams.philox(np.array([counter]), key)[0]] == answer.split()


@settings(max_examples=50)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), st.tuples(WORD, WORD))
def test_philox_equals_the_paper_for_any_counters(counters, key):
    assert streams.philox(np.array(counters), key).tolist() == [
        philox_by_hand(counter, key) for counter in counters
    ]


def test_chunks_leave_no_seam():
    size = 2 * streams._BLOCKS_PER_CHUNK + 3
    counters = np.arange(size)[:, None] * np.array([1, 2, 3, 4])
    picked = [0, streams._BLOCKS_PER_CHUNK - 1, streams._BLOCKS_PER_CHUNK, size - 1]
    whole = streams.philox(counters, (5, 6))
    assert whole[picked].tolist() == [
        philox_by_hand([row, 2 * row, 3 * row, 4 * row], (5, 6)) for row in picked
    ]


@settings(max_examples=50)
@given(
    WORD,
    st.lists(st.tuples(WORD, WORD, WORD), min_size=1, max_size=20),
    st.integers(1, 9),
    st.randoms(),
)
def test_a_row_depends_on_its_own_address_only(seed, ids, num_draws, random):
    whole = streams.uniforms(seed, "crop", np.array(ids), num_draws)
    order = random.sample(range(len(ids)), len(ids))
    assert (streams.uniforms(seed, "crop", np.array(ids)[order], num_draws) == whole[order]).all()
    for row, address in enumerate(ids):
        alone = streams.uniforms(seed, "crop", np.array([address]), num_draws + 3)[0, :num_draws]
        assert (alone == whole[row]).all()


def test_every_part_of_an_address_matters():
    base = streams.words(1, "crop", np.array([[2, 3, 4]]), 4)
    for seed, purpose, index in [
        (2, "crop", [2, 3, 4]),
        (1, "flip", [2, 3, 4]),
        (1, "crop", [5, 3, 4]),
        (1, "crop", [2, 5, 4]),
        (1, "crop", [2, 3, 5]),
        (1, "crop", [3, 2, 4]),
    ]:
        assert not np.isin(streams.words(seed, purpose, np.array([index]), 4), base).any()


def test_purposes_have_numbers_of_their_own():
    assert len(set(streams.PURPOSES.values())) == len(streams.PURPOSES)


@pytest.mark.parametrize("vary", [0, 1, 2], ids=["epoch", "sample", "repeat"])
def test_draws_are_uniform_and_unrelated(vary):
    """Along each index in turn: 16 bins by chi-square, and each draw with the next draw and the
    next row.
    """
    ids = np.full((40_000, 3), 7)
    ids[:, vary] = np.arange(len(ids))
    draws = streams.uniforms(0, "rand_augment", ids, 6)
    assert draws.min() >= 0 and draws.max() < 1
    bins = (draws * 16).astype(int)
    for column in range(6):
        assert stats.chisquare(np.bincount(bins[:, column], minlength=16)).pvalue > 1e-4
    for first, second in [
        (bins[:, 0], bins[:, 1]),
        (bins[:, 3], bins[:, 4]),
        (bins[:-1, 5], bins[1:, 5]),
    ]:
        assert stats.chisquare(np.bincount(first * 16 + second, minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_addresses_outside_32_bits_are_refused(seed, index):
    with pytest.raises(ValueError, match=r"outside 0 \.\. 4294967295"):
        streams.uniforms(seed, "crop", np.array([index]), 1)


@settings(max_examples=30)
@given(WORD, st.integers(0, 1000), st.integers(0, 300))
def test_a_permutation_holds_each_thing_once(seed, epoch, size):
    assert sorted(streams.permutation(seed, "order", epoch, size)) == list(range(size))


def test_permutations_differ_by_epoch_seed_and_purpose():
    orders = [
        tuple(streams.permutation(*address, 50))
        for address in [(0, "order", 0), (0, "order", 1), (1, "order", 0), (0, "split", 0)]
    ]
    assert len(set(orders)) == 4


def test_all_permutations_of_four_are_equally_likely():
    orders = [tuple(streams.permutation(0, "order", epoch, 4)) for epoch in range(2400)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4


def test_torch_seeds_fit_and_differ():
    seeds = {
        streams.torch_seed(0, "device", step, micro) for step in range(300) for micro in range(4)
    }
    assert len(seeds) == 1200 and min(seeds) >= 0 and 2**62 < max(seeds) < 2**63
    assert streams.torch_seed(0, "weights") == streams.torch_seed(0, "weights", 0, 0, 0)
    torch.Generator().manual_seed(max(seeds))


def device_noise(keys, *shape):
    """Noise of one shape for each key: [N, *shape]."""
    size = math.prod(shape)
    which = torch.arange(len(keys)).repeat_interleave(size)
    return streams.device_normals(keys, which, torch.arange(size).repeat(len(keys))).view(
        -1, *shape
    )


def test_device_noise_is_standard_normal():
    noise = device_noise(torch.arange(64), 3, 32, 32)
    assert noise.shape == (64, 3, 32, 32) and noise.dtype == torch.float32
    flat = noise.double().flatten().numpy()  # 196,608 numbers: the bounds are four standard errors
    assert abs(flat.mean()) < 0.009 and abs(flat.var() - 1) < 0.013
    assert abs((flat**3).mean()) < 0.035 and abs((flat**4).mean() - 3) < 0.09
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert np.isfinite(flat).all() and 4 < np.abs(flat).max() < 6.7


@pytest.mark.parametrize("between", ["pixels", "images"])
def test_device_noise_is_unrelated(between):
    num_images, num_pixels = (40, 4000) if between == "images" else (4000, 40)
    noise = device_noise(torch.arange(num_images), num_pixels)
    related = np.corrcoef(noise.double().numpy(), rowvar=between == "images")
    assert related.shape == (40, 40)
    assert np.abs(related[np.triu_indices(40, 1)]).max() < 4.5 / np.sqrt(4000)


def test_device_noise_of_an_image_depends_on_its_own_key_only():
    keys = torch.tensor([5, 2**32 - 1, 77])
    noise = device_noise(keys, 3, 8, 8)
    assert torch.equal(device_noise(keys[1:2], 3, 8, 8)[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_no_image_has_another_images_noise_in_another_order():
    """Sums of whole numbers do not depend on the order: among 33 million pairs none may agree."""
    noise = device_noise(torch.arange(8192), 256)
    sums = (noise.double() * 2**30).long().sum(dim=1)
    assert len(sums.unique()) == len(sums)
