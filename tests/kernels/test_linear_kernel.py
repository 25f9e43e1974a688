import pytest
import torch
from interpreted import FLOAT_TYPES, assert_as_close_as_torch, poisoned, randn

from fastcfg import Error
from fastcfg.kernels import linear as module
from fastcfg.kernels.linear import linear, linear_config, linear_cost, linear_ref
from fastcfg.models.dit import Mlp

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "DESCRIPTORS": 1, "num_warps": 4, "num_stages": 2}
PATHS = {"descriptors": SMALL, "pointers": SMALL | {"DESCRIPTORS": 0}}


def case(R=3, T=5, K=24, N=40, B=None, gate=False, dtype=torch.float32, residual_dtype=None):
    h, bias = randn(R, T, K, seed=1, dtype=dtype), randn(N, seed=3, dtype=dtype)
    weight = (randn(N, K, seed=2) / K**0.5).to(dtype)
    if not gate:
        return (h, weight, bias), {}
    gating = {
        "residual": randn(B or R, T, N, seed=4, dtype=residual_dtype or dtype),
        "table": randn(7, N + 16, seed=5, dtype=dtype),
        "index": torch.arange(R, dtype=torch.int32) * 2 % 7,
        "gate_column": 16,
    }
    return (h, weight, bias), gating


def double(arguments, options):
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return [a.double() for a in arguments], exact


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("T", "K", "N"), [(1, 8, 8), (5, 24, 40), (17, 40, 72), (32, 64, 96), (7, 33, 50)])
@pytest.mark.parametrize("gelu", [False, True])
def test_bias_and_gelu(T, K, N, gelu, path, dtype):
    arguments, _ = case(T=T, K=K, N=N, dtype=dtype)
    got = linear(*arguments, gelu=gelu, out=poisoned(3, T, N, dtype=dtype), config=PATHS[path])
    exact, _ = double(arguments, {})
    assert_as_close_as_torch(got, linear_ref(*exact, gelu=gelu), linear_ref(*arguments, gelu=gelu))


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("T", [1, 5, 16, 49, 32])
@pytest.mark.parametrize(("R", "B"), [(3, 3), (4, 2), (3, 1)])
def test_gate_and_residual(T, R, B, path, dtype, residual_dtype):
    """16 and 32 tokens are tiles of one sample, with one gate; the others mix samples within a tile."""
    arguments, options = case(R=R, T=T, B=B, gate=True, dtype=dtype, residual_dtype=residual_dtype)
    got = linear(*arguments, **options, out=poisoned(R, T, 40, dtype=residual_dtype), config=PATHS[path])
    exact, exact_options = double(arguments, options)
    assert_as_close_as_torch(got, linear_ref(*exact, **exact_options), linear_ref(*arguments, **options))


@pytest.mark.parametrize("T", [16, 7])
def test_in_place_on_the_residual(T):
    arguments, options = case(T=T, gate=True)
    want = linear(*arguments, **options, config=SMALL)
    residual = options["residual"]
    assert linear(*arguments, **options, out=residual, config=SMALL) is residual
    assert torch.equal(residual, want)


def test_the_reference_is_the_models_own_arithmetic():
    mlp = Mlp(24, 40)
    h = randn(2, 5, 24)
    hidden = linear_ref(h, mlp.fc1.weight, mlp.fc1.bias, gelu=True)
    assert torch.allclose(linear_ref(hidden, mlp.fc2.weight, mlp.fc2.bias), mlp(h), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_has_the_same_bits_in_any_batch(path):
    arguments, options = case(R=6, T=16, gate=True)
    got = linear(*arguments, **options, config=PATHS[path])
    h, *rest = arguments
    for r in range(6):
        alone = options | {"residual": options["residual"][r : r + 1], "index": options["index"][r : r + 1]}
        assert torch.equal(linear(h[r : r + 1], *rest, **alone, config=PATHS[path])[0], got[r])


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_see_its_neighbours(path):
    """With 5 tokens, tiles of 16 rows mix samples; the place in a tile is kept, since NumPy's products depend on it."""
    (h, *rest), options = case(R=6, T=5, gate=True)
    got = linear(h, *rest, **options, config=PATHS[path])
    for r in range(6):
        others = torch.full_like(h, 1e6)
        others[r] = h[r]
        assert torch.equal(linear(others, *rest, **options, config=PATHS[path])[r], got[r])


def test_default_tiles_without_bias_and_of_two_dimensions():
    h, weight = randn(70, 136, seed=1), randn(200, 136, seed=2)
    got = linear(h, weight, out=poisoned(70, 200))
    assert_as_close_as_torch(got, h.double() @ weight.double().T, h @ weight.T)
    assert linear_config(200, torch.float32, "interpreter") == linear_config(200, torch.float32, "sm_90")


def test_descriptors_are_for_targets_that_copy_through_them():
    targets = {"sm_80": 0, "sm_86": 0, "sm_90": 1, "sm_100": 1, "sm_103": 1, "sm_120": 1, "gfx942": 0, "interpreter": 1}
    assert {target: linear_config(200, torch.float16, target)["DESCRIPTORS"] for target in targets} == targets


def test_writes_nothing_beyond_its_rows():
    arguments, _ = case(T=5)
    for config in PATHS.values():
        frame = poisoned(5, 5, 40)
        linear(*arguments, out=frame[1:4], config=config)
        assert frame[[0, 4]].isnan().all()
        assert not frame[1:4].isnan().any()


def test_rows_that_are_not_16_byte_aligned_go_through_pointers(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "launch", lambda *args, **kwargs: seen.append(args[3]["DESCRIPTORS"]))
    for K, N in ((24, 40), (33, 40), (24, 50)):
        linear(*case(K=K, N=N)[0], config=SMALL)
    assert seen == [True, False, False]
    for place in range(2):
        arguments = list(case()[0])
        arguments[place] = torch.zeros(arguments[place].numel() + 1)[1:].view_as(arguments[place])
        linear(*arguments, config=SMALL)
    assert seen[3:] == [False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"h": torch.zeros(3, 5, 23)},
        {"h": torch.zeros(3, 5, 24).half()},
        {"bias": torch.zeros(41)},
        {"residual": torch.zeros(2, 5, 40)},
        {"residual": torch.zeros(3, 4, 40)},
        {"residual": None},
        {"table": None},
        {"index": torch.zeros(2, dtype=torch.int32)},
        {"gate_column": 17},
        {"out": torch.zeros(3, 5, 41)},
        {"weight": torch.zeros(24, 40).T},
    ],
)
def test_refuses_what_does_not_fit(change):
    (h, weight, bias), options = case(gate=True)
    with pytest.raises(Error):
        linear(**{"h": h, "weight": weight, "bias": bias} | options | change)


def test_refuses_a_shared_residual_as_output():
    (h, weight, bias), options = case(R=4, B=2, gate=True)
    out = torch.zeros(4, 5, 40)
    with pytest.raises(Error, match="share"):
        linear(h, weight, bias, **options | {"residual": out[:2]}, out=out)


def test_cost_is_the_hand_count():
    """DiT-XL/2's fc2 over one guided sample in bf16: 512 rows, 4608 to 1152."""
    h, weight = torch.empty(2, 256, 4608, dtype=torch.bfloat16), torch.empty(1152, 4608, dtype=torch.bfloat16)
    residual = torch.empty(2, 256, 1152, dtype=torch.bfloat16)
    moved = 2 * (512 * 4608 + 1152 * 4608 + 1152 + 2 * 512 * 1152)
    assert linear_cost(h, weight, residual=residual, out=residual) == (moved, 2 * 512 * 4608 * 1152)
