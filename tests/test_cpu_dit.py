"""The network in one call: against the module in float64 and the fused program's operations, for each kind of processor, and
the threads that share a call."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
import torch
import torch.nn.functional as F
from test_cpu_native import library  # noqa: F401 (a fixture)
from test_fused_dit import a_plan, random_model, relative
from torch import Tensor

from fastcfg import Sampler
from fastcfg.engines import cpu_dit, fused_dit
from fastcfg.engines.cpu import _random
from fastcfg.engines.cpu_dit import NativeDiT, NativeLayer, in_one_call
from fastcfg.engines.cpu_native import Kernels, NativeOperations, kernels
from fastcfg.engines.cpu_ops import CpuOperations, has_int8
from fastcfg.engines.fused_dit import FusedDiT
from fastcfg.engines.workers import Workers, one_thread
from fastcfg.models.denoiser import Denoiser

CPU = torch.device("cpu")
MODELS = {
    "head 64": {"hidden_size": 128, "num_heads": 2},
    "head 72": {"hidden_size": 72, "block_conditioning": True, "patch_size": 1, "input_size": 6},
    "odd": {"input_size": 10, "hidden_size": 36, "num_heads": 3, "mlp_norm_eps": 1e-2},  # 25 tokens of 36: no vector is filled
    "wide": {"hidden_size": 24, "num_heads": 1, "mlp_ratio": 66.7, "depth": 1},  # fc2 reads its panels in two parts
    "many tokens": {"input_size": 24, "hidden_size": 128, "num_heads": 2, "depth": 1},  # a layer of several blocks of tiles
    "odd mlp": {"hidden_size": 36, "num_heads": 3, "mlp_ratio": 1.25},  # 45 hidden values, where bfloat16 comes in pairs
    "odd heads": {"hidden_size": 20, "num_heads": 4},  # of 5 values, where bfloat16 comes in pairs
    "one token": {"input_size": 2, "hidden_size": 16, "num_heads": 1},
}


@pytest.fixture
def compiled(library: object, monkeypatch: pytest.MonkeyPatch) -> object:  # noqa: F811
    """`NativeDiT` on this library."""
    monkeypatch.setattr(cpu_dit, "kernels", lambda: Kernels(library))
    return library


DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def program_of(model: Denoiser, dtype: torch.dtype = torch.float32) -> NativeDiT:
    if dtype == torch.int8 and not cpu_dit.kernels().library.fastcfg_has_int8():
        pytest.skip("compiled without VNNI")
    return NativeDiT(model, a_plan(model), CPU, dtype)


def poison(program: NativeDiT, rows: int, threads: int = 1) -> None:
    program._scratch(rows, threads).fill_(torch.nan)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_the_module(name: str) -> None:
    model = random_model(**MODELS[name])
    program = program_of(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *model.shape, generator=generator)
    t, y = torch.tensor([3.0, 500.0, 980.0]), torch.tensor([0, 4, 2])
    table = program.modulations(t, y)
    poison(program, 3)
    with torch.inference_mode():
        want = model.module.double()(x.double(), t, y)
        model.module.float()
        got = program.denoise(program.embed(x), table, torch.arange(3))
    assert relative(got.double(), want) < 2e-6


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_errs_no_more_than_twice_what_torch_does(name: str) -> None:
    model = random_model(**MODELS[name])
    program = program_of(model, torch.bfloat16)
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([3.0, 500.0, 980.0]), torch.tensor([0, 4, 2])
    poison(program, 3)
    with torch.inference_mode():
        want = model.module(x, t, y)
        torchs = model.module.bfloat16()(x.bfloat16(), t, y).float()
        got = program.denoise(program.embed(x), program.modulations(t, y), torch.arange(3))
    assert 0 < relative(got, want) <= 2 * relative(torchs, want)
    assert (got - want).norm() <= 1.2 * (torchs - want).norm()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_both_halves_share_their_tokens_and_no_row_depends_on_another(name: str, dtype: torch.dtype) -> None:
    program = program_of(random_model(**MODELS[name]), dtype)
    tokens, table = _random(program, 6)
    index = torch.tensor([5, 0, 3, 3, 1, 2], dtype=torch.int32)
    poison(program, 6)
    together = program.denoise(tokens[:3], table, index)
    assert together.isfinite().all()
    poison(program, 1)
    for r in range(6):
        assert torch.equal(program.denoise(tokens[r % 3 : r % 3 + 1], table, index[r : r + 1]), together[r : r + 1])


@pytest.mark.skipif(not has_int8(), reason="no int8 products in this torch")
@pytest.mark.parametrize("name", MODELS)
def test_int8_has_the_bits_of_onednns_products(compiled: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of whole numbers are exact, and all else is the operations', one by one."""
    monkeypatch.setattr("fastcfg.engines.cpu_ops._attends_by_products", lambda _: False)
    model = random_model(**MODELS[name])
    program = program_of(model, torch.int8)
    one_by_one = FusedDiT(model, program.plan, NativeOperations(compiled, quantise=True), CPU, torch.float32)
    tokens, table = _random(program, 2)
    tokens += 8  # so that what is left of a vector's lanes, where 0 less the mean comes, would be the largest
    index = torch.arange(2, dtype=torch.int32)
    got, want = program.denoise(tokens, table, index), one_by_one.denoise(tokens, table, index)
    # The last layer alone is in float32, whose sums the two make in orders of their own
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    exact = FusedDiT(model, program.plan, CpuOperations(), CPU, torch.float32).denoise(tokens, table, index)
    assert 1e-4 < relative(got, exact) < 0.1


