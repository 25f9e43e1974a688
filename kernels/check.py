"""Compiles every kernel for every target without a GPU, and gates what the compiler made of it.

Each case calls a kernel's own host function on meta tensors; the launch is caught and compiled with the tile sizes, types
and divisibility that it would have on that target. So is each entry of the shipped tables (see `tuned.py`), for the target
that it was measured on. The gates of a row:
- no spills: no stack bytes by cuobjdump, or none that the assembler calls spills;
- at most 255 registers (512 on gfx942), and shared memory within the target's limit;
- products use the target's matrix unit (wgmma on sm_90), and in their loops asynchronous copies (cp.async or TMA);
- on sm_90 the wgmma instructions of a loop do at most 1.25 times the multiply-adds asked for: no padding of 72 to 128.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcfg.errors import Error
from fastcfg.kernels._launch import TARGETS, Config, Grid, Lookup, family, interpreted, offline
from fastcfg.kernels.adaln import adaln
from fastcfg.kernels.attention import attention
from fastcfg.kernels.guided_step import guided_step
from fastcfg.kernels.linear import linear
from fastcfg.kernels.noise import noise
from fastcfg.kernels.patch_embed import patch_embed
from fastcfg.kernels.step_boundary import step_boundary
from fastcfg.kernels.tuned import Key, shipped_tables

MAX_WASTE = 1.25
MAX_PROCESSES = 8  # that compile at once: each is half a gigabyte
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a block
SHARED_LIMIT |= {"sm_86": 101376, "sm_89": 101376}  # less than others of their family
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}

_ASKS_OF_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One variant of a kernel: `call` runs its host function on meta tensors.

    product: whether tl.dot is in it; small: in tiles of under 64 rows, for which sm_90 and sm_100 have mma alone; loop:
    whether the product is in a loop. work: multiply-adds of one trip of that loop, from the launch's configuration.
    """

    variant: str
    call: Callable[[], Any]
    product: bool = False
    small: bool = False
    loop: bool = True
    work: Callable[[Config], int] | None = None


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses; failures are the gates that it does not pass. Numbers are None if it did not compile."""

    kernel: str
    variant: str
    target: str
    registers: int | None
    spills: int | None
    shared: int | None
    features: tuple[str, ...]
    failures: tuple[str, ...]

    def __str__(self) -> str:
        registers, spills, shared = ("-" if n is None else n for n in (self.registers, self.spills, self.shared))
        return _LINE.format(
            self.kernel, self.variant, self.target, registers, spills, shared, "+".join(self.features) or "-",
            "; ".join(self.failures) or "ok",
        )  # fmt: skip


_LINE = "{:14} {:26} {:7} {:>9} {:>6} {:>7}  {:14} {}"
HEADER = _LINE.format("kernel", "variant", "target", "registers", "spills", "shared", "uses", "verdict")


def check_kernels(
    targets: Sequence[str] = TARGETS, show: Callable[[str], object] = print, processes: int | None = None
) -> list[str]:
    """Compiles all cases and shipped entries for `targets`, shows a row for each, and returns the lines of those that fail.

    processes: how many compile at once; torch's number of threads, 8 at most, unless given. The order is the same for any.
    Raises Error for an unknown target, a damaged table, and in a process whose kernels are interpreted.
    """
    _refuse_interpreter()
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise Error(f"unknown targets {unknown}: known are {', '.join(TARGETS)}")
    tables = [table for table in shipped_tables() if family(table.target) in targets]
    tasks = [partial(_compile_nth, n, target) for n in range(len(_all_cases())) for target in targets]
    entries = [(entry, table.target) for table in tables for entry in table.entries]
    tasks += [partial(compile_entry, entry.key, config, target) for entry, target in entries for config in entry.configs]
    show(HEADER)
    failed = []
    for rows in _results(tasks, processes or min(torch.get_num_threads(), MAX_PROCESSES)):
        for line in map(str, rows):
            show(line)
        failed += [str(row) for row in rows if row.failures]
    return failed


def _results(tasks: Sequence[Callable[[], Any]], processes: int) -> Iterator[Any]:
    """What the tasks return, in their order."""
    if processes == 1:
        yield from (task() for task in tasks)
        return
    # Not forked: a process that has computed has threads, which a fork would lose
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(_call, tasks)


def _call(task: Callable[[], Any]) -> Any:
    return task()


@lru_cache
def _all_cases() -> tuple[Case, ...]:
    return tuple(cases())


def _compile_nth(n: int, target: str) -> list[Row]:
    """Case n is named by its number: what it calls cannot be sent to another process."""
    return compile_case(_all_cases()[n], target)


def compile_entry(key: Key, config: Config, target: str, heads: int = 16) -> list[Row]:
    """Compiles the launches that would take `config` for `key` from a table, on whatever paths a plan may ask for.

    That no launch would take it is a row that fails. heads: attention's, which its key leaves open.
    """
    asked: list[Key] = []
    try:
        case = tuned_case(key, config, heads)
        with offline(target, lambda kernel, grid, config, arguments: None, asked.append):
            case.call()
    except Error as error:
        return [_failed(key.kernel, str(key), target, str(error))]
    if set(asked) != {key}:
        return [_failed(key.kernel, str(key), target, f"launches of this kind ask for {asked[0]}")]
    return compile_case(case, target, {key: config}.get)


def _failed(kernel: str, variant: str, target: str, reason: str) -> Row:
    return Row(kernel, variant, target, None, None, None, (), (reason,))


def compile_case(case: Case, target: str, lookup: Lookup = lambda key: None) -> list[Row]:
    """Compiles every launch of the case for `target`, one row each. lookup: see `offline`."""
    _refuse_interpreter()
    rows: list[Row] = []

    def hook(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
        del grid
        name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        try:
            compiled = _compile(kernel, config, arguments, target)
        except Exception as error:  # whatever stops a compiler is a row of the report, not its end
            last = (str(error).strip().splitlines() or [""])[-1]
            reason = f"does not compile: {type(error).__name__}: {last}"
            rows.append(_failed(name, case.variant, target, reason))
            return
        rows.append(_inspect(name, case, target, config, compiled))

    with offline(target, hook, lookup):
        case.call()
    return rows


def _refuse_interpreter() -> None:
    if interpreted():
        raise Error("the kernel check compiles kernels, which TRITON_INTERPRET prevents: unset it")


def _compile(kernel: Any, config: Config, arguments: dict[str, Any], target: str) -> Any:
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    values = arguments | {name: value for name, value in config.items() if name not in options}
    # The interpreter drops names that a kernel lacks; a launch on a GPU ends with a KeyError
    surplus = sorted(values.keys() - {parameter.name for parameter in kernel.params})
    if surplus:
        raise Error(f"{kernel.fn.__name__} has no {', '.join(surplus)}, which its launch gives")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind, by_16 = _specialise(value, parameter.is_constexpr, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        if by_16 is not None:
            attributes[(i,)] = [["tt.divisibility", 16]] if by_16 else []
    source = ASTSource(kernel, signature, constants, attributes)
    if target.startswith("gfx"):
        return triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    return triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)


def _specialise(value: Any, constexpr: bool, unspecialised: bool) -> tuple[str, bool | None]:
    """The type that a launch gives an argument, and whether it is divisible by 16, None where a launch does not ask.

    No and None compile to the same, but as a launch has them, it finds in the compiler's cache what is compiled here.
    """
    constant = False if _ASKS_OF_CONSTANTS or isinstance(value, str) else None
    if constexpr or value is None or isinstance(value, bool):
        return "constexpr", constant
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>", None
    if isinstance(value, float):
        return "fp32", None
    if value == 1 and not unspecialised:
        return "constexpr", constant
    return "i32" if value < 2**31 else "i64", None if unspecialised else value % 16 == 0


def _inspect(name: str, case: Case, target: str, config: Config, compiled: Any) -> Row:
    shared, failures = compiled.metadata.shared, []
    features: tuple[str, ...]
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = _last(r"\.vgpr_count:\s*(\d+)", text), _last(r"\.vgpr_spill_count:\s*(\d+)", text)
        limit, features = 512, ("mfma",) if "v_mfma" in text else ()
    else:
        text = compiled.asm["ptx"]
        registers, stack = _resources(compiled.asm["cubin"])
        limit, spills, features = 255, _spilled(text) if stack else 0, _features(text)
    if spills:
        failures.append(f"spills {spills} bytes")
    if registers > limit:
        failures.append(f"{registers} registers, {limit} at most")
    most = SHARED_LIMIT.get(target, SHARED_LIMIT[family(target)])
    if shared > most:
        failures.append(f"{shared} bytes of shared memory, {most} at most")
    if case.product:
        failures += [f"no {what}" for what in _missing(case, target, features)]
    if case.work is not None and family(target) == "sm_90":
        waste = _wgmma_work(text) * config["num_warps"] / 4 / case.work(config)
        failures += [f"{waste:.2f} times the multiply-adds asked for"] if waste > MAX_WASTE else []
    return Row(name, case.variant, target, registers, spills, shared, features, tuple(failures))


def _features(ptx: str) -> tuple[str, ...]:
    signs = {
        "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "cp.async": "cp.async.c",
        "TMA": "cp.async.bulk.tensor",
    }  # fmt: skip
    return tuple(name for name, sign in signs.items() if sign in ptx)


def _missing(case: Case, target: str, features: Sequence[str]) -> Iterable[str]:
    """What a product on that target must use and does not."""
    unit = "mma" if case.small and target.startswith("sm_") else MATRIX_UNIT[family(target)]
    if unit not in features:
        yield unit
    if case.loop and target.startswith("sm_") and not {"cp.async", "TMA"} & set(features):
        yield "asynchronous copies"


def _wgmma_work(ptx: str) -> int:
    """Multiply-adds of all wgmma instructions in the text, each by one warp group (4 warps)."""
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    return sum(int(m) * int(n) * int(k) for m, n, k in shapes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin's kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = _run("cuobjdump", "-res-usage", file.name).stdout
    return _last(r"REG:(\d+)", printed), _last(r"STACK:(\d+)", printed)


def _spilled(ptx: str) -> int:
    """Bytes of spill stores. Not all stack is spills: cosine's reduction of large arguments keeps an array there, and some
    assemblers a frame of 8 bytes; so where there is a stack, the assembler is asked once more, and told to say."""
    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    blackwell = int(re.findall(r"\d+", target)[0]) >= 100
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        tool = "ptxas-blackwell" if blackwell else "ptxas"
        printed = _run(tool, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull).stderr
    return _last(r"(\d+) bytes spill stores", printed)


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the CUDA tools that triton ships."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    if not path.exists():
        raise Error(f"the kernel check needs the {tool} that triton ships, and there is none at {path}")
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise Error(f"the kernel check found no {pattern!r} in what the compiler printed")
    return int(found[-1])


def tuned_case(key: Key, config: Config, heads: int) -> Case:
    """The launches whose configuration is looked up as `key`: as DiT's DDIM with noise has them, and with every path on."""
    sizes, dtype = dict(key.shape), getattr(torch, key.dtype)
    name = f"{_short(dtype)} {' '.join(f'{name}={size}' for name, size in key.shape)}"
    if key.kernel == "linear":
        tokens = sizes["gate_tokens"]
        options = {"gate": bool(tokens), "gelu": bool(sizes["gelu"])}
        return _linear_case(name, dtype, tokens or 256, sizes["N"], sizes["K"], **options)
    if key.kernel == "attention":
        return _attention_case(name, dtype, sizes["tokens"], sizes["head_dim"], heads)
    if key.kernel == "step_boundary":
        small = config["TOKENS"] < 64
        return Case(name, partial(_boundaries, dtype, **sizes), product=True, small=small)
    if key.kernel == "adaln":
        return Case(name, partial(_adaln, sizes["D"], dtype))
    return Case(name, partial(_guided_steps, dtype, **sizes))


