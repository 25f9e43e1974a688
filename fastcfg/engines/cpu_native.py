"""The fused program's operations on a CPU, with C for what lies between the products, where it can be compiled.

torch needs several passes over memory, and several calls, for what is one of each there: a small model's step is mostly calls.
The compiler is the machine's own, as for Triton; the library is kept beside the remembered choices, one for each processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcfg import portable
from fastcfg.engines.choice import cpuinfo, machine, memory_path
from fastcfg.engines.cpu_ops import CpuOperations, Gate, Tokens
from fastcfg.errors import Error
from fastcfg.files import replacing
from fastcfg.noise import box_muller

# The first includes the others
SOURCES = [
    Path(__file__).with_name(name)
    for name in ("cpu_network.c", "cpu_kernels.c", "cpu_attention.c", "cpu_products.h", "cpu_vectors.h")
]
# Without contraction: where a * b + c is to be rounded once, the source says so
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-w", "-pthread", "-shared", "-fPIC")
# The library's numbers for what is in an array: float64 in model_out alone, to which classifiers add; int8 in a layer's weight
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3}

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "fastcfg_adaln": [_POINTER] * 4 + [_LONG] * 7 + [_FLOAT, _INT],
    "fastcfg_gate": [_POINTER] * 5 + [_LONG] * 6 + [_INT],
    "fastcfg_quantise": [_POINTER] * 3 + [_LONG] * 2 + [_INT],
    "fastcfg_hidden": [_POINTER] * 5 + [_LONG] * 2,
    "fastcfg_dequantise": [_POINTER] * 4 + [_LONG],
    "fastcfg_embed": [_POINTER] * 3 + [_LONG],
    "fastcfg_denoise": [_POINTER] * 2 + [_LONG],
    "fastcfg_denoise_scratch": [_POINTER] + [_LONG] * 2,
    "fastcfg_loop": [_POINTER] * 2 + [_LONG],
    "fastcfg_layer_scratch": [_POINTER],
    "fastcfg_layer_products": [_POINTER] * 3 + [_LONG],
    "fastcfg_products": [_POINTER] * 2 + [_LONG, _INT],
    "fastcfg_team": [_POINTER],
    "fastcfg_team_size": [],
    "fastcfg_help": [_POINTER],
    "fastcfg_dismiss": [_POINTER],
    "fastcfg_columns": [],
    "fastcfg_has_float32": [],
    "fastcfg_has_int8": [],
    "fastcfg_attention": [_POINTER] * 3 + [_LONG] * 4 + [_INT],
    "fastcfg_attention_scratch": [_LONG] * 2,
    "fastcfg_philox": [_POINTER] * 5 + [_LONG] * 2,
    "fastcfg_guided_step": [_POINTER] * 7 + [_LONG] * 6 + [_INT] * 2,
}
_SIZES = [name for name in _SIGNATURES if name.endswith(("_scratch", "_size", "_columns"))]


class _Stream(ctypes.Structure):
    """`Stream` of the library: addresses and sizes of a `Gate`, or of a plain result."""

    _fields_: ClassVar = [
        *((name, _POINTER) for name in ("residual", "table", "index", "out")),
        *((name, _LONG) for name in ("sources", "T", "D", "width", "column")),
        ("kind", _INT),
    ]


class Kernels(NamedTuple):
    """The compiled library, or why there is none."""

    library: Any | None
    why: str = ""


def cpu_operations(quantise: bool = False) -> CpuOperations:
    """The fastest operations here. In a portable process torch's alone: its libraries can be held to one arithmetic."""
    library = None if portable.active() else kernels().library
    return CpuOperations(quantise) if library is None else NativeOperations(library, quantise)