@pytest.mark.usefixtures("compiled")
def test_tokens_are_those_of_the_operations() -> None:
    for name in ("head 72", "odd"):
        model = random_model(**MODELS[name])
        program = program_of(model)
        x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        want = FusedDiT(model, program.plan, CpuOperations(), CPU, torch.float32).embed(x)
        torch.testing.assert_close(program.embed(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF])  # a NaN, and one that would round to no NaN
def test_what_is_not_a_number_stays_so(dtype: torch.dtype, word: int) -> None:
    program = program_of(random_model(), dtype)
    tokens, table = _random(program, 3)
    tokens[1, 2, 3] = torch.tensor(word, dtype=torch.int32).view(torch.float32)
    assert program.denoise(tokens, table, torch.arange(3)).isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [64, 3124])  # one chunk of k, and more
def test_what_is_measured_is_a_product(compiled: object, dtype: torch.dtype, K: int) -> None:
    if dtype == torch.int8 and not compiled.fastcfg_has_int8():  # type: ignore[attr-defined]
        pytest.skip("compiled without VNNI")
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(19, K, generator=generator), torch.randn(50, K, generator=generator)
    bias = torch.randn(50, generator=generator)
    result = NativeLayer(compiled, weight, bias, dtype).products(h)()
    columns = compiled.fastcfg_columns()  # type: ignore[attr-defined]
    result = result.view(-1, -(-50 // columns) * columns)[:19, :50]
    if dtype == torch.bfloat16:  # sums of exact products
        h, weight = h.bfloat16().float(), weight.bfloat16().float()
    assert relative(result.double(), F.linear(h.double(), weight.double(), bias.double())) < (
        0.03 if dtype == torch.int8 else 2e-6
    )


# Threads

needs_library = pytest.mark.skipif(not in_one_call(torch.float32), reason="no network in one call here")


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ("odd", "many tokens", "one token")), ("odd", torch.bfloat16)]
)
def test_a_team_computes_what_one_thread_does(
    name: str, dtype: torch.dtype, threads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows where threads divide them, else by tokens and heads, of which there may be fewer than threads; job after job,
    helpers coming when they may."""
    monkeypatch.setattr(cpu_dit, "TOKENS_EACH", 1)
    program, workers = program_of(random_model(**MODELS[name]), dtype), Workers(threads)
    tokens, table = _random(program, rows)
    index = torch.arange(rows, dtype=torch.int32)
    want = program.denoise(tokens, table, index)
    helpers = []

    def jobs(_: int) -> list[Tensor]:
        poison(program, rows, threads)
        results = [program.denoise(tokens, table, index) for _ in range(30)]
        helpers.append(program._own.team._asked)
        return results

    with one_thread():
        for got in (result for results in program.led(workers, jobs, [0]) for result in results):
            assert torch.equal(got, want)
    assert helpers == [min(threads, rows * program.config.tokens) - 1]
    assert gone(workers)


def gone(workers: Workers) -> bool:
    """Whether all helpers have ended, or do in a moment."""
    deadline = time.monotonic() + 20
    while workers._busy and time.monotonic() < deadline:
        time.sleep(0.01)
    return workers._busy == 0


@needs_library
def test_a_team_that_grows_gets_jobs_of_every_size() -> None:
    """A helper that is late from one job must not take a part of the next, which may have more of them."""
    program, workers = program_of(random_model()), Workers(4)
    tokens, table = _random(program, 8)
    index = torch.arange(8, dtype=torch.int32)
    sizes = [2, 2, 4, 8, 1, 2, 8, 4, 3, 8] * 30
    starts = [(7 * k) % (9 - size) for k, size in enumerate(sizes)]  # others each time: what is left of a job is no result
    want = torch.cat([program.denoise(tokens[r : r + 1], table, index[r : r + 1]) for r in range(8)])

    def jobs(_: int) -> None:
        for start, size in zip(starts, sizes, strict=True):
            some = slice(start, start + size)
            assert torch.equal(program.denoise(tokens[some], table, index[some]), want[some]), (start, size)

    with one_thread():
        for _ in range(3):
            program.led(workers, jobs, [0])
    assert gone(workers)


@needs_library
def test_helpers_come_late_or_not_at_all() -> None:
    """Rows that are shared wait for nobody: the leader takes what no helper has taken."""
    program = program_of(random_model())
    tokens, table = _random(program, 2)
    index = torch.arange(2, dtype=torch.int32)
    want = program.denoise(tokens, table, index)
    started: list[threading.Thread] = []

    class Late:
        count = 2

        def check(self) -> None:
            """Nobody interrupts."""

        def offer(self, function: object) -> Future[None]:
            started.append(threading.Thread(target=function))  # type: ignore[arg-type]
            return Future()

    team = program._own.team = cpu_dit._Team(kernels().library, Late())  # type: ignore[arg-type]
    try:
        for jobs in range(20):
            assert torch.equal(program.denoise(tokens, table, index), want)
            if jobs == 5:
                started[0].start()
    finally:
        team.dismiss()
    started[0].join(20)
    assert not started[0].is_alive()
    assert len(started) == 1


@needs_library
def test_an_error_between_two_jobs_sends_the_helpers_home() -> None:
    program, workers = program_of(random_model(**MODELS["many tokens"])), Workers(3)
    tokens, table = _random(program, 1)
    arrived = []

    def failing(_: int) -> None:
        program.denoise(tokens, table, torch.zeros(1, dtype=torch.int32))
        arrived.append(workers._busy)
        raise ZeroDivisionError

    with one_thread():
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                program.led(workers, failing, [0])
            assert gone(workers)
        assert arrived == [3, 3, 3]
        assert workers.map(lambda k: k + 1, range(5)) == [1, 2, 3, 4, 5]


LOOPS = {
    "ddim": {"solver": "ddim", "eta": 0.0},
    "drawn noise": {"solver": "ddim", "eta": 1.0},
    "given noise": {"solver": "ddpm", "variance": "fixed_large"},
    "history, interval": {"solver": "dpmpp_2m", "interval": (200, 700)},
    "clip, channels": {"solver": "ddim", "eta": 0.5, "clip": True, "guidance_channels": 1, "spacing": "trailing"},
    "rescale": {"solver": "ddim", "rescale": 0.7},
    "learned variance": {"solver": "ddpm", "variance": "learned_range"},
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", LOOPS)
def test_steps_in_one_call_are_those_of_the_program_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_one_call(torch.float32):
        pytest.skip("compiled without products")
    model, steps, batch = random_model(**MODELS["head 64"]), 6, 5
    made = Sampler(model, steps=steps, batch=batch, engine="cpu", dtype="fp32", **LOOPS[name])
    generator = torch.Generator().manual_seed(2)
    call = {"scale": [1.0, 2.0, 4.0, 1.5, 8.0], "seeds": 7}
    if name == "given noise":
        call["x_T"] = torch.randn(batch, *model.shape, generator=generator).to(memory_format=torch.channels_last)
        call["noise"] = torch.randn(steps, batch, *model.shape, generator=generator)
    got = [made(range(5), **call)]
    monkeypatch.setattr(cpu_dit, "NOISE_BYTES", 1)  # a step's at a time
    got.append(made(range(5), **call))
    monkeypatch.setattr(NativeDiT, "_advance", FusedDiT._advance)
    want = made(range(5), **call)
    assert all(torch.equal(samples, want) for samples in got)


@needs_library
def test_a_table_in_windows_changes_no_bit_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Sampler(random_model(depth=1), steps=70, engine="cpu", dtype="fp32", interval=(100, 900))
    want = made([1, 2], scale=3.0, seeds=0)
    monkeypatch.setattr(fused_dit, "TABLE_BYTES", 1)
    assert [len(window) for window in made.engine._program.windows(3)] == [32, 32, 6]
    assert torch.equal(made([1, 2], scale=3.0, seeds=0), want)


def test_without_one_call_the_engine_samples_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    made = Sampler(model, steps=3, engine="cpu", dtype="fp32")
    assert isinstance(made.engine._program, NativeDiT) == in_one_call(torch.float32)
    monkeypatch.setattr("fastcfg.engines.cpu.in_one_call", lambda _: False)
    plain = Sampler(model, steps=3, engine="cpu", dtype="fp32")
    assert type(plain.engine._program) is FusedDiT
    assert relative(made([1, 2], scale=3.0, seeds=0), plain([1, 2], scale=3.0, seeds=0)) < 1e-5


@pytest.mark.parametrize(("flags", "taken"), [("avx2 avx512_vnni", True), ("avx512_vnni amx_tile amx_int8", False)])
def test_int8_is_onednns_where_it_has_tiles(flags: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernels().library
    if own is None or not own.fastcfg_has_int8():
        pytest.skip("no int8 products of our own here")
    monkeypatch.setattr(cpu_dit, "cpuinfo", lambda _: flags)
    assert in_one_call(torch.int8) is taken
    monkeypatch.setattr(cpu_dit, "beside_int8", lambda: torch.bfloat16)
    assert cpu_dit.wide_dtype(torch.int8) == (torch.float32 if taken else torch.bfloat16)
