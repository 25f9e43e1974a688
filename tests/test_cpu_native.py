"""The compiled kernels of the cpu engine: against torch's operations and definitions in float64, for each kind of processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fused_dit import LOW, a_plan, random_model, relative
from torch import Tensor

from fastcfg import Sampler, portable
from fastcfg.engines import cpu_native
from fastcfg.engines.cpu_dit import in_one_call
from fastcfg.engines.cpu_native import FLAGS, NativeOperations, cpu_operations, kernels
from fastcfg.engines.cpu_ops import CpuOperations, Tokens, has_int8
from fastcfg.guidance import Guidance, scale_table
from fastcfg.noise import normal

COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
LOADS = "from fastcfg.engines.cpu_native import kernels; assert kernels().library is not None"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
# With the registers that this processor has, with half as wide ones, and without the instruction for a * b + c
PROCESSORS = ["native", *(["haswell", "x86-64-v2"] if platform.machine() == "x86_64" else [])]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # the error allowed, of the largest value
SHAPES = [(49, 3, 64), (16, 2, 20), (25, 3, 12), (130, 1, 72), (1, 1, 8)]  # tokens, heads, values of a head


@pytest.fixture(scope="module", params=PROCESSORS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    if COMPILER is None:
        pytest.skip("no C compiler here")
    if request.param == "haswell" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    flags = [flag.replace("native", request.param) for flag in FLAGS]
    return cpu_native._compiled([COMPILER, *flags], tmp_path_factory.mktemp("kernels") / "kernels.so")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), SHAPES)
def test_adaln_is_its_definition(library: object, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    D, index = heads * size, torch.tensor([3, 0, 2, 1], dtype=torch.int32)  # both halves share two samples
    x, table = 3 + 2 * draw(2, tokens, D, dtype=dtype), draw(5, 3 * D + 1)
    out = poisoned(4, tokens, D, dtype=dtype)
    got = NativeOperations(library).adaln(x, table, index, D, 2 * D + 1, eps=1e-3, out=out)
    shift, scale = (table[index.long()][:, None, first : first + D].double() for first in (D, 2 * D + 1))
    want = F.layer_norm(x.double(), (D,), eps=1e-3).repeat(2, 1, 1) * (1 + scale) + shift
    assert got is out
    assert relative(got.double(), want) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), SHAPES)
def test_a_gated_product_joins_the_stream(library: object, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    D, index = heads * size, torch.tensor([2, 1], dtype=torch.int32)
    weight, bias = (0.1 * draw(D, D, seed=1)).to(dtype), draw(D, seed=2).to(dtype)
    h, residual, table = draw(2, tokens, D, dtype=dtype, seed=3), draw(1, tokens, D, dtype=dtype, seed=4), draw(3, 2 * D)
    options = {"residual": residual, "table": table, "index": index, "gate_column": D}
    operations = NativeOperations(library)
    got = operations.linear(h, *operations.pack(weight, bias, rows=tokens), **options)
    want = residual.double() + table[index.long()][:, None, D:].double() * F.linear(h.double(), weight.double(), bias.double())
    assert relative(got.double(), want) < 2 * DTYPES[dtype]


def test_results_are_the_nearest_bfloat16_and_ties_are_even(library: object) -> None:
    h = torch.arange(64).view(1, 1, 64).bfloat16() / 512  # 1 + h lies on a bfloat16, between two, or off the middle
    ones, index = torch.ones(1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    operations = NativeOperations(library)
    layer = operations.pack(torch.eye(64).bfloat16(), torch.zeros(64).bfloat16(), rows=1)
    got = operations.linear(h, *layer, residual=ones, table=torch.ones(1, 64), index=index, gate_column=0)
    assert torch.equal(got, (1 + h.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), SHAPES)
def test_attention_is_its_definition(library: object, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    D = heads * size
    qkv = 2 * draw(3, tokens, 3 * D, dtype=dtype)
    qkv[0, :, :D] *= 30  # scores of hundreds: the largest alone counts, or nothing overflows
    qkv[1, :, D : 2 * D] -= 40  # scores all far below zero
    out = poisoned(3, tokens, D, dtype=dtype)
    scratch = poisoned(library.fastcfg_attention_scratch(tokens, size), dtype=torch.float32)  # type: ignore[attr-defined]
    library.fastcfg_attention(  # type: ignore[attr-defined]
        qkv.data_ptr(), out.data_ptr(), scratch.data_ptr(), 3, tokens, heads, size, cpu_native.KINDS[dtype]
    )
    q, k, v = qkv.double().view(3, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    want = (torch.softmax(q @ k.transpose(-1, -2) / size**0.5, -1) @ v).transpose(1, 2).reshape(3, tokens, D)
    error = (out.double() - want).flatten(1).abs().amax(1) / want.flatten(1).abs().amax(1)
    assert error[2] < DTYPES[dtype]
    assert error.max() < max(DTYPES[dtype], 4e-5)  # a score of hundreds is itself rounded by 1e-5


@pytest.mark.parametrize("word", [0x7FC00001, 0x7FC00080, 0xFFC00000 - 2**32, 0x7F800001])
def test_attention_of_what_is_not_a_number_is_none(library: object, word: int) -> None:
    qkv = draw(1, 20, 3 * 8)
    qkv[0, 3, 2] = torch.tensor(word, dtype=torch.int32).view(torch.float32)
    out = NativeOperations(library).attention(qkv, 1)
    assert out.isnan().any(2).tolist() == [[t == 3 for t in range(20)]]


def test_a_product_with_gelu_is_its_definition(library: object) -> None:
    operations, h = NativeOperations(library), 3 * draw(2, 7, 20)
    weight, bias = draw(13, 20, seed=1), draw(13, seed=2)
    want = F.linear(h.double(), weight.double(), bias.double())
    assert want.abs().max() > 20  # where e^x is beyond float32
    got = operations.linear(h, *operations.pack(weight, bias, rows=7), gelu=True)
    torch.testing.assert_close(got.double(), F.gelu(want, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_stays_so(library: object) -> None:
    """A diverged network must be seen to have diverged."""
    operations, index = NativeOperations(library), torch.zeros(1, dtype=torch.int32)
    for dtype in DTYPES:
        x, qkv = draw(1, 4, 24, dtype=dtype), draw(1, 4, 72, dtype=dtype)
        x[0, 2, 5] = qkv[0, 2, 5] = torch.nan
        assert operations.adaln(x, draw(1, 48), index, 0, 24).isnan().any(-1).tolist() == [[False, False, True, False]]
        assert operations.attention(qkv, 1)[0, 2].isnan().all()
        assert operations.attention(qkv, 1)[0, [0, 1, 3]].isfinite().all()


needs_int8 = pytest.mark.skipif(not has_int8(), reason="no int8 products in this torch")


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_int8_products_are_those_of_torchs_operations(library: object, gated: bool, dtype: torch.dtype) -> None:
    T, K, N, index = 19, 80, 44, torch.tensor([1, 0, 2], dtype=torch.int32)
    h = draw(3, T, K, dtype=dtype)
    h[1, 4] = 0  # a token without a largest value
    options: dict = {}
    if gated:
        options = {"residual": draw(3, T, N, dtype=dtype), "table": draw(3, N), "index": index, "gate_column": 0}
    plain, ours = CpuOperations(quantise=True), NativeOperations(library, quantise=True)
    layer = plain.pack(draw(N, K, seed=1), draw(N, seed=2), rows=T)
    assert_same_tokens(ours._quantised(h), plain._quantised(h))
    got, want = (operations.linear(h, *layer, **options) for operations in (ours, plain))
    assert got.dtype == want.dtype == dtype
    assert relative(got.double(), want.double()) < 8e-3


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_mlp_is_that_of_torchs_operations(library: object, dtype: torch.dtype) -> None:
    """fc1's result, behind its GELU, goes to fc2 as whole numbers."""
    T, K, N, index = 19, 80, 44, torch.tensor([1, 0, 2], dtype=torch.int32)
    h, residual = draw(3, T, K, dtype=dtype), draw(3, T, K, dtype=dtype, seed=5)
    gate = {"residual": residual, "table": draw(3, K), "index": index, "gate_column": 0}
    weights = [(draw(N, K, seed=1) / K**0.5, draw(N, seed=2)), (draw(K, N, seed=3) / N**0.5, draw(K, seed=4))]
    results = []
    for operations in (NativeOperations(library, quantise=True), CpuOperations(quantise=True)):
        fc1, fc2 = (operations.pack(weight, bias, rows=T) for weight, bias in weights)
        hidden = operations.linear(h, *fc1, gelu=True)
        results.append((hidden, operations.linear(hidden, *fc2, **gate)))
    (hidden, got), (plain_hidden, want) = results
    assert_same_tokens(hidden, plain_hidden)
    assert got.dtype == dtype
    assert relative(got.double(), want.double()) < 8e-3
    (W1, b1), (W2, b2) = weights
    exact = F.linear(F.gelu(F.linear(h.double(), W1.double(), b1.double()), approximate="tanh"), W2.double(), b2.double())
    exact = residual.double() + gate["table"][index.long()][:, None].double() * exact  # type: ignore[index]
    assert relative(got.double(), exact) < 2e-2  # what int8 costs


