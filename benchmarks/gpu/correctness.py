"""Correctness before speed: kernels against float64, golden files, bits across batches, graphs against plain launches."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcfg
from fastcfg.models.dit import DiT, DiTConfig
from fastcfg.verify import verify
from gpu.cases import Case, cases
from gpu.report import Session, sync

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TINY: dict[str, Any] = {"input_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 1, "num_classes": 5}


def random_dit(**config: Any) -> DiT:
    """A DiT in which every weight matters: none of the zeros that training starts from."""
    module = DiT(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25)
    return module


def kernels(session: Session) -> None:
    """Errors against float64, over what is allowed: twice torch's in the same precision, or two rounding steps."""
    for config, dtype in _shapes(session):
        for case in cases(config, 1 if session.dry else 3, dtype, session.device):
            if session.left() <= 0:
                return session.report.row("kernels", "stopped: out of time", "note")
            error, allowed = _error(case)
            verdict = "ok" if error <= allowed else "EXCEEDS"
            session.report.row(
                case.name, error, f"relative, {verdict}", shape=case.shape, dtype=dtype, fraction=error / allowed
            )
    return None


def _shapes(session: Session) -> Iterator[tuple[DiTConfig, torch.dtype]]:
    if session.dry:
        yield DiTConfig(**TINY), torch.float32
        return
    for name in ("DiT-S/2", "DiT-XL/2"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield config_of(name), dtype


def config_of(name: str) -> DiTConfig:
    with torch.device("meta"):
        return DiT.from_name(name, depth=1).config


def _error(case: Case) -> tuple[float, float]:
    """(largest error, what is allowed) of the output that comes nearest to it, or exceeds it most."""
    found = []
    for got, exact, low in zip(case.outputs(), case.exact(), case.low(), strict=True):
        allowed = max(2 * _distance(low, exact), 2 * torch.finfo(got.dtype).eps)
        found.append((_distance(got, exact), allowed))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _distance(value: Tensor, exact: Tensor) -> float:
    """In terms of the largest exact value; infinite if there is a NaN."""
    distance = float((value.double() - exact.double()).abs().max() / exact.double().abs().max())
    return float("inf") if distance != distance else distance


def network(session: Session) -> None:
    """A sample in low precision against the reference engine's in float32, over twice what that engine loses in the same."""
    config = TINY if session.dry else {"depth": 4, "hidden_size": 384, "num_heads": 6}
    module = random_dit(**config)
    labels, names = [1, 4, 0], ("fp16",) if session.dry else ("bf16", "fp16")
    for solver in ({"eta": 0.5}, {"rescale": 0.7}):
        exact = sampler(session, 3, module, "fp32", engine="reference", **solver)(labels, 2.0, 7)
        for name in names:
            got, low = (
                sampler(session, 3, module, name, engine=one, **solver)(labels, 2.0, 7) for one in ("cuda", "reference")
            )
            error, torchs = (float((value - exact).norm() / exact.norm()) for value in (got, low))
            verdict = "ok" if error <= 2 * torchs else "EXCEEDS"
            session.report.row(f"{name} {solver}", error, f"relative, {verdict}", fraction=error / (2 * torchs))


def golden(session: Session) -> None:
    """The official code's outputs through the engine, in float32. Whether a clipped loop is within the limit is chance."""
    pair = GOLDEN / "dit_tiny.weights.safetensors", GOLDEN / "dit_tiny.expected.safetensors"
    for comparison in verify(*pair, engine="cuda", dtype="fp32"):
        value = "missing" if comparison.relative is None else comparison.relative
        verdict = "ok" if comparison.ok else "EXCEEDS"
        note = "ill-conditioned: docs/design.md, Exactness" if "_clip" in comparison.name else ""
        session.report.row(comparison.name, value, f"relative, {verdict}", shape=note, dtype=torch.float32)
        if session.dry or session.left() <= 0:
            return session.report.row("golden", "stopped: a dry run, or out of time", "note")
    return None


def sampler(session: Session, batch: int, module: nn.Module, dtype: str, **options: Any) -> fastcfg.Sampler:
    fixed: dict[str, Any] = {"steps": 2 if session.dry else 25, "engine": "cuda", "device": str(session.device)}
    return fastcfg.Sampler(module, **{**fixed, "batch": batch, "dtype": dtype, **options})


def invariance(session: Session) -> None:
    """A sample alone, among 3 and among 32: the same bits. NumPy, which multiplies in a dry run, holds this only where a
    row keeps its place in a tile: there all labels are the same, and a sample's 64 tokens are one tile."""
    config = {**TINY, "input_size": 16} if session.dry else {"depth": 4, "hidden_size": 384, "num_heads": 6}
    module = random_dit(**config)
    most = 3 if session.dry else 32
    labels = [0 if session.dry else b % 5 for b in range(most)]
    for name in ("fp32",) if session.dry else ("bf16", "fp16", "fp32"):
        whole = sampler(session, most, module, name, eta=0.5)(labels, 4.0, list(range(most)))
        for rows in (1, 3):
            some = sampler(session, rows, module, name, eta=0.5)(labels[:rows], 4.0, list(range(rows)))
            _equal(session, f"{rows} of {most} rows, {name}", some, whole[:rows])


def graphs(session: Session) -> None:
    """Replays against plain launches, the caller's generators and streams, and memory over many calls."""
    module = random_dit(**TINY)
    kinds: tuple[dict[str, Any], ...] = (
        {"eta": 0.5}, {"interval": (0, 600)}, {"solver": "ddpm"}, {"rescale": 0.7, "solver": "dpmpp_2m"},
    )  # fmt: skip
    for options in kinds:
        one = sampler(session, 2, module, "fp32", **options)
        before = _generator(session)
        replayed = [one([1, 4], 4.0, seed) for seed in (0, 1)][1]
        _equal(session, f"generator untouched {options}", before, _generator(session))
        (loop,) = one.engine._loops.values()  # type: ignore[attr-defined]
        loop.graphs.span = 0
        _equal(session, f"replay is the plain loop {options}", replayed, one([1, 4], 4.0, 1))
    _streams(session, module)
    _after_a_failure(session, module)
    _memory(session, sampler(session, 1, module, "fp32"))


def _streams(session: Session, module: DiT) -> None:
    """A given x_T that is still being written on the caller's stream, and a result that it reads at once."""
    if session.device.type != "cuda":
        return
    one = sampler(session, 2, module, "fp32")
    x_T = torch.randn(2, *one.model.shape, device=session.device)
    want = one([1, 4], 4.0, 0, x_T=x_T) + 1
    with torch.cuda.stream(torch.cuda.Stream(session.device)):
        for _ in range(5):
            late = torch.full_like(x_T, float("nan"))
            torch.cuda._sleep(10_000_000)
            late.copy_(x_T)
            got = one([1, 4], 4.0, 0, x_T=late) + 1
        sync(session.device)
    _equal(session, "order on the caller's stream", got, want)


def _after_a_failure(session: Session, module: DiT) -> None:
    """A module that cannot be captured is refused, and neither other samplers nor torch's generator suffer from it. A dry run
    captures nothing."""
    one = sampler(session, 2, module, "fp32", eta=0.5)
    want = one([1, 4], 4.0, 0)
    foreign = {"null_label": 5, "num_classes": 5, "shape": one.model.shape, "schedule": "linear"}
    fails = sampler(session, 2, _Waiting(module).eval(), "fp32", **foreign)
    try:
        fails([1, 4], 4.0, 0)
        refused = session.dry
    except fastcfg.Error:
        refused = True
    session.report.row("a step that waits", int(refused), "refused" if refused else "bits DIFFER: it was captured")
    again = sampler(session, 2, module, "fp32", eta=0.5)  # which captures anew
    for _ in range(2):
        got = again([1, 4], 4.0, 0)
    _equal(session, "a capture after one that failed", got, want)
    torch.randn(1, device=session.device)


class _Waiting(nn.Module):
    """Waits for the device in its forward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t[0].item() >= 0
        return self.inner(x, t, y)


def _memory(session: Session, one: fastcfg.Sampler) -> None:
    calls = 2 if session.dry else 1000
    for seed in range(2):
        one([1], 4.0, seed)
    before = _used(session)
    done = 0
    while done < calls and session.left() > 0:
        one([1], 4.0, done)
        done += 1
    device, host = (after - start for after, start in zip(_used(session), before, strict=True))
    session.report.row("growth on the device", device, "bytes", shape=f"{done} calls")
    session.report.row("growth on the host", host, "KiB", shape=f"{done} calls")


def _used(session: Session) -> tuple[int, int]:
    sync(session.device)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (torch.cuda.memory_allocated(session.device) if session.device.type == "cuda" else 0), host


def _generator(session: Session) -> Tensor:
    return torch.cuda.get_rng_state(session.device) if session.device.type == "cuda" else torch.get_rng_state()


def _equal(session: Session, name: str, got: Tensor, want: Tensor) -> None:
    same = torch.equal(got, want)
    session.report.row(name, int(same), "bits equal" if same else "bits DIFFER")
