"""`step_boundary` against the chain that it fuses, and that chain against the model's own last and first layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_as_close_as_torch, poisoned, randn, relative_error

from fastcfg import DiT, Error, Guidance, Interval, make_plan, schedule
from fastcfg.kernels._step import step_table
from fastcfg.kernels.guided_step import guided_step_ref
from fastcfg.kernels.step_boundary import step_boundary, step_boundary_cost, step_boundary_ref

LINEAR = schedule("linear")
INTERVAL = Guidance(interval=Interval(300, 1000))
PLANS = {
    "ddim": make_plan(LINEAR, steps=5, guidance=INTERVAL),
    "ddim-eta-clip": make_plan(LINEAR, steps=5, eta=0.8, clip=True),
    "ddpm-learned": make_plan(LINEAR, steps=5, solver="ddpm", variance="learned_range", guidance=INTERVAL),
    "dpmpp": make_plan(LINEAR, steps=5, solver="dpmpp_2m", spacing="leading", clip=True),
}
SMALL = {"TOKENS": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}


def case(plan, B=2, C=4, H=6, W=8, p=2, D=40, halves=2, wide=True, dtype=torch.float32, seed=0):
    """(positional arguments, options) of a step of `plan`, every row at a step of its own."""
    channels, T, rows = (2 * C if wide else C), H * W // p**2, halves * B
    arguments = {
        "h": randn(rows, T, D, seed=seed + 1, dtype=dtype) + 1,
        "table": randn(7, 3 * D, seed=seed + 2, dtype=dtype),
        "index": torch.arange(rows, dtype=torch.int32) * 3 % 7,
        "shift_column": 2 * D,
        "scale_column": D // 2,
        "weight": (randn(p * p * channels, D, seed=seed + 3) / D**0.5).to(dtype),
        "bias": randn(p * p * channels, seed=seed + 4, dtype=dtype),
        "x": randn(B, C, H, W, seed=seed + 5),
        "coef": step_table(plan),
        "scale": torch.rand(plan.steps, B, generator=torch.Generator().manual_seed(seed)) * 4 + 1,
        "step": torch.arange(B, dtype=torch.int32) * 2 % plan.steps,
    }
    arguments["scale"][:, 0] = 1.0
    embedding = {
        "embed_weight": randn(D, C, p, p, seed=seed + 6, dtype=dtype),
        "embed_bias": randn(D, seed=seed + 7, dtype=dtype),
        "position": randn(T, D, seed=seed + 8, dtype=dtype),
    }
    options = {"patch": p, "clip": plan.clip, "learned": plan.learned_variance} | embedding
    if plan.needs_noise:
        options |= {"seeds": torch.arange(B) - 1, "indices": torch.arange(B) * 2**33}
    return arguments, options, (B, T, D)


def double(values):
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in ("coef", "scale") else v
        for k, v in values.items()
    }


def run(function, arguments, options, tokens, history, **more):
    x0_prev = None if history is None else history.clone()
    out = function(**arguments, **options, tokens=tokens, x0_prev=x0_prev, **more)
    return out, tokens, x0_prev


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(PLANS)),
    sizes=st.sampled_from([(1, 1, 2, 2, 2), (2, 4, 6, 8, 2), (3, 3, 4, 4, 1), (2, 1, 12, 8, 4), (1, 4, 10, 10, 2)]),
    halves=st.sampled_from([1, 2]),
    channels=st.sampled_from([None, 1, 3]),
    D=st.sampled_from([16, 40, 50]),
    seed=st.integers(0, 1000),
)
def test_every_path_agrees_with_the_chain_it_fuses(name, sizes, halves, channels, D, seed):
    plan, (B, C, H, W, p) = PLANS[name], sizes
    arguments, options, shape = case(plan, B, C, H, W, p, D, halves, wide=plan.learned_variance, seed=seed)
    options["channels"] = channels if channels is not None and channels <= C else None
    history = randn(B, C, H, W, seed=9) if plan.needs_history else None
    got = run(step_boundary, arguments, options, poisoned(*shape), history, out=poisoned(B, C, H, W), config=SMALL)
    want = run(
        step_boundary_ref, double(arguments), double(options), poisoned(*shape, dtype=torch.float64),
        None if history is None else history.double(),
    )  # fmt: skip
    # x0 = (x - sigma eps) / alpha, which the history keeps, magnifies rounding 160 times at the noisiest step
    for mine, exact in zip(got, want, strict=True):
        assert exact is None or relative_error(mine, exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_low_precision_errs_no_more_than_torch(name, dtype):
    plan = PLANS[name]
    arguments, options, shape = case(plan, dtype=dtype)
    history = randn(2, 4, 6, 8, seed=9) if plan.needs_history else None
    got = run(step_boundary, arguments, options, poisoned(*shape, dtype=dtype), history, config=SMALL)
    low = run(step_boundary_ref, arguments, options, poisoned(*shape, dtype=dtype), history)
    exact = run(
        step_boundary_ref, double(arguments), double(options), poisoned(*shape, dtype=torch.float64),
        None if history is None else history.double(),
    )  # fmt: skip
    eps = torch.finfo(dtype).eps  # of the products' operands, which x' itself does not show
    assert relative_error(got[0], exact[0]) < max(4 * eps, 2 * relative_error(low[0], exact[0]))
    assert_as_close_as_torch(got[1].to(dtype), exact[1], low[1])


def test_the_reference_is_the_models_own_last_and_first_layers():
    """One guided step of a DiT: the blocks' output through `step_boundary_ref`, against the model's own modules."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, hidden_size=48, depth=1, num_heads=2).eval()
    for parameter in model.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    h, c, x = randn(4, 16, 48), randn(4, 48, seed=1), randn(2, 4, 8, 8, seed=2)
    plan, scale, step = PLANS["ddpm-learned"], torch.full((5, 2), 3.0), torch.tensor([0, 1], dtype=torch.int32)
    noise = randn(5, 2, 4, 8, 8, seed=3)
    options = {"learned": True, "channels": 3, "noise": noise}
    proj, last, tokens = model.x_embedder.proj, model.final_layer, poisoned(2, 16, 48)
    with torch.no_grad():
        model_out = model.unpatchify(last(h, c))
        want = guided_step_ref(model_out, x, step_table(plan), scale, step, **options)
        got = step_boundary_ref(
            h, last.adaLN_modulation(c), torch.arange(4, dtype=torch.int32), 0, 48, last.linear.weight, last.linear.bias,
            x, step_table(plan), scale, step, patch=2, **options, embed_weight=proj.weight, embed_bias=proj.bias,
            position=model.pos_embed[0], tokens=tokens,
        )  # fmt: skip
        assert relative_error(got, want) < 1e-6
        assert relative_error(tokens, model.x_embedder(want) + model.pos_embed) < 1e-6


