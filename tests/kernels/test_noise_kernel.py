import pytest
import torch
import triton
import triton.language as tl
from interpreted import poisoned

from fastcfg import Error
from fastcfg.kernels.noise import noise, noise_ref, normal_at
from fastcfg.noise import normal

SEEDS = torch.tensor([0, 5, 2**40 + 3, -7, -(2**63)])
INDICES = torch.tensor([0, 2**31, 2**33 + 1, 9, 2**63 - 1])


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 1023), (4, 32, 16)])
@pytest.mark.parametrize("step", [0, 1, 250, 2**31 - 1])
def test_bits_equal_the_numpy_stream(shape, step):
    out = noise(SEEDS, INDICES, step, out=poisoned(5, *shape))
    assert torch.equal(out, normal(SEEDS.numpy(), INDICES.numpy(), step, shape))


@triton.jit
def _both(ours, theirs, seed, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    zero = tl.load(seed) * 0
    tl.store(ours + element, normal_at(tl.load(seed), zero, zero.to(tl.int32), element))
    tl.store(theirs + element, tl.randn(tl.load(seed), element))


@pytest.mark.parametrize("seed", [0, 42, 2**45 + 11, -3])
def test_step_0_of_index_0_is_tl_randn(seed):
    ours, theirs = poisoned(512), poisoned(512)
    _both[(1,)](ours, theirs, torch.tensor([seed]), BLOCK=512)
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.5


def test_scale_multiplies_and_the_reference_is_the_same_function():
    out = noise(SEEDS, INDICES, 3, out=poisoned(5, 2, 100), scale=14.5)
    assert torch.equal(out, noise_ref(SEEDS, INDICES, 3, out=poisoned(5, 2, 100), scale=14.5))
    assert torch.equal(out, 14.5 * normal(SEEDS.numpy(), INDICES.numpy(), 3, (2, 100)))


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": SEEDS[:4]},
        {"indices": INDICES.int()},
        {"out": torch.empty(5, 3, dtype=torch.float16)},
        {"out": torch.empty(5)},
        {"step": -1},
        {"step": 2**31},
    ],
)
def test_refuses_what_does_not_fit(change):
    arguments = {"seeds": SEEDS, "indices": INDICES, "step": 0, "out": torch.empty(5, 3)} | change
    with pytest.raises(Error):
        noise(**arguments)


def test_refuses_more_elements_than_the_counter_has():
    one = torch.empty(1, dtype=torch.int64, device="meta")
    with pytest.raises(Error, match="32-bit element counter, got 4294967296 elements"):
        noise(one, one, 0, out=torch.empty(1, 2**32, device="meta"))
