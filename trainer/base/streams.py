"""All randomness of a run, as a pure function of (seed, purpose, indices).

Counter-based: a draw is found by its address, never by what was drawn before it. So nothing random
is stored, a run resumed at step k draws what the undisturbed run would have drawn, and workers and
ranks share no state.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

from __future__ import annotations

import hashlib

import numpy as np

# One purpose, one stream. A number here is part of every published run: add, never renumber.
PURPOSES = {
    "order": 1,
    "crop": 2,
    "flip": 3,
    "rand_augment": 4,
    "trivial_augment": 5,
    "erase": 6,
    "mix": 7,
    "weights": 8,
    "device": 9,
    "split": 10,
    "replacement": 11,
    "lighting": 12,
    "export": 13,
    "rate_noise": 14,
    "resize": 15,
    "pad_crop": 16,
    "vertical_flip": 17,
    "color_jitter": 18,
    "grayscale": 19,
    "solarize": 20,
    "gaussian_blur": 21,
    "three_augment": 22,
    "auto_augment": 23,
    "torchvision_auto_augment": 24,
    "torchvision_rand_augment": 25,
    "aug_mix": 26,
    "sampling": 27,
    "sampled_images": 28,
    "hue_jitter": 29,
}


def add_purpose(purpose: str) -> None:
    """A stream for a component from elsewhere; its number, far above those here, depends on its
    name alone.
    """
    digest = hashlib.sha256(purpose.encode()).digest()
    PURPOSES.setdefault(purpose, 2**31 + int.from_bytes(digest[:4], "big") // 2)


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_BLOCKS_PER_CHUNK = 1 << 13  # the temporaries of one chunk stay inside the cache


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of many counters under one key.

    counters: [N, 4] unsigned integers below 2**32. key: two integers below 2**32.
    Gives [N, 4] uint32.
    """
    out = np.empty(counters.shape, dtype=np.uint32)
    for part in _parts(len(counters)):
        out[part].T[...] = _philox(key, *np.array(counters[part].T, dtype=np.uint64, order="C"))
    return out


