import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from fastcfg.errors import Error
from fastcfg.noise import INITIAL_STEP, as_seed, box_muller, normal, philox, philox_normal

PUBLISHED = [  # Random123's kat_vectors: philox4x32 with 10 rounds: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def philox_by_hand(counter, key):
    """Philox4x32-10 in Python's integers, as the paper's figure 1 draws it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def normal_by_hand(seed, index, step, element):
    """Box-Muller in double precision on the words at this address."""
    seed, index = seed % 2**64, index % 2**64
    a, b, _, _ = philox_by_hand([element, step, index % 2**32, index >> 32], [seed % 2**32, seed >> 32])
    u1, u2 = ((word if word < 2**31 else 2**32 - 1 - word) * 4.6566127342e-10 for word in (a, b))
    return math.sqrt(-2 * math.log(max(u1, 1e-7))) * math.cos(2 * math.pi * u2)


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_published_vectors(counter, key, result):
    low, high = words(key)
    assert [int(word) for word in philox(low | high << 32, words(counter))] == words(result)
    assert philox_by_hand(words(counter), words(key)) == words(result)


ADDRESSES = [  # seed, index, step
    (0, 0, 0),
    (1, 2, 3),
    (-1, 0, 1),
    (-(2**63), 7, 1000),
    (2**63 + 12345, 1, 1),
    (2**64 - 2, 2**40 + 5, 2**31 - 1),
    (2**32, 2**63 - 1, 250),
]


@pytest.mark.parametrize(("seed", "index", "step"), ADDRESSES)
def test_normal_is_box_muller_on_the_words_at_its_address(seed, index, step):
    got = normal([as_seed(seed)], [index], step, (3, 5))
    want = [normal_by_hand(seed, index, step, element) for element in range(15)]
    assert got.dtype == torch.float32
    assert got.shape == (1, 3, 5)
    # float32's u2 near 1 moves the angle by up to 2 pi / 2^24, times a radius of at most 5.7
    np.testing.assert_allclose(got.flatten().double().numpy(), want, rtol=0, atol=4e-6)


def test_extreme_words_stay_finite():
    extreme = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    a, b = (grid.reshape(-1) for grid in np.meshgrid(extreme, extreme))
    values = box_muller((a, b, a, b))
    assert np.isfinite(values).all()
    assert np.abs(values).max() == pytest.approx(math.sqrt(-2 * math.log(1e-7)), rel=1e-6)


SEEDS = np.array([5, 5, -9, 2**40 + 1, 5, 0])
INDICES = np.array([0, 1, 0, 3, 2**33, 0])
SHAPE = (4, 7, 3)  # 84 values a row: no multiple of a vector register


@pytest.mark.parametrize("order", [[0], [3], [5, 4, 3, 2, 1, 0], [2, 2, 0], [1, 5]])
def test_bits_do_not_depend_on_the_batch_or_its_order(order):
    everything = normal(SEEDS, INDICES, 4, SHAPE)
    assert torch.equal(normal(SEEDS[order], INDICES[order], 4, SHAPE), everything[order])


def test_rows_may_be_at_steps_of_their_own():
    steps = [4, 0, 9, 4, 1, 2]
    rows = [normal(SEEDS[b : b + 1], INDICES[b : b + 1], step, SHAPE) for b, step in enumerate(steps)]
    assert torch.equal(normal(SEEDS, INDICES, steps, SHAPE), torch.cat(rows))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 33, 63, 100, 1023])
def test_bits_do_not_depend_on_the_shape(count):
    whole = normal([3], [8], 2, (1024,))[0]
    assert torch.equal(normal([3], [8], 2, (count,))[0], whole[:count])
    assert torch.equal(normal([3], [8], 2, (4, 16, 16))[0].flatten(), whole)


def test_64_bits_of_seed_and_index_count():
    def draw(seed, index=0, step=INITIAL_STEP):
        return normal([as_seed(seed)], [index], step, (64,))

    distinct = [draw(seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**62, -1, -(2**63), 2**64 - 2)]
    distinct += [draw(0, index) for index in (1, 2**31, 2**32, 2**32 + 1, 2**62)]
    distinct += [draw(0, 0, step) for step in (1, 2, 2**31 - 1)]
    assert len({tuple(row.flatten().tolist()) for row in distinct}) == len(distinct)
    assert torch.equal(draw(-1), draw(2**64 - 1))  # the same 64 bits
    assert torch.equal(draw(-(2**63)), draw(2**63))


def test_numbers_are_taken_exactly_or_not_at_all():
    """NumPy makes float64 of a list with -1 and 2^63 + 1."""
    mixed = normal([2**63 + 1, -1], [2**63 + 1, -1], 0, (8,))
    each = [normal([number], [number], 0, (8,)) for number in (2**63 + 1, -1)]
    assert torch.equal(mixed, torch.cat(each))
    for name, seeds, indices in (("seeds", [1.5], [0]), ("seeds", [2**64], [0]), ("indices", [0], ["1"])):
        with pytest.raises(Error, match=f"{name} must be whole numbers of up to 64 bits"):
            normal(seeds, indices, 0, (8,))


def test_distribution_is_standard_normal():
    z = normal(np.arange(50), np.arange(50) * 7, 3, (4000,)).double().flatten().numpy()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(scipy.stats.skew(z)) < 4 * math.sqrt(6 / n)
    assert abs(scipy.stats.kurtosis(z)) < 4 * math.sqrt(24 / n)
    assert scipy.stats.kstest(z, "norm").pvalue > 0.01


@pytest.mark.parametrize(
    "streams",
    [
        [(seed, 0, 0) for seed in range(24)],
        [(0, index, 0) for index in range(24)],
        [(0, 0, step) for step in range(24)],
        [(0, 0, 0), (2**32, 0, 0), (0, 2**32, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)],
    ],
    ids=["seeds", "indices", "steps", "mixed"],
)
def test_neighbouring_streams_are_independent(streams):
    n = 8192
    z = np.concatenate([normal([seed], [index], step, (n,)).double().numpy() for seed, index, step in streams])
    for lag in (0, 1):  # against each other, and shifted by one element
        correlation = z[:, : n - lag] @ z[:, lag:].T / n
        if lag == 0:
            np.fill_diagonal(correlation, 0.0)
        assert np.abs(correlation).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("value", "seed"),
    [
        (0, 0),
        (-1, -1),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (np.int32(7), 7),
        (np.uint64(2**64 - 1), -1),
        (torch.tensor(9), 9),
        (2**64, None),
        (-(2**63) - 1, None),
        (True, None),
        (torch.tensor(True), None),
        (1.0, None),
        ("1", None),
        (None, None),
        (torch.tensor([1, 2]), None),
    ],
)
def test_as_seed(value, seed):
    assert as_seed(value) == seed


RANDN = """
import sys
import numpy as np, torch, triton, triton.language as tl

@triton.jit
def draw(out, seed, first, SIZE: tl.constexpr):
    element = tl.arange(0, SIZE)
    tl.store(out + element, tl.randn(tl.load(seed), tl.load(first) + element))

rows = []
for seed, first in zip(map(int, sys.argv[2].split(",")), map(int, sys.argv[3].split(","))):
    out = torch.full((512,), float("nan"))
    draw[(1,)](out, torch.tensor([seed]), torch.tensor([first]), SIZE=512)
    rows.append(out.numpy())
np.save(sys.argv[1], np.stack(rows))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_philox_normal_is_tl_randn_to_the_bit(tmp_path):
    seeds = [0, 1, 42, 2**45 + 11, -3, -(2**63), 2**63 - 1]
    firsts = [0, 512, 2**31 - 256, 2**32 - 100, 2**33 + 7, 5, 0]  # 64-bit offsets that cross 2^31 and 2^32
    script, result = tmp_path / "randn.py", tmp_path / "randn.npy"
    script.write_text(RANDN)
    # The interpreter has to be chosen before triton is imported, hence a process of its own.
    lists = [",".join(map(str, values)) for values in (seeds, firsts)]
    done = subprocess.run(
        [sys.executable, str(script), str(result), *lists],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(result)
    for k, (seed, first) in enumerate(zip(seeds, firsts, strict=True)):
        ours = philox_normal(seed, first + np.arange(512))
        assert (ours.view(np.uint32) == drawn[k].view(np.uint32)).all(), (seed, first)
    # the 64-bit offset is (element, step): what `normal` draws for index 0 is a part of the same stream
    assert (normal([42], [0], 3, (512,))[0].numpy() == philox_normal(42, 3 * 2**32 + np.arange(512))).all()