def assert_same_tokens(got: Tokens, want: Tokens) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    assert (got.whole.int() - want.whole.int()).abs().max() <= 1  # a tie, rounded after another order of steps
    assert (got.whole != want.whole).float().mean() < 0.002


@needs_int8
def test_what_is_not_a_number_stays_so_through_int8(library: object) -> None:
    for operations in (NativeOperations(library, quantise=True), CpuOperations(quantise=True)):
        fc1, fc2 = (operations.pack(draw(24, 24, seed=seed), draw(24), rows=4) for seed in (1, 2))
        for dtype in DTYPES:
            h = draw(1, 4, 24, dtype=dtype)
            h[0, 2, 5] = torch.nan
            hidden = operations.linear(h, *fc1, gelu=True)
            for result in (operations.linear(h, *fc1), hidden.scale, operations.linear(hidden, *fc2)):
                assert result.isnan().any(-1).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("guidance", "options"),
    [
        ({}, {"solver": "ddim"}),
        ({"channels": 1}, {"solver": "ddim", "eta": 0.8, "clip": True, "spacing": LOW}),
        ({}, {"solver": "dpmpp_2m"}),
        ({"rescale": 0.4}, {"solver": "ddim"}),
        ({}, {"solver": "ddpm", "variance": "learned_range"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)  # the last behind a classifier
@pytest.mark.parametrize("noisy", ["drawn", "given"])
def test_a_step_has_the_bits_of_the_reference_engine(
    library: object, guidance: dict, options: dict, scale: float, noisy: str, dtype: torch.dtype
) -> None:
    """Its operations are torch's, in float64, in the same order."""
    model = random_model(depth=1)
    plan = a_plan(model, guidance=Guidance(**guidance), **options)
    B, shape = 3, model.shape
    scales = torch.from_numpy(scale_table([scale, 2.0, 1.0], plan.steps, B))
    noise = draw(plan.steps, B, *shape) if noisy == "given" else None
    given = {"seeds": torch.tensor([5, -3, 2**62]), "indices": torch.tensor([0, 7, 2**40])} if noisy == "drawn" else {}
    results = []
    for operations in (CpuOperations(), NativeOperations(library)):
        x = plan.init_scale * draw(B, *shape, seed=1).double()
        history = torch.zeros_like(x) if plan.needs_history else None
        for i in range(plan.steps):
            for halves in (1, 2) if i else (2,):
                out = draw(halves * B, 2 * shape[0], *shape[1:], dtype=dtype, seed=10 + i) / 3  # of as many digits as it has
                operations.guided_step(
                    out, x, operations.step_table(plan), scales, torch.full((B,), i, dtype=torch.int32),
                    x0_prev=history, noise=noise, channels=plan.guidance.channels, rescale=plan.guidance.rescale,
                    clip=plan.clip, learned=plan.learned_variance, out=x, **given,
                )  # fmt: skip
        results.append((x, history))
    (want, want_history), (got, history) = results
    assert want.isfinite().all()
    assert torch.equal(got, want)
    assert (history is None and want_history is None) or torch.equal(history, want_history)


def test_noise_is_the_packages_to_the_bit(library: object) -> None:
    seeds, indices = torch.tensor([0, -1, 2**63 - 1]), torch.tensor([2**33 + 5, 0, -7])
    step = torch.tensor([0, 11, 999], dtype=torch.int32)
    drawn = NativeOperations(library)._drawn(seeds, indices, step, torch.empty(3, 3, 5, 7))
    assert torch.equal(drawn, normal(seeds.numpy(), indices.numpy(), step.numpy() + 1, (3, 5, 7)))


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """A machine that has compiled nothing yet, and a process that has asked for nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("_uncompiled")
def test_the_library_is_compiled_once_and_again_where_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels().library is not None
    (path,) = (tmp_path / "cache" / "fastcfg").iterdir()
    whole = path.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    kernels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", never)
        assert kernels().library is not None
    path.unlink()
    path.write_bytes(b"no library")
    subprocess.run([sys.executable, "-c", LOADS], check=True)  # this process has the old one loaded under that name
    assert len(path.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.usefixtures("_uncompiled")
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "FLAGS", (*FLAGS, "-O0"))  # in a third of the time
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert kernels().library is not None


@needs_compiler
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("barred", ["the temporary folder", "the cache"])
def test_it_is_loaded_from_where_that_is_allowed(barred: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder is mounted noexec."""
    declared, cache = cpu_native._declared, tmp_path / "cache"

    def load(path: Path) -> object:
        if path.is_relative_to(cache) == (barred == "the cache"):
            raise OSError(f"{path}: failed to map segment from shared object")
        return declared(path)

    monkeypatch.setattr(cpu_native, "_declared", load)
    monkeypatch.setattr(cpu_native, "FLAGS", (*FLAGS, "-O0"))  # in a third of the time
    assert kernels().library is not None


@needs_compiler
@pytest.mark.usefixtures("_uncompiled")
def test_without_a_home_folder_it_is_compiled_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def none(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(none))
    monkeypatch.setattr(cpu_native, "FLAGS", (*FLAGS, "-O0"))  # in a third of the time
    assert kernels().library is not None


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("case", ["none", "missing", "failing", "silent", "no command"])
def test_without_a_compiler_the_engine_runs_and_says_what_it_lost(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = random_model()
    want = Sampler(model, steps=2, engine="reference")([1, 2], scale=3.0, seeds=0)
    if case == "none":
        monkeypatch.setenv("PATH", str(tmp_path))
        said = "no C compiler was found"
    else:
        silent = "sh -c 'echo >&2; exit 1'"
        compiler = {"missing": str(tmp_path / "cc"), "failing": "false", "silent": silent, "no command": "cc '"}
        monkeypatch.setenv("CC", compiler[case])
        said = "CC is no command" if case == "no command" else "could not compile them"
    made = Sampler(model, steps=2, engine="cpu", dtype="fp32")
    assert any(said in note for note in made.engine.notes)
    assert said in str(made.explain())
    assert relative(made([1, 2], scale=3.0, seeds=0), want) < 1e-5


def test_a_portable_process_has_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in portable.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert type(cpu_operations()) is CpuOperations
    assert not any(map(in_one_call, (torch.float32, torch.bfloat16, torch.int8)))


@needs_compiler
def test_compiling_side_by_side_leaves_one_whole_library(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", LOADS], env=environment) for _ in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "fastcfg").iterdir()] == [".so"]