def _philox(
    key: tuple[int, int], c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same of words that lie apart, each [N] uint64 and changed in place: several times as fast
    as across rows of four.
    """
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIERS[0], out=p0)
        np.multiply(c2, _MULTIPLIERS[1], out=p1)
        for product, other, word, into in ((p1, c1, k0, c0), (p0, c3, k1, c2)):
            np.right_shift(product, _HALF, out=into)
            into ^= other
            into ^= np.uint64(word)
        np.bitwise_and(p1, _LOW, out=c1)
        np.bitwise_and(p0, _LOW, out=c3)
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(seed: int, purpose: str, indices: np.ndarray, num_words: int) -> np.ndarray:
    """Raw random words: row b depends on (seed, purpose, indices[b]) and on nothing else.

    indices: [B] or [B, k] with k <= 3, integers in [0, 2**32). Gives [B, num_words] uint32.

    Raises ValueError for a seed or an index outside [0, 2**32).
    """
    indices = np.asarray(indices)
    if indices.ndim == 1:
        indices = indices[:, None]
    _check_address(seed, indices)
    num_rows, depth = indices.shape
    assert depth <= 3, "a stream has at most three indices"
    num_blocks = -(-num_words // 4)
    counters = np.zeros((num_rows, num_blocks, 4), dtype=np.uint64)
    counters[:, :, 0] = np.arange(num_blocks, dtype=np.uint64)
    counters[:, :, 1 : 1 + depth] = indices.astype(np.uint64)[:, None, :]
    drawn = philox(counters.reshape(-1, 4), (seed, PURPOSES[purpose]))
    return drawn.reshape(num_rows, num_blocks * 4)[:, :num_words]


def _check_address(seed: int, indices: np.ndarray) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0 .. 4294967295")
    if indices.size and (indices.min() < 0 or indices.max() >= 2**32):
        raise ValueError("a stream's index is outside 0 .. 4294967295")


def uniforms(seed: int, purpose: str, indices: np.ndarray, num_draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1): row b depends on (seed, purpose, indices[b]) and on nothing else.

    indices: [B] or [B, k] with k <= 3, integers in [0, 2**32). Gives [B, num_draws] float64,
    multiples of 2**-32.
    """
    return words(seed, purpose, indices, num_draws) * 2.0**-32


def permutation(seed: int, purpose: str, epoch: int, size: int) -> np.ndarray:
    """A uniformly drawn order of `size` things for one epoch: [size] int64.

    By rising 64-bit keys, equal ones by place. Sorted are the keys' upper bits with the places in
    the lower ones, in one array: several times as fast as an argsort, in half of its memory. The
    few whose upper bits are equal follow singly.
    """
    _check_address(seed, np.array([epoch, max(0, size - 1)]))
    place_bits = np.uint64(max(1, (size - 1).bit_length()))
    places = (np.uint64(1) << place_bits) - np.uint64(1)
    order = np.empty(size, dtype=np.uint64)
    for part in _parts(size):
        index = np.arange(part.start, part.stop)
        order[part] = (_sort_keys(seed, purpose, epoch, index) & ~places) | index.astype(np.uint64)
    order.sort()
    tied = [
        part.start + np.flatnonzero((order[part] ^ order[1:][part]) <= places)
        for part in _parts(size - 1)
    ]
    order &= places
    order = order.view(np.int64)
    for run in _runs(np.concatenate(tied) if tied else np.empty(0, np.int64)):
        among = np.sort(order[run])
        order[run] = among[np.argsort(_sort_keys(seed, purpose, epoch, among), kind="stable")]
    return order


def _parts(size: int) -> list[slice]:
    return [
        slice(start, min(start + _BLOCKS_PER_CHUNK, size))
        for start in range(0, size, _BLOCKS_PER_CHUNK)
    ]


def _sort_keys(seed: int, purpose: str, epoch: int, index: np.ndarray) -> np.ndarray:
    """The 64-bit key of each thing: [n] uint64, the two first words at (thing, epoch)."""
    first, second, third, fourth = (
        np.full(len(index), word, np.uint64) for word in (0, 0, epoch, 0)
    )
    second[:] = index
    high, low, *_ = _philox((seed, PURPOSES[purpose]), first, second, third, fourth)
    return (high << _HALF) | low


def _runs(tied: np.ndarray) -> list[slice]:
    """Stretches in which each is tied with the next, given by the positions of the former ones, in
    rising order.
    """
    breaks = np.flatnonzero(np.diff(tied) > 1) + 1
    return [slice(run[0], run[-1] + 2) for run in np.split(tied, breaks) if len(run)]


def torch_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed below 2**63 for one of torch's own generators, from at most three indices."""
    address = np.zeros((1, 3), dtype=np.int64)
    address[0, : len(indices)] = indices
    high, low = (int(word) for word in words(seed, purpose, address, 2)[0])
    return (high << 31) ^ low


def device_normals(keys, which, positions):
    """Standard normal noise made on the device of its arguments, the same numbers on every device
    up to rounding.

    keys: [N] int64 tensor, values below 2**32, one per image. which: [M] int64, places in `keys`.
    positions: [M] int64. Gives [M] float32, number positions[i] of key keys[which[i]], by Box and
    Muller's transform of two hashes of the two.
    """
    import torch  # seconds, which commands without it need not wait for

    # The key enters twice: two keys whose first hashes differ in low bits only visit the same
    # words, in another order.
    state = _mix32(_mix32(keys)[which] ^ positions) + _mix32(keys + 0x85EBCA6B)[which]
    first = (_mix32(state + 0x9E3779B9) + 1).to(
        torch.float32
    ) * 2.0**-32  # in (0, 1]: the logarithm stays finite
    second = _mix32(state + 0x3C6EF372).to(torch.float32) * 2.0**-32
    return torch.sqrt(-2.0 * torch.log(first.clamp_max(1.0))) * torch.cos(2.0 * torch.pi * second)


def _mix32(value):
    """A bijection of 32-bit words held in int64 (lowbias32: Wellons 2018, "Prospecting for hash
    functions").
    """
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)
