"""The fused program's operations on a CPU with `cpu_kernels.c` for what lies between the products, where it can be compiled.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcfg import portable
from fastcfg.engines.choice import cpuinfo, machine, memory_path
from fastcfg.engines.cpu_ops import CpuOperations, Gate
from fastcfg.errors import Error
from fastcfg.files import replacing
from fastcfg.noise import box_muller

SOURCE = Path(__file__).with_name("cpu_kernels.c")
# Without contraction: where a * b + c is to be rounded once, the source says so
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-w", "-shared", "-fPIC")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # the last for model_out alone, to which classifiers add

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "fastcfg_adaln": [_POINTER] * 4 + [_LONG] * 7 + [_FLOAT, _INT],
    "fastcfg_gate": [_POINTER] * 5 + [_LONG] * 6 + [_INT],
    "fastcfg_quantise": [_POINTER] * 3 + [_LONG] * 2 + [_INT],
    "fastcfg_dequantise": [_POINTER] * 3 + [_INT] + [_POINTER] * 4 + [_LONG] * 6 + [_INT],
    "fastcfg_attention": [_POINTER] * 3 + [_LONG] * 4 + [_INT],
    "fastcfg_attention_scratch": [_LONG] * 2,
    "fastcfg_philox": [_POINTER] * 5 + [_LONG] * 2,
    "fastcfg_guided_step": [_POINTER] * 6 + [_LONG] * 6 + [_INT] * 2,
}


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
    """The library of `cpu_kernels.c` for this processor, compiled once a machine."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return Kernels(None, "no C compiler was found")
    command = [*shlex.split(compiler), *FLAGS]
    # Machines of one name and one home folder may differ in what they can do
    instructions = cpuinfo("flags", "Features") or torch.backends.cpu.get_cpu_capability()
    made_of = "\n".join([machine(), instructions, *command]).encode() + SOURCE.read_bytes()
    path = memory_path().with_name(f"cpu-kernels-{hashlib.sha256(made_of).hexdigest()[:16]}.so")
    with contextlib.suppress(OSError):  # not there yet, or damaged
        return Kernels(_declared(path))
    try:
        return Kernels(_compiled(command, path))
    except (OSError, RuntimeError, Error, subprocess.SubprocessError) as error:
        return Kernels(None, f"{compiler} could not compile them: {error}")


def _compiled(command: list[str], path: Path) -> Any:
    """Compiles the library to `path`; where nothing can be written there, to a place that is gone after loading."""
    with tempfile.TemporaryDirectory(prefix="fastcfg-") as folder:
        built = Path(folder) / path.name
        done = subprocess.run(
            [*command, "-o", str(built), str(SOURCE), "-lm"], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise RuntimeError((done.stderr or f"exit code {done.returncode}").strip().splitlines()[0])
        library = _declared(built)
        with contextlib.suppress(OSError, Error):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                shutil.copyfile(built, temporary)
        return library


def _declared(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.fastcfg_attention_scratch.restype = _LONG
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

    def _step(
        self,
        model_out: Tensor,
        x: Tensor,
        history: Tensor | None,
        z: Tensor | None,
        rows: Tensor,
        s: Tensor,
        guided: int,
        rescale: float,
        clip: bool,
        learned: bool,
    ) -> Tensor:
        if rescale or learned:
            return super()._step(model_out, x, history, z, rows, s, guided, rescale, clip, learned)
        (B, C), (halves, outputs) = x.shape[:2], (len(model_out) // len(x), model_out.shape[1])
        model_out, z = model_out.contiguous(), None if z is None else z.float().contiguous()
        self.library.fastcfg_guided_step(
            model_out.data_ptr(), x.data_ptr(), _address(history), _address(z), rows.data_ptr(), s.data_ptr(),
            halves, B, C, outputs, x[0, 0].numel(), guided, clip, KINDS[model_out.dtype],
        )  # fmt: skip
        return x

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
        scratch = torch.empty(self.library.fastcfg_attention_scratch(T, d))
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

    def _quantise_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        M, K = tokens.shape
        tokens = tokens.contiguous()
        whole, scale = torch.empty(M, K, dtype=torch.uint8), torch.empty(M, 1)
        self.library.fastcfg_quantise(tokens.data_ptr(), whole.data_ptr(), scale.data_ptr(), M, K, KINDS[tokens.dtype])
        return whole, scale

    def _dequantised(
        self, y: Tensor, scale: Tensor, bias: Tensor, gelu: bool, gate: Gate | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        (R, T, D), y = y.shape, y.contiguous()
        if out is None:
            out = y if dtype == torch.float32 else torch.empty(R, T, D, dtype=dtype)
        places: tuple[int | None, ...] = (None, None, None)
        sources, width, column = R, 0, 0
        if gate is not None:
            gate = gate.packed()
            places = (gate.residual.data_ptr(), gate.table.data_ptr(), gate.index.data_ptr())
            sources, width, column = len(gate.residual), gate.table.shape[1], gate.column
        self.library.fastcfg_dequantise(
            y.data_ptr(), scale.data_ptr(), bias.data_ptr(), gelu, *places, out.data_ptr(),
            R, sources, T, D, width, column, KINDS[dtype],
        )  # fmt: skip
        return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