@lru_cache
def kernels() -> Kernels:
    """The library of `cpu_network.c` for this processor, compiled once a machine."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return Kernels(None, "no C compiler was found")
    try:
        command = [*shlex.split(compiler), *FLAGS]
    except ValueError as error:
        return Kernels(None, f"CC is no command: {error}")
    # Machines of one name and one home folder may differ in what they can do
    instructions = cpuinfo("flags", "Features") or torch.backends.cpu.get_cpu_capability()
    made_of = "\n".join([machine(), instructions, *command]).encode() + b"".join(source.read_bytes() for source in SOURCES)
    path = None
    with contextlib.suppress(OSError, RuntimeError):  # not there yet, or damaged; no home folder
        path = memory_path().with_name(f"cpu-kernels-{hashlib.sha256(made_of).hexdigest()[:16]}.so")
        return Kernels(_declared(path))
    try:
        return Kernels(_compiled(command, path))
    except (OSError, RuntimeError, Error, subprocess.SubprocessError) as error:
        return Kernels(None, f"{compiler} could not compile them: {error}")


def _compiled(command: list[str], path: Path | None) -> Any:
    """Compiles the library to `path`; where nothing can be written there, to a place that is gone after loading."""
    with tempfile.TemporaryDirectory(prefix="fastcfg-") as folder:
        built = Path(folder) / "cpu-kernels.so"
        done = subprocess.run(
            [*command, "-o", str(built), str(SOURCES[0]), "-lm"], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0])
        if path is not None:
            with contextlib.suppress(OSError, Error):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    shutil.copyfile(built, temporary)
                return _declared(path)  # from here if it can be: temporary folders are often mounted noexec
        return _declared(built)


def _declared(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    for name in _SIZES:
        getattr(library, name).restype = _LONG
    for name in ("fastcfg_has_float32", "fastcfg_has_int8"):
        getattr(library, name).restype = _INT
    return library


class NativeOperations(CpuOperations):
    """`CpuOperations` with the compiled library between the products. Its kernels are those of one core, and hold no lock
    of Python's while they run."""

    def __init__(self, library: Any, quantise: bool = False):
        super().__init__(quantise)
        self.library = library

    def adaln(
        self,
        x: Tensor,
        table: Tensor,
        index: Tensor,
        shift_column: int,
        scale_column: int,
        *,
        eps: float = 1e-6,
        out: Tensor | None = None,
    ) -> Tensor:
        (B, T, D), R = x.shape, len(index)
        x, table, index = x.contiguous(), table.float().contiguous(), index.int().contiguous()
        out = x.new_empty(R, T, D) if out is None else out
        self.library.fastcfg_adaln(
            x.data_ptr(), table.data_ptr(), index.data_ptr(), out.data_ptr(),
            R, B, T, D, table.shape[1], shift_column, scale_column, eps, KINDS[x.dtype],
        )  # fmt: skip
        return out

    def guided_step(
        self,
        model_out: Tensor,
        x: Tensor,
        coef: Tensor,
        scale: Tensor,
        step: Tensor,
        *,
        x0_prev: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        indices: Tensor | None = None,
        channels: int | None = None,
        rescale: float = 0.0,
        clip: bool = False,
        learned: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        if rescale or learned:
            return super().guided_step(
                model_out, x, coef, scale, step, x0_prev=x0_prev, noise=noise, seeds=seeds, indices=indices,
                channels=channels, rescale=rescale, clip=clip, learned=learned, out=out,
            )  # fmt: skip
        z = self.step_noise(coef, step, x, noise, seeds, indices)
        moved = (x if out is x else x.clone()).contiguous()
        model_out, z = model_out.contiguous(), None if z is None else z.float().contiguous()
        (B, C), (halves, outputs) = x.shape[:2], (len(model_out) // len(x), model_out.shape[1])
        scale, step = scale.float().contiguous(), step.int().contiguous()
        self.library.fastcfg_guided_step(
            model_out.data_ptr(), moved.data_ptr(), address(x0_prev), address(z),
            coef.data_ptr(), scale.data_ptr(), step.data_ptr(),
            halves, B, C, outputs, x[0, 0].numel(), C if channels is None else channels, clip, KINDS[model_out.dtype],
        )  # fmt: skip
        return moved if out is None or out is moved else out.copy_(moved)

    def _drawn(self, seeds: Tensor | None, indices: Tensor | None, step: Tensor, x: Tensor) -> Tensor:
        """`fastcfg.noise.normal` of each sample at its own step, to the bit: only whole numbers are made elsewhere."""
        assert seeds is not None
        assert indices is not None
        words = torch.empty(2, *x.shape, dtype=torch.int32)
        counter = step + 1
        self.library.fastcfg_philox(
            seeds.data_ptr(), indices.data_ptr(), counter.data_ptr(), words[0].data_ptr(), words[1].data_ptr(),
            len(x), x[0].numel(),
        )  # fmt: skip
        return torch.from_numpy(box_muller(list(words.numpy().view(np.uint32))))

    def _attended(self, qkv: Tensor, heads: int, out: Tensor | None) -> Tensor:
        R, T, width = qkv.shape
        D, d = width // 3, width // (3 * heads)
        qkv = qkv.contiguous()
        out = qkv.new_empty(R, T, D) if out is None else out
        scratch = torch.empty(self.library.fastcfg_attention_scratch(T, d), dtype=torch.float32)
        self.library.fastcfg_attention(
            qkv.data_ptr(), out.data_ptr(), scratch.data_ptr(), R, T, heads, d, KINDS[qkv.dtype]
        )  # fmt: skip
        return out

    def _gated(self, y: Tensor, gate: Gate, out: Tensor | None) -> Tensor:
        gate, y = gate.packed(), y.contiguous()
        out = y if out is None else out
        R, T, D = y.shape
        self.library.fastcfg_gate(
            y.data_ptr(), gate.residual.data_ptr(), gate.table.data_ptr(), gate.index.data_ptr(), out.data_ptr(),
            R, len(gate.residual), T, D, gate.table.shape[1], gate.column, KINDS[y.dtype],
        )  # fmt: skip
        return out

    def _quantised(self, h: Tensor) -> Tokens:
        h = h.contiguous()
        scale = torch.empty(*h.shape[:-1], 1, dtype=torch.float32)
        tokens = Tokens(torch.empty(h.shape, dtype=torch.uint8), scale, h.dtype)
        self.library.fastcfg_quantise(
            h.data_ptr(), tokens.whole.data_ptr(), tokens.scale.data_ptr(),
            tokens.scale.numel(), h.shape[-1], KINDS[h.dtype],
        )  # fmt: skip
        return tokens

    def _hidden(self, y: Tensor, tokens: Tokens, bias: Tensor) -> Tokens:
        hidden = Tokens(torch.empty(y.shape, dtype=torch.uint8), tokens.scale.clone(), tokens.dtype)
        scratch = torch.empty(y.shape[-1], dtype=torch.float32)
        self.library.fastcfg_hidden(
            y.data_ptr(), hidden.scale.data_ptr(), bias.data_ptr(), scratch.data_ptr(), hidden.whole.data_ptr(),
            hidden.scale.numel(), y.shape[-1],
        )  # fmt: skip
        return hidden

    def _dequantised(self, y: Tensor, tokens: Tokens, bias: Tensor, gate: Gate | None, out: Tensor | None) -> Tensor:
        out = y if out is None and tokens.dtype == torch.float32 else out
        to, out, _kept = _stream(y.shape, tokens.dtype, gate, out)
        self.library.fastcfg_dequantise(
            y.data_ptr(), tokens.scale.data_ptr(), bias.data_ptr(), ctypes.byref(to), tokens.scale.numel()
        )
        return out


def _stream(
    shape: tuple[int, ...], dtype: torch.dtype, gate: Gate | None, out: Tensor | None
) -> tuple[_Stream, Tensor, Gate | None]:
    """(where a result of this shape goes, its tensor, and what has to live as long)."""
    R, T, D = shape
    out = torch.empty(shape, dtype=dtype) if out is None else out
    if gate is None:
        return _Stream(None, None, None, out.data_ptr(), R, T, D, 0, 0, KINDS[dtype]), out, None
    gate = gate.packed()
    places = (gate.residual.data_ptr(), gate.table.data_ptr(), gate.index.data_ptr(), out.data_ptr())
    return _Stream(*places, len(gate.residual), T, D, gate.table.shape[1], gate.column, KINDS[dtype]), out, gate


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor lies; None of none."""
    return None if tensor is None else tensor.data_ptr()