def _boundaries(dtype: torch.dtype, *, columns: int, D: int, learned: int) -> None:
    for every in (True, False):
        paths = {"history": every, "noise": True, "clip": every, "learned": bool(learned)}
        _boundary(dtype, 2, columns // 4, D, 32, paths, out_channels=columns // 2)


def _guided_steps(dtype: torch.dtype, *, elements: int) -> None:
    x, model_out = _meta(4, 1, elements), _meta(8, 2, elements, dtype=dtype)
    full = {"x0_prev": torch.empty_like(x), "clip": True, "learned": True}
    for paths in ({**full, "model_input": _meta(8, 1, elements, dtype=dtype)}, {}):
        guided_step(model_out, x, **_at_steps(noise=True), **paths)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def cases() -> Iterator[Case]:
    """Every kernel in the shapes of DiT-XL/2 at 256 px, and of the models that take other paths."""
    yield Case("", lambda: noise(_meta(4, dtype=torch.int64), _meta(4, dtype=torch.int64), 1, out=_samples()))
    for dtype in (torch.bfloat16, torch.float32):
        name = _short(dtype)
        yield from _step_cases(name, dtype)
        for D in (128, 1152):
            yield Case(f"{name} D={D}", partial(_adaln, D, dtype))
        yield from _linear_cases(name, dtype)
        yield from _attention_cases(name, dtype)
        yield from _boundary_cases(name, dtype)
    yield _linear_case("fp16 gate", torch.float16, 256, 1152, 1152)
    yield _attention_case("fp16 d=72 T=256", torch.float16, 256, 72)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _samples(C: int = 4, side: int = 32) -> Tensor:
    return _meta(4, C, side, side)


def _at_steps(C: int = 4, side: int = 32, **paths: bool) -> dict[str, Any]:
    """What both step kernels take, for four samples; paths: history and noise, on or off."""
    options: dict[str, Any] = {"coef": _meta(50, 10), "scale": _meta(50, 4), "step": _meta(4, dtype=torch.int32)}
    if paths.get("history"):
        options["x0_prev"] = _samples(C, side)
    if paths.get("noise"):
        options |= {"seeds": _meta(4, dtype=torch.int64), "indices": _meta(4, dtype=torch.int64)}
    return options


def _step_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    model_out = _meta(8, 8, 32, 32, dtype=dtype)
    everything = _at_steps(history=True, noise=True) | {"channels": 3, "clip": True, "learned": True}
    twice = {"model_input": _meta(8, 4, 32, 32, dtype=dtype)}
    yield Case(f"{name} every path", lambda: guided_step(model_out, _samples(), **everything, **twice))
    if dtype == torch.float32:
        return
    yield Case(f"{name} ddim", lambda: guided_step(model_out, _samples(), **_at_steps()))
    yield Case(f"{name} unguided", lambda: guided_step(model_out[:4], _samples(), **_at_steps()))
    yield Case(f"{name} rescale", lambda: guided_step(model_out, _samples(), **everything, **twice, rescale=0.7))


def _adaln(D: int, dtype: torch.dtype) -> None:
    adaln(_meta(4, 256, D, dtype=dtype), _meta(9, 6 * D, dtype=dtype), _meta(8, dtype=torch.int32), 0, D)


def _linear(dtype: torch.dtype, T: int, N: int, K: int, *, gate: bool = True, gelu: bool = False) -> None:
    h, weight, bias = _meta(8, T, K, dtype=dtype), _meta(N, K, dtype=dtype), _meta(N, dtype=dtype)
    gating: dict[str, Any] = {}
    if gate:
        table, index = _meta(9, 6 * N, dtype=dtype), _meta(8, dtype=torch.int32)
        gating = {"residual": _meta(8, T, N, dtype=dtype), "table": table, "index": index, "gate_column": 2 * N}
    linear(h, weight, bias, gelu=gelu, **gating)


def _tile_work(config: Config) -> int:
    return config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_K"]


def _linear_case(variant: str, dtype: torch.dtype, T: int, N: int, K: int, **options: bool) -> Case:
    work = None if dtype == torch.float32 else _tile_work  # float32 takes three passes
    return Case(variant, partial(_linear, dtype, T, N, K, **options), product=True, work=work)


def _linear_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    variants: tuple[tuple[str, int, int, int, dict[str, bool]], ...] = (
        ("gelu", 256, 4608, 1152, {"gate": False, "gelu": True}),
        ("gate", 256, 1152, 4608, {}),
        ("gate T=64", 64, 384, 384, {}),
        ("gate T=49", 49, 128, 512, {}),
        ("bias", 256, 32, 1152, {"gate": False}),
        ("gate unaligned", 49, 98, 98, {}),
    )
    for variant, T, N, K, options in variants:
        yield _linear_case(f"{name} {variant}", dtype, T, N, K, **options)


def _attention(dtype: torch.dtype, T: int, head_dim: int, heads: int = 4) -> None:
    attention(_meta(4, T, 3 * heads * head_dim, dtype=dtype), heads)


def _head_work(head_dim: int) -> Callable[[Config], int]:
    return lambda config: 2 * config["BLOCK_M"] * config["BLOCK_N"] * head_dim


def _attention_case(variant: str, dtype: torch.dtype, T: int, head_dim: int, heads: int = 4) -> Case:
    work = None if dtype == torch.float32 else _head_work(head_dim)
    return Case(variant, partial(_attention, dtype, T, head_dim, heads), product=True, loop=T > 64, work=work)


def _attention_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    for T, head_dim in ((256, 64), (256, 72), (256, 128), (49, 32), (250, 72), (256, 16))[: 3 if name == "fp32" else None]:
        yield _attention_case(f"{name} d={head_dim} T={T}", dtype, T, head_dim)


def _boundary(
    dtype: torch.dtype, p: int, C: int, D: int, side: int, paths: dict[str, Any], out_channels: int | None = None
) -> None:
    T, x = (side // p) ** 2, _samples(C, side)
    embedding = {"embed_weight": _meta(D, C, p, p, dtype=dtype), "embed_bias": _meta(D, dtype=dtype)}
    embedding |= {"position": _meta(T, D, dtype=dtype), "tokens": _meta(4, T, D, dtype=dtype)}
    outputs = p * p * (out_channels or C * (2 if paths.get("learned") else 1))
    options = {key: value for key, value in paths.items() if key not in ("history", "noise")}
    step_boundary(
        _meta(8, T, D, dtype=dtype), _meta(9, 2 * D, dtype=dtype), _meta(8, dtype=torch.int32), 0, D,
        _meta(outputs, D, dtype=dtype), _meta(outputs, dtype=dtype), x, **_at_steps(C, side, **paths), patch=p, out=x,
        **embedding, **options,
    )  # fmt: skip


def _boundary_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    every = {"history": True, "noise": True, "learned": True, "clip": True}
    variants: tuple[tuple[str, int, int, int, int, dict[str, bool]], ...] = (
        ("p=2 every path", 2, 4, 1152, 32, every),
        ("p=4 every path", 4, 4, 384, 32, every),
        ("p=2 ddim", 2, 4, 1152, 32, {}),
        ("p=4 C=1 history", 4, 1, 128, 28, {"history": True, "clip": True}),
    )
    for variant, p, C, D, side, paths in variants[: 2 if dtype == torch.float32 else None]:
        call = partial(_boundary, dtype, p, C, D, side, paths)
        yield Case(f"{name} {variant}", call, product=True, small=dtype == torch.float32 and C * p * p > 32)
    for p, C, D in ((2, 4, 1152), (8, 4, 384)):
        weights = (_meta(D, C, p, p, dtype=dtype), _meta(D, dtype=dtype), _meta((32 // p) ** 2, D, dtype=dtype))
        yield Case(f"{name} p={p}", partial(patch_embed, _samples(C), *weights), product=True, small=True)
