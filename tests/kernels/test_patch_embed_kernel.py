import pytest
import torch
from interpreted import FLOAT_TYPES, assert_as_close_as_torch, poisoned, randn

from fastcfg import DiT, Error
from fastcfg.kernels.patch_embed import patch_columns, patch_embed, patch_embed_cost, patch_embed_ref

SMALL = {"TOKENS": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}


def case(B=2, C=4, H=6, W=8, p=2, D=40, dtype=torch.float32):
    weight, bias = randn(D, C, p, p, seed=1, dtype=dtype), randn(D, seed=2, dtype=dtype)
    return randn(B, C, H, W, seed=3), weight, bias, randn(H * W // p**2, D, seed=4, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    ("B", "C", "H", "W", "p", "D"),
    [(1, 4, 2, 2, 2, 16), (2, 3, 6, 10, 2, 40), (3, 1, 28, 28, 4, 128), (1, 4, 8, 16, 8, 24), (2, 1, 5, 5, 1, 33)],
)
def test_agrees_with_the_reference(B, C, H, W, p, D, dtype):
    arguments = case(B, C, H, W, p, D, dtype)
    got = patch_embed(*arguments, out=poisoned(B, H * W // p**2, D, dtype=dtype), config=SMALL)
    x, *weights = arguments
    exact = patch_embed_ref(x.to(dtype).double(), *(w.double() for w in weights))
    assert_as_close_as_torch(got, exact, patch_embed_ref(*arguments))


def test_the_reference_is_the_models_own_arithmetic():
    model = DiT(input_size=8, patch_size=2, hidden_size=48, depth=1, num_heads=2)
    x, proj = randn(2, 4, 8, 8), model.x_embedder.proj
    want = model.x_embedder(x) + model.pos_embed
    assert torch.allclose(patch_embed_ref(x, proj.weight, proj.bias, model.pos_embed[0]), want, atol=1e-6)
    x, *low = case(dtype=torch.float16)  # the model's first operation is to round x
    assert torch.equal(patch_embed_ref(x, *low), patch_embed_ref(x.half(), *low))


def test_a_row_has_the_same_bits_in_any_batch_and_the_default_tiles_agree():
    x, *weights = case(B=3)
    got = patch_embed(x, *weights, out=poisoned(3, 12, 40))
    for b in range(3):
        assert torch.equal(patch_embed(x[b : b + 1], *weights)[0], got[b])
    assert torch.allclose(got, patch_embed_ref(x, *weights), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 4, 6, 8).half()},
        {"weight": torch.zeros(40, 3, 2, 2)},
        {"weight": torch.zeros(40, 4, 4, 4)},
        {"weight": torch.zeros(40, 4, 2, 4)},
        {"weight": torch.zeros(40, 4, 0, 0)},
        {"bias": torch.zeros(39)},
        {"position": torch.zeros(11, 40)},
        {"out": torch.zeros(2, 12, 41)},
    ],
)
def test_refuses_what_does_not_fit(change):
    names = ("x", "weight", "bias", "position")
    with pytest.raises(Error):
        patch_embed(**dict(zip(names, case(), strict=True)) | change)


@pytest.mark.parametrize(("channels", "patch", "columns"), [(1, 2, 16), (4, 2, 16), (5, 2, 32), (3, 4, 64), (4, 4, 64)])
def test_columns_are_a_power_of_two_that_products_take(channels, patch, columns):
    assert patch_columns(channels, patch, 64) == columns


def test_refuses_patches_too_large_for_a_tile():
    with pytest.raises(Error, match="up to 256 values"):
        patch_embed(*case(C=5, H=8, W=8, p=8))


def test_cost_is_the_hand_count():
    """DiT-XL/2 at 256 px, one sample: 256 tokens of 16 values to 1152."""
    x, weight = torch.empty(1, 4, 32, 32), torch.empty(1152, 4, 2, 2, dtype=torch.bfloat16)
    position, out = (torch.empty(*s, 1152, dtype=torch.bfloat16) for s in ((256,), (1, 256)))
    moved = 4 * 4096 + 2 * (1152 * 16 + 1152 + 256 * 1152 + 256 * 1152)
    assert patch_embed_cost(x, weight, position, out=out) == (moved, 256 * 1152 * (2 * 16 + 2))
