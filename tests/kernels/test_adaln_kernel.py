import pytest
import torch
from interpreted import assert_as_close_as_torch, poisoned, randn, relative_error

from fastcfg import Error
from fastcfg.kernels.adaln import adaln, adaln_cost, adaln_ref
from fastcfg.models.dit import modulate


def case(B=2, R=2, T=5, D=72, G=7, dtype=torch.float32, table_dtype=None):
    x = randn(B, T, D, seed=1, dtype=dtype) * 3 + 1
    table = randn(G, 4 * D, seed=2, dtype=table_dtype or dtype)
    return x, table, torch.arange(R, dtype=torch.int32) * 3 % G, D, 3 * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("B", "R", "T", "D"), [(1, 1, 1, 16), (2, 4, 7, 72), (3, 3, 9, 128), (1, 2, 33, 384), (2, 6, 3, 1152)])
def test_agrees_with_the_reference(B, R, T, D, dtype):
    arguments = case(B, R, T, D, dtype=dtype)
    x, table, index, shift, scale = arguments
    got = adaln(*arguments, out=poisoned(R, T, D, dtype=dtype))
    exact = adaln_ref(x.double(), table.double(), index, shift, scale)
    assert_as_close_as_torch(got, exact, adaln_ref(*arguments))


def test_the_reference_is_the_models_own_arithmetic():
    x, table, index, shift, scale = case(R=4)
    norm = torch.nn.LayerNorm(72, elementwise_affine=False, eps=1e-6)
    rows = table[index.long()]
    want = modulate(norm(torch.cat([x, x])), rows[:, 72:144], rows[:, 216:288])
    assert torch.allclose(adaln_ref(x, table, index, shift, scale), want, atol=1e-6)


def test_far_from_zero_and_other_eps():
    """A mean 1,000 times the spread: one pass over sums of squares would lose every digit of the variance."""
    x, table, index, shift, scale = case()
    x = 3e-3 * x + 3
    got = adaln(x, table, index, shift, scale, eps=1e-5)
    assert relative_error(got, adaln_ref(x.double(), table.double(), index, shift, scale, eps=1e-5)) < 2e-4
    assert relative_error(got, adaln_ref(x.double(), table.double(), index, shift, scale, eps=1e-4)) > 1e-2


def test_a_row_has_the_same_bits_in_any_batch():
    x, table, index, shift, scale = case(B=3, R=6, T=11, D=200)
    got = adaln(x, table, index, shift, scale)
    for r in range(6):
        alone = adaln(x[r % 3 : r % 3 + 1], table, index[r : r + 1], shift, scale)
        assert torch.equal(alone[0], got[r])


def test_mixed_dtypes_and_neighbours_untouched():
    arguments = case(B=2, R=4, table_dtype=torch.bfloat16)
    frame = poisoned(6, 5, 72, dtype=torch.float16)
    adaln(*arguments, out=frame[1:5])
    assert frame[[0, 5]].isnan().all()
    assert torch.allclose(frame[1:5].float(), adaln_ref(*arguments), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "change", [{"shift_column": -1}, {"scale_column": 217}, {"index": torch.zeros(3, dtype=torch.int32)},
               {"index": torch.zeros(3, dtype=torch.int32), "out": None},
               {"index": torch.zeros(2)}, {"x": torch.zeros(2, 5, 71)}, {"table": torch.zeros(7, 288).int()},
               {"table": torch.zeros(7, 288, device="meta")},
               {"out": torch.zeros(2, 5, 73)}],
)  # fmt: skip
def test_refuses_what_does_not_fit(change):
    names = ("x", "table", "index", "shift_column", "scale_column")
    arguments = dict(zip(names, case(), strict=True)) | {"out": torch.zeros(2, 5, 72)} | change
    with pytest.raises(Error):
        adaln(**arguments)


def test_cost_is_the_hand_count():
    """DiT-S/2, one guided sample in bf16: 256 tokens of width 384, x shared by both halves."""
    x = torch.empty(1, 256, 384, dtype=torch.bfloat16)
    table, index = torch.empty(4, 6 * 384, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    cost = adaln_cost(x, table, index, out=torch.empty(2, 256, 384, dtype=torch.bfloat16))
    assert cost == (2 * 256 * 384 * (1 + 2) + 2 * 2 * 2 * 384, 8 * 2 * 256 * 384)
