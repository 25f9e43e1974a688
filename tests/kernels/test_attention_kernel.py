import pytest
import torch
from interpreted import FLOAT_TYPES, assert_as_close_as_torch, poisoned, randn, relative_error

from fastcfg import Error
from fastcfg.kernels import attention as module
from fastcfg.kernels.attention import attention, attention_config, attention_cost, attention_ref, head_parts
from fastcfg.models.dit import Attention

PATHS = (0, 1)


def tiles(descriptors, queries=16, keys=16):
    return {"BLOCK_M": queries, "BLOCK_N": keys, "DESCRIPTORS": descriptors, "num_warps": 4, "num_stages": 2}


def case(R=2, T=9, heads=2, head_dim=72, dtype=torch.float32):
    return randn(R, T, 3 * heads * head_dim, seed=T + head_dim, dtype=dtype), heads


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("descriptors", PATHS)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 48, 64, 72, 80, 96, 112, 128])
def test_head_dims(head_dim, descriptors, dtype):
    qkv, heads = case(T=21, head_dim=head_dim, dtype=dtype)
    got = attention(qkv, heads, out=poisoned(2, 21, heads * head_dim, dtype=dtype), config=tiles(descriptors))
    assert_as_close_as_torch(got, attention_ref(qkv.double(), heads), attention_ref(qkv, heads))


@pytest.mark.parametrize("descriptors", PATHS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 49, 64])
@pytest.mark.parametrize(("R", "heads"), [(1, 1), (3, 3)])
def test_token_counts(T, R, heads, descriptors):
    qkv, _ = case(R=R, T=T, heads=heads)
    got = attention(qkv, heads, out=poisoned(R, T, heads * 72), config=tiles(descriptors, queries=32))
    assert_as_close_as_torch(got, attention_ref(qkv.double(), heads), attention_ref(qkv, heads))


def test_default_tiles():
    qkv, heads = case(T=130)
    assert attention_config(130, 72, torch.float16, "sm_90")["BLOCK_N"] == 64
    assert attention_config(16, 72, torch.float16, "sm_90")["BLOCK_N"] == 16
    got = attention(qkv, heads, out=poisoned(2, 130, 144))
    assert_as_close_as_torch(got, attention_ref(qkv.double(), heads), attention_ref(qkv, heads))


def test_what_is_not_16_byte_aligned_goes_through_pointers(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "launch", lambda *args, **kwargs: seen.append(args[3]["DESCRIPTORS"]))
    qkv, heads = case()
    for one in (qkv, torch.zeros(qkv.numel() + 1)[1:].view_as(qkv)):
        attention(one, heads, config=tiles(1))
    assert seen == [True, False]


def test_large_scores_do_not_overflow():
    qkv, heads = case(T=20)
    qkv[..., :288] *= 30  # scores in the thousands, whose own rounding is 1e-4
    got = attention(qkv, heads, config=tiles(1))
    assert relative_error(got, attention_ref(qkv.double(), heads)) < 1e-3


def test_the_reference_is_the_models_own_arithmetic():
    layer = Attention(144, 2)
    x = randn(2, 9, 144)
    mixed = attention_ref(layer.qkv(x), 2)
    assert torch.allclose(layer.proj(mixed), layer(x), atol=1e-6)


@pytest.mark.parametrize("descriptors", PATHS)
def test_a_row_has_the_same_bits_in_any_batch_and_does_not_see_the_others(descriptors):
    qkv, heads = case(R=4, T=21)
    got = attention(qkv, heads, config=tiles(descriptors))
    for r in range(4):
        assert torch.equal(attention(qkv[r : r + 1], heads, config=tiles(descriptors))[0], got[r])
        others = torch.full_like(qkv, 1e6)
        others[r] = qkv[r]
        assert torch.equal(attention(others, heads, config=tiles(descriptors))[r], got[r])


def test_a_head_does_not_see_the_others():
    """The remainder of a 72-wide head reads 8 columns of the next one unless they are masked."""
    qkv, heads = case(R=1, T=9, heads=3)
    got = attention(qkv, heads, config=tiles(1)).view(9, 3, 72)
    packed = torch.full_like(qkv, 1e6).view(9, 3, 3, 72)
    packed[:, :, 1] = qkv.view(9, 3, 3, 72)[:, :, 1]
    for descriptors in PATHS:
        alone = attention(packed.view(qkv.shape), heads, config=tiles(descriptors)).view(9, 3, 72)
        assert torch.equal(alone[:, 1], got[:, 1])
        assert not torch.equal(alone[:, 0], got[:, 0])


def test_head_parts_are_the_fewest_columns():
    assert head_parts(72) == (64, 16)
    assert head_parts(64) == (64, 0)
    assert head_parts(128) == (128, 0)
    assert head_parts(8) == (16, 0)
    assert head_parts(48) == (32, 16)
    assert head_parts(112) == (64, 64)
    assert head_parts(128, widest=64) == (64, 64)
    assert head_parts(72, widest=64) == (64, 16)
    for head_dim in range(8, 136, 8):
        main, rest = head_parts(head_dim)
        assert head_dim <= main + rest < 2 * max(head_dim, 16)


@pytest.mark.parametrize(
    ("qkv", "heads", "out"),
    [
        (torch.zeros(2, 9, 433), 2, None),
        (torch.zeros(2, 9, 3 * 2 * 136), 2, None),
        (torch.zeros(2, 9, 3 * 2 * 12), 2, None),
        (torch.zeros(9, 432), 2, None),
        (torch.zeros(2, 9, 432), 2, torch.zeros(2, 9, 143)),
        (torch.zeros(2, 9, 432), 2, torch.zeros(2, 9, 144).half()),
    ],
)
def test_refuses_what_does_not_fit(qkv, heads, out):
    with pytest.raises(Error):
        attention(qkv, heads, out=out)


def test_cost_is_the_hand_count():
    """DiT-XL/2, one guided sample in bf16: 16 heads of 72 over 256 tokens."""
    qkv = torch.empty(2, 256, 3 * 1152, dtype=torch.bfloat16)
    assert attention_cost(qkv) == (2 * 2 * 256 * 4 * 1152, 2 * 16 * (2 * 256 * 256 * 72) * 2)