def test_a_sample_has_the_same_bits_in_any_batch():
    plan = PLANS["ddpm-learned"]
    arguments, options, shape = case(plan, B=3)
    got, tokens, _ = run(step_boundary, arguments, options, poisoned(*shape), None, config=SMALL)
    for b in range(3):
        rows = [b, b + 3]
        one = arguments | {name: arguments[name][rows] for name in ("h", "index")}
        one |= {"x": arguments["x"][b : b + 1], "step": arguments["step"][b : b + 1]}
        one["scale"] = arguments["scale"][:, b : b + 1].contiguous()
        few = options | {name: options[name][b : b + 1] for name in ("seeds", "indices")}
        alone, alone_tokens, _ = run(step_boundary, one, few, poisoned(1, *shape[1:]), None, config=SMALL)
        assert torch.equal(alone[0], got[b])
        assert torch.equal(alone_tokens[0], tokens[b])


def test_scale_1_is_the_conditional_prediction_to_the_bit():
    arguments, options, shape = case(PLANS["ddpm-learned"])
    halves = {name: arguments[name][:2] for name in ("h", "index")}
    arguments["scale"].fill_(1.0)
    arguments["h"][2:] = 1e6
    got, tokens, _ = run(step_boundary, arguments, options, poisoned(*shape), None, config=SMALL)
    want, want_tokens, _ = run(step_boundary, arguments | halves, options, poisoned(*shape), None, config=SMALL)
    assert torch.equal(got, want)
    assert torch.equal(tokens, want_tokens)


