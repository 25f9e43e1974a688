"""The ledger against hand counts of the architecture, torch's own counter, and what the engines launch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fused_dit import TINY, Definitions, random_model, request
from torch.utils.flop_counter import FlopCounterMode

import fastcfg
from fastcfg.ceilings import Ceilings
from fastcfg.engines import capture, cuda
from fastcfg.engines.cpu import CpuEngine
from fastcfg.engines.cpu_dit import wide_dtype
from fastcfg.engines.cpu_native import cpu_operations
from fastcfg.engines.fused_dit import HOIST_STEPS, FusedDiT
from fastcfg.explain import count_flops
from fastcfg.guidance import Guidance, Interval
from fastcfg.kernels._launch import offline
from fastcfg.ledger import Work, make_ledger
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.models.dit import DiT
from fastcfg.plan import Plan, make_plan

CPU, META = torch.device("cpu"), torch.device("meta")
T, C, PIXELS, PATCH, OUT = (
    256,
    4,
    4 * 32 * 32,
    2 * 2 * 4,
    2 * 2 * 8,
)  # of a 256-pixel DiT/2: latents [4, 32, 32], 8 channels out


def dit(name: str) -> Denoiser:
    with META:
        return describe_dit(DiT.from_name(name).eval())


def plan_of(model: Denoiser, steps: int = 50, guidance: Guidance | None = None, **options: object) -> Plan:
    return make_plan(model.schedule, steps=steps, guidance=guidance, **options)


def costs(work: Work) -> dict[str, tuple[int, int, int]]:
    return {entry.name: (entry.launches, entry.flops, entry.bytes) for entry in work.entries}


def total(counts: dict[str, tuple[int, int, int]]) -> tuple[int, ...]:
    return tuple(sum(count[i] for count in counts.values()) for i in range(3))


def hand_count_of_a_gpu_step(L: int, D: int, heads: int, B: int, halves: int) -> dict[str, tuple[int, int, int]]:
    """(launches, FLOPs, bytes) of each kind, in bfloat16: L blocks of width D and MLP width 4 D, B samples."""
    R = halves * B
    one, rows = 2 * B * T * D, 2 * R * T * D  # bytes of B and of R rows of tokens
    return {
        # The first reads the tokens that both halves share; each reads one shift and scale a row
        "adaln": (2 * L, 2 * L * 8 * R * T * D, one + (2 * L - 1) * rows + 2 * L * (rows + 2 * 2 * R * D)),
        f"linear {D} to {3 * D}": (L, L * 2 * R * T * D * 3 * D, L * (rows + 3 * rows + 2 * (3 * D * D + 3 * D))),
        f"attention {heads} x {D // heads}": (L, L * 2 * (2 * R * T * T * D), L * 4 * rows),
        f"linear {D} to {D}, gate, residual": (
            L,
            L * 2 * R * T * D * D,
            L * (2 * rows + 2 * (D * D + D)) + one + (L - 1) * rows,
        ),
        f"linear {D} to {4 * D}, GELU": (L, L * 2 * R * T * D * 4 * D, L * (rows + 4 * rows + 2 * (4 * D * D + 4 * D))),
        f"linear {4 * D} to {D}, gate, residual": (
            L,
            L * 2 * R * T * 4 * D * D,
            L * (4 * rows + 2 * rows + 2 * (4 * D * D + D)),
        ),
        "step_boundary": (
            1,
            # eps of both halves and the next patch embedding; the statistics of LayerNorm; the solver, and guidance
            2 * B * T * D * PATCH * (halves + 1) + 4 * R * T * D + (8 + 3 * (halves - 1)) * B * PIXELS,
            rows + 2 * PATCH * D + 2 * 2 * R * D + one + 2 * T * D + 2 * (PATCH + 1) * D + 2 * 4 * B * PIXELS,
        ),
        "count steps": (1, 0, 2 * 4 * 3 * B),
    }


@pytest.mark.parametrize(("name", "size"), [("DiT-S/2", (12, 384, 6)), ("DiT-XL/2", (28, 1152, 16))])
@pytest.mark.parametrize("batch", [1, 32])
def test_gpu_step_is_the_hand_count(name: str, size: tuple[int, int, int], batch: int) -> None:
    model = dit(name)
    ledger = make_ledger("cuda", model, plan_of(model), batch, torch.bfloat16)
    assert ledger.guided is not None
    for work, halves in ((ledger.guided, 2), (ledger.unguided, 1)):
        want = hand_count_of_a_gpu_step(*size, batch, halves)
        assert costs(work) == want
        assert (work.total.launches, work.total.flops, work.total.bytes) == total(want)
    D = size[1]
    assert costs(ledger.start) == {
        "noise": (1, 0, 4 * batch * PIXELS),
        "patch_embed": (
            1,
            batch * T * D * 2 * (PATCH + 1),
            4 * batch * PIXELS + 2 * (PATCH * D + D + T * D + batch * T * D),
        ),
    }


def test_cpu_step_is_the_hand_count() -> None:
    """DiT-S/2 in float32, batch 8: a row reads its own tokens, the table is float32 and the state float64."""
    model = dit("DiT-S/2")
    L, D, B, R = 12, 384, 8, 16
    rows = 4 * R * T * D
    ledger = make_ledger("cpu", model, plan_of(model), B, torch.float32)
    assert ledger.guided is not None
    assert costs(ledger.guided) == {
        "patch_embed": (1, B * T * D * 2 * (PATCH + 1), 8 * B * PIXELS + 4 * (PATCH * D + D + T * D + B * T * D)),
        "adaln": (2 * L + 1, (2 * L + 1) * 8 * R * T * D, (2 * L + 1) * (2 * rows + 2 * 4 * R * D)),
        "linear 384 to 1152": (L, L * 2 * R * T * D * 3 * D, L * (4 * rows + 4 * (3 * D * D + 3 * D))),
        "attention 6 x 64": (L, L * 4 * R * T * T * D, L * 4 * rows),
        "linear 384 to 384, gate, residual": (L, L * 2 * R * T * D * D, L * (3 * rows + 4 * (D * D + D))),
        "linear 384 to 1536, GELU": (L, L * 2 * R * T * D * 4 * D, L * (5 * rows + 4 * (4 * D * D + 4 * D))),
        "linear 1536 to 384, gate, residual": (L, L * 2 * R * T * 4 * D * D, L * (6 * rows + 4 * (4 * D * D + D))),
        "linear 384 to 32": (1, 2 * R * T * D * OUT, rows + 4 * (OUT * D + OUT + R * T * OUT)),
        "unpatchify": (1, 0, 2 * 4 * R * T * OUT),
        "guided_step": (1, 11 * B * PIXELS, 2 * 4 * B * PIXELS + 2 * 8 * B * PIXELS),
    }


def test_int8_weights_are_those_of_the_blocks_and_take_the_int8_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcfg.ledger.wide_dtype", lambda _: torch.bfloat16)
    model, L, D = dit("DiT-S/2"), 12, 384
    ceilings = Ceilings("a CPU", "measured", {"int8": 4e12, "bfloat16": 1e12}, 1e30)
    low, wide = (make_ledger("cpu", model, plan_of(model), 1, dtype, ceilings) for dtype in (torch.int8, torch.bfloat16))
    assert wide.unguided.total.bytes - low.unguided.total.bytes == L * 12 * D * D
    assert (wide.unguided.total.flops, wide.hoisted) == (low.unguided.total.flops, low.hoisted)
    seconds = {entry.name: entry.floor_seconds for entry in low.unguided.entries}
    assert seconds["linear 384 to 1152"] == pytest.approx(L * 2 * T * D * 3 * D / 4e12)
    assert seconds["linear 384 to 32"] == pytest.approx(2 * T * D * OUT / 1e12)
    assert seconds["attention 6 x 64"] == pytest.approx(L * 4 * T * T * D / 1e12)


def test_floor_is_launch_by_launch_the_slower_of_products_and_memory() -> None:
    """DiT-XL/2 alone, one row: the first adaLN moves as much as any other; products wait for their weights."""
    model, L, D = dit("DiT-XL/2"), 28, 1152
    rate, bandwidth = 1000e12, 3e12
    ledger = make_ledger(
        "cuda", model, plan_of(model), 1, torch.bfloat16, Ceilings("a GPU", "stated", {"bfloat16": rate}, bandwidth)
    )
    seconds = {entry.name: entry.floor_seconds for entry in ledger.unguided.entries}
    rows = 2 * T * D
    assert seconds["adaln"] == pytest.approx(2 * L * (2 * rows + 4 * D) / bandwidth)
    product, moved = 2 * T * D * 3 * D / rate, (4 * rows + 2 * (3 * D * D + 3 * D)) / bandwidth
    assert moved > product
    assert seconds["linear 1152 to 3456"] == pytest.approx(L * moved)
    large = make_ledger("cuda", model, plan_of(model), 32, torch.bfloat16, ledger.ceilings)
    seconds = {entry.name: entry.floor_seconds for entry in large.unguided.entries}
    assert seconds["linear 1152 to 3456"] == pytest.approx(L * 32 * product)
    assert large.unguided.total.floor_seconds == pytest.approx(
        sum(entry.floor_seconds or 0 for entry in large.unguided.entries)
    )
    assert large.call.floor_seconds is not None
    saved = [saving.floor_seconds for saving in large.savings]
    assert [one is not None and one > 0 for one in saved] == [True, True, False]  # guided in every step


def test_no_ceilings_no_floor_and_a_dtype_without_a_rate_is_refused() -> None:
    model = random_model()
    ledger = make_ledger("cuda", model, plan_of(model), 2, torch.float32)
    assert ledger.call.floor_seconds is None
    assert {saving.floor_seconds for saving in ledger.savings} == {None}
    with pytest.raises(fastcfg.Error, match="no rate for float32"):
        make_ledger("cuda", model, plan_of(model), 2, torch.float32, Ceilings("a GPU", "stated", {"bfloat16": 1e12}, 1e12))
    with pytest.raises(fastcfg.Error, match=f"no rate for {str(wide_dtype(torch.int8))[6:]} in"):
        make_ledger("cpu", model, plan_of(model), 2, torch.int8, Ceilings("a CPU", "measured", {"int8": 1e12}, 1e12))
    with pytest.raises(fastcfg.Error, match="computes in float32, bfloat16, float16, got int8"):
        make_ledger("cuda", model, plan_of(model), 2, torch.int8)


def test_a_model_without_a_null_label_has_no_guided_step() -> None:
    model = random_model(class_dropout_prob=0.0)
    ledger = make_ledger("cuda", model, plan_of(model, steps=3), 4, torch.float32)
    assert ledger.guided is None
    assert ledger.call.flops == 3 * ledger.unguided.total.flops + ledger.start.total.flops + ledger.hoisted.total.flops
    assert [saving.flops for saving in ledger.savings[1:]] == [0, 0]


@pytest.mark.parametrize(("name", "L", "D", "published"), [("DiT-S/2", 12, 384, 6.06), ("DiT-XL/2", 28, 1152, 118.64)])
def test_products_are_the_modules_but_for_what_is_hoisted_shared_and_unused(
    name: str, L: int, D: int, published: float
) -> None:
    """The DiT paper's table 9 counts a multiply-add once: XL/2's forward is 237 GFLOP."""
    model, B = dit(name), 32
    R = 2 * B
    forward = count_flops(model)
    assert forward / 2e9 == pytest.approx(published, rel=2e-3)
    ledger = make_ledger("cuda", model, plan_of(model), B, torch.bfloat16)
    assert ledger.guided is not None
    layer_norms = 2 * L * 8 * R * T * D + 4 * R * T * D
    products = ledger.guided.total.flops - layer_norms - 11 * B * PIXELS
    hoisted = R * 2 * (256 * D + D * D + L * 6 * D * D + 2 * D * D)  # the embedding of t, and every adaLN
    assert ledger.unhoisted.total.flops == hoisted
    shared = B * 2 * T * D * PATCH  # one patch embedding for two rows
    unused = R * 2 * T * D * (OUT - PATCH)  # the variance's half of the last layer, which DDIM does not read
    assert products == R * forward - hoisted - shared - unused


@pytest.mark.parametrize(("batch", "guided", "labels"), [(2, True, 3), (9, True, 6), (2, False, 2), (9, False, 5)])
def test_the_table_is_of_as_many_labels_as_a_call_may_bring(batch: int, guided: bool, labels: int) -> None:
    """Of 5 there are, and the null label beside them where a step is guided."""
    model, D = random_model(), TINY["hidden_size"]
    plan = replace(plan_of(model, steps=2), guided=np.full(2, guided))
    ledger = make_ledger("cuda", model, plan, batch, torch.float32)
    width = TINY["depth"] * 6 * D + 2 * D
    assert ledger.hoisted.total.flops == 2 * labels * plan.steps * D * width
    assert ledger.savings[0].reason == f"adaLN of t and y, {labels} labels a call"
    assert ledger.unhoisted.total.flops == batch * (1 + guided) * 2 * (256 * D + D * D + D * width)


def test_the_cpu_engines_table_is_filled_a_window_at_a_time() -> None:
    """1,000 steps of DiT-S/2 for 33 labels: 28,416 float32 values each, of which 512 MiB hold 143 steps, 4 times 32."""
    model, W, labels = dit("DiT-S/2"), 12 * 6 * 384 + 2 * 384, 33
    assert HOIST_STEPS == 32
    assert 4 * W * labels * 143 <= 2**29 < 4 * W * labels * 144
    ledger = make_ledger("cpu", model, plan_of(model, steps=1000), 32, torch.float32)
    assert ledger.hoisted.total.launches == math.ceil(1000 / (4 * 32))


def test_hoisting_is_one_product_a_window_of_steps() -> None:
    """DiT-XL/2 at batch 32: 33 labels; 41 steps of the table, 195,840 values a row, fit 512 MiB in bfloat16."""
    model, D, W, steps, labels = dit("DiT-XL/2"), 1152, 195_840, 50, 33
    ledger = make_ledger("cuda", model, plan_of(model), 32, torch.bfloat16)
    assert 2 * W * 41 * labels <= 2**29 < 2 * W * 42 * labels
    moved = 2 * (labels * steps * (D + W) + 2 * (W * D + W))
    assert costs(ledger.hoisted) == {f"linear {D} to {W}": (2, 2 * labels * steps * D * W, moved)}
    saved = {saving.name: saving for saving in ledger.savings}["hoisted"]
    assert saved.flops == steps * ledger.unhoisted.total.flops - 2 * labels * steps * D * W
    assert saved.bytes == steps * ledger.unhoisted.total.bytes - moved
    # A third of the weights is read once a window rather than in every step
    weights = 2 * sum(p.numel() for p in model.module.parameters())
    assert ledger.unhoisted.total.bytes > weights / 3


@pytest.mark.parametrize("batch", [1, 8, 9, 500])
def test_windows_are_those_of_the_captured_loop(batch: int) -> None:
    model = dit("DiT-S/2")
    plan = plan_of(model, steps=1000)
    program = FusedDiT(model, plan, cuda.TritonOperations(), META, torch.bfloat16)
    loop = cuda.DiTLoop(program, cuda.Samples(model, plan, batch, META), capture.Lane(META))
    ledger = make_ledger("cuda", model, plan, batch, torch.bfloat16)
    assert ledger.hoisted.total.launches == math.ceil(1000 / loop.window)


def test_end_of_a_step_with_history_channels_and_variance_is_the_hand_count() -> None:
    model, B, n = dit("DiT-S/2"), 4, 4 * PIXELS

    def entries(**options: object) -> dict[str, tuple[int, int, int]]:
        ledger = make_ledger("cuda", model, plan_of(model, **options), B, torch.bfloat16)
        assert ledger.guided is not None
        return costs(ledger.guided)

    whole = entries()["step_boundary"]
    assert entries(solver="dpmpp_2m")["step_boundary"][2] - whole[2] == 8 * n
    learned = entries(solver="ddpm", variance="learned_range")["step_boundary"]
    assert learned[1] - whole[1] == 2 * B * T * 384 * PATCH
    assert learned[2] - whole[2] == 2 * PATCH * 384
    parts = entries(solver="dpmpp_2m", guidance=Guidance(rescale=0.5, channels=3))
    guided = 3 * n // 4
    assert parts["guided_step"] == (1, 8 * n + 3 * guided, 2 * (n + guided) + 16 * n)
    assert parts["guided_step, moments"] == (1, 7 * guided, 2 * 2 * guided)
    assert parts["unpatchify"] == (1, 0, 2 * 2 * 2 * B * T * OUT)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_both_halves_share_their_tokens_whatever_ends_a_step(rescale: float) -> None:
    model, B, D = dit("DiT-S/2"), 8, 384
    ledger = make_ledger("cuda", model, plan_of(model, guidance=Guidance(rescale=rescale)), B, torch.bfloat16)
    shared = {saving.name: saving for saving in ledger.savings}["shared"]
    assert shared.flops == 50 * B * T * D * 2 * (PATCH + 1)
    assert shared.bytes == 50 * (3 * 2 * B * T * D + 4 * B * PIXELS)


def test_a_model_whose_blocks_embed_t_themselves_has_that_much_more_hoisted() -> None:
    plain, own = (random_model(block_conditioning=flag) for flag in (False, True))
    ledgers = [make_ledger("cuda", model, plan_of(model), 2, torch.float32) for model in (plain, own)]
    more = ledgers[1].unhoisted.total.flops - ledgers[0].unhoisted.total.flops
    assert more == 4 * 2 * TINY["depth"] * (256 * 64 + 64 * 64)
    assert ledgers[1].hoisted.total.launches == TINY["depth"] + 1
    assert ledgers[1].hoisted.total.flops == ledgers[0].hoisted.total.flops


def test_outside_the_interval_a_step_is_half() -> None:
    model = dit("DiT-S/2")
    ledger = make_ledger(
        "cuda", model, plan_of(model, steps=250, guidance=Guidance(interval=Interval(100, 261))), 8, torch.bfloat16
    )
    assert ledger.guided is not None
    guided, alone = ledger.guided.total, ledger.unguided.total
    inside = sum(100 <= round(i * 999 / 249) <= 261 for i in range(250))  # the official code's 250 of 1000 timesteps
    embedding = 8 * 2 * T * 384 * PATCH
    assert guided.flops - embedding - 11 * 8 * PIXELS == 2 * (alone.flops - embedding - 8 * 8 * PIXELS)
    saved = {saving.name: saving for saving in ledger.savings}
    model_rows = 2 * inside + 250 - inside
    assert saved["hoisted"].flops == model_rows * ledger.unhoisted.total.flops // 2 - ledger.hoisted.total.flops
    assert saved["interval"].flops == (250 - inside) * (guided.flops - alone.flops)
    assert saved["interval"].bytes == (250 - inside) * (guided.bytes - alone.bytes)
    assert saved["interval"].reason == f"no null rows in {250 - inside} of 250 steps"
    tokens = 2 * 8 * T * 384  # nor are they written, or read by the first LayerNorm and the first residual, a second time
    assert saved["shared"].flops == inside * (embedding + 2 * 8 * T * 384)
    assert saved["shared"].bytes == inside * (3 * tokens + 4 * 8 * PIXELS)
    parts = [(guided, inside), (alone, 250 - inside), (ledger.start.total, 1), (ledger.hoisted.total, 1)]
    assert ledger.call.flops == sum(times * part.flops for part, times in parts)
    assert ledger.call.launches == sum(times * part.launches for part, times in parts)


SETTINGS = [
    {},
    {"guidance": Guidance(rescale=0.7), "solver": "dpmpp_2m"},
    {"solver": "ddpm", "variance": "learned_range", "guidance": Guidance(channels=2)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["ddim", "rescale", "ddpm"])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("channels", [3, 4, 5])
def test_launches_are_those_of_the_captured_loop(settings: dict, guided: bool, channels: int) -> None:
    """In patches of 4 x 4, of which step_boundary takes up to 64 values."""
    with META:
        module = DiT(**TINY | {"in_channels": channels, "patch_size": 4}).eval()
    model = describe_dit(module)
    plan = plan_of(model, steps=4, **settings)
    program = FusedDiT(model, plan, cuda.TritonOperations(), META, torch.float16)
    loop = cuda.DiTLoop(program, cuda.Samples(model, plan, 2, META), capture.Lane(META))
    launches: list[str] = []
    products: list[int] = []

    def record(kernel, _grid, _config, arguments) -> None:
        launches.append(kernel.fn.__name__.strip("_").removesuffix("_kernel"))
        if launches[-1] == "linear":
            products.append(2 * arguments["rows"] * arguments["N"] * arguments["K"])

    with offline("sm_90", record):
        loop.step(guided)
    ledger = make_ledger("cuda", model, plan, 2, torch.float16)
    step = ledger.guided if guided else ledger.unguided
    assert step is not None
    told: Counter[str] = Counter()
    for entry in step.entries:
        told["moments" if entry.name.endswith("moments") else entry.name.split()[0]] += entry.launches
    assert told.pop("count") == 1  # these two are torch's own launches
    assert told.pop("unpatchify", 0) == (bool(plan.guidance.rescale) or channels == 5)
    assert told == Counter(launches)
    assert sum(e.flops for e in step.entries if e.name.startswith("linear")) == sum(products)
    assert loop.window == plan.steps


def test_torch_counts_the_same_products_when_the_program_runs() -> None:
    """Every product of a guided step and of the table, by torch's dispatcher, on the kernels' definitions."""
    model = random_model()
    plan = plan_of(model, steps=1, spacing="trailing")
    program = FusedDiT(model, plan, Definitions(), CPU, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.run(request(plan, [2, 0]), [slice(0, 2)], program.denoise)
    ledger = make_ledger("cpu", model, plan, 2, torch.float32)
    tokens, D, depth = 16, TINY["hidden_size"], TINY["depth"]
    layer_norms = (2 * depth + 1) * 8 * 4 * tokens * D
    bias_and_position = 2 * 2 * tokens * D
    assert ledger.call.flops - layer_norms - bias_and_position - 11 * 2 * 3 * 8 * 8 == counter.get_total_flops()


def test_calls_are_those_of_the_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    operations = type(cpu_operations())
    for name in ("adaln", "linear", "attention", "guided_step", "patch_embed"):
        operation = getattr(operations, name)

        def counted(self, *given, name=name, operation=operation, **options):
            calls[name] += 1
            return operation(self, *given, **options)

        monkeypatch.setattr(operations, name, counted)
    monkeypatch.setattr("fastcfg.engines.cpu.in_one_call", lambda _: False)
    model = random_model()
    plan = plan_of(model, steps=3)
    engine = CpuEngine(model, plan, CPU, torch.float32, workers=1)
    calls.clear()
    asked = request(plan, [2], scale=1.0)
    engine.run(replace(asked, guided=np.zeros(3, bool)))
    ledger = make_ledger("cpu", model, plan, 1, torch.float32)
    told = Counter({"linear": ledger.hoisted.total.launches})
    for entry in ledger.unguided.entries:
        told[entry.name.split()[0]] += 3 * entry.launches
    del told["unpatchify"]  # a copy, no operation
    assert calls == told