def test_tokens_without_variance_stay_finite():
    """Of some, the mean of the squares rounds to less than the square of the mean."""
    arguments, options, shape = case(PLANS["ddpm-learned"])
    arguments["h"][:] = 1e3 * randn(4, 12, 1)
    got, tokens, _ = run(step_boundary, arguments, options, poisoned(*shape), None, config=SMALL)
    assert got.isfinite().all()
    assert tokens.isfinite().all()


def test_last_step_in_place_and_default_tiles():
    """Without `tokens` only x' is written; x itself may receive it."""
    plan = PLANS["ddim"]
    arguments, _options, _ = case(plan, H=18, W=16)
    plain = {"patch": 2, "clip": False}
    want = step_boundary_ref(**double(arguments), **plain)
    got = step_boundary(**arguments, **plain, out=arguments["x"])
    assert got is arguments["x"]
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"h": torch.zeros(3, 12, 40)},
        {"h": torch.zeros(4, 11, 40)},
        {"index": torch.zeros(2, dtype=torch.int32)},
        {"shift_column": 81},
        {"weight": torch.zeros(31, 40)},
        {"weight": torch.zeros(33, 40), "bias": torch.zeros(33)},
        {"weight": torch.zeros(20, 40), "bias": torch.zeros(20)},
        {"patch": 5},
        {"channels": 5},
        {"channels": 0},
        {"step": torch.zeros(2, dtype=torch.int64)},
        {"tokens": None},
        {"embed_weight": torch.zeros(40, 4, 1, 1), "position": torch.zeros(48, 40)},
        {"tokens": torch.zeros(2, 12, 41)},
        {"out": torch.zeros(2, 4, 6, 6)},
    ],
)
def test_refuses_what_does_not_fit(change):
    arguments, options, shape = case(PLANS["ddim"])
    with pytest.raises(Error):
        step_boundary(**arguments | options | {"tokens": poisoned(*shape)} | change)


def test_refuses_patches_too_large_for_a_tile():
    arguments, _, _ = case(PLANS["ddim"], H=16, W=16, p=8)
    with pytest.raises(Error, match="up to 64 values"):
        step_boundary(**arguments, patch=8)


def test_cost_is_the_hand_count():
    """DiT-XL/2 at 256 px, one guided sample in bf16, learned variance: 16 values a token each of eps and v."""
    h, weight = torch.empty(2, 256, 1152, dtype=torch.bfloat16), torch.empty(32, 1152, dtype=torch.bfloat16)
    x, tokens = torch.empty(1, 4, 32, 32), torch.empty(1, 256, 1152, dtype=torch.bfloat16)
    cost = step_boundary_cost(h, weight, x, patch=2, learned=True, tokens=tokens, position=tokens[0])
    moved = 2 * (512 * 1152 + 32 * 1152 + 4 * 1152 + 17 * 1152 + 2 * 256 * 1152) + 8 * 4096
    assert cost == (moved, 2 * 256 * 1152 * 16 * (2 + 1 + 1) + 4 * 512 * 1152 + 11 * 4096)
    last = step_boundary_cost(h[:1], weight, x, patch=2, history=True, given_noise=True)
    moved = 2 * (256 * 1152 + 16 * 1152 + 2 * 1152) + 5 * 4 * 4096
    assert last == (moved, 2 * 256 * 1152 * 16 + 4 * 256 * 1152 + 8 * 4096)
