"""Every kernel on a model's shapes and random data, with its definition and its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcfg.kernels._launch import Cost
from fastcfg.kernels._step import step_table
from fastcfg.kernels.adaln import adaln, adaln_cost, adaln_ref
from fastcfg.kernels.attention import attention, attention_cost, attention_ref
from fastcfg.kernels.guided_step import guided_step, guided_step_cost, guided_step_ref
from fastcfg.kernels.linear import linear, linear_cost, linear_ref
from fastcfg.kernels.noise import noise, noise_cost, noise_ref
from fastcfg.kernels.patch_embed import patch_embed, patch_embed_cost, patch_embed_ref
from fastcfg.kernels.step_boundary import step_boundary, step_boundary_cost, step_boundary_ref
from fastcfg.kernels.tuned import Config
from fastcfg.models.dit import DiTConfig
from fastcfg.plan import make_plan
from fastcfg.schedules import linear as linear_schedule

STEPS = 4
WRITTEN = ("tokens",)  # what kernels write beside `out`


@dataclass
class Case:
    """One launch. given: its tensors, floating ones in the precision they are stored in. product: bound by arithmetic."""

    name: str
    shape: str
    kernel: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    given: dict[str, Any]
    options: dict[str, Any]
    out: Tensor
    cost: Cost
    product: bool = False

    def run(self, config: Config | None = None) -> Tensor:
        return self.kernel(**self.given, **self.options, out=self.out, config=config)

    def outputs(self, config: Config | None = None) -> list[Tensor]:
        """All that the kernel writes, NaN where it does not."""
        written = [self.out, *(self.given[name] for name in WRITTEN if name in self.given)]
        for tensor in written:
            tensor.fill_(float("nan"))
        self.run(config)
        return [tensor.clone() for tensor in written]

    def exact(self) -> list[Tensor]:
        """`outputs` of the definition in float64."""
        return self._defined(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def low(self) -> list[Tensor]:
        """`outputs` of the definition by torch in the kernel's own precision."""
        return self._defined(torch.clone)

    def _defined(self, form: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = {name: form(value) if isinstance(value, Tensor) else value for name, value in self.given.items()}
        out = self.definition(**given, **self.options, out=torch.empty_like(form(self.out)))
        return [out, *(given[name] for name in WRITTEN if name in given)]


def cases(config: DiTConfig, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every launch of a guided step of `batch` samples, and of what comes before the first."""
    generator = torch.Generator(device).manual_seed(0)
    D, T, F, heads = config.hidden_size, config.tokens, config.mlp_width, config.num_heads
    R = 2 * batch

    def randn(*shape: int, dtype: torch.dtype = dtype, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    table = randn(2 * STEPS, 6 * D)
    index = torch.arange(R, dtype=torch.int32, device=device) % len(table)
    h = randn(R, T, D)
    given = {"x": h, "table": table, "index": index}
    out = empty(R, T, D)
    columns = {"shift_column": 0, "scale_column": D}
    yield Case("adaln", str([R, T, D]), adaln, adaln_ref, given, columns, out, adaln_cost(h, table, index, out=out))
    for name, N, K in (("qkv", 3 * D, D), ("proj", D, D), ("fc1", F, D), ("fc2", D, F)):
        a, weight, out = randn(R, T, K), randn(N, K, spread=K**-0.5), empty(R, T, N)
        given = {"h": a, "weight": weight, "bias": randn(N)}
        options: dict[str, Any] = {"gelu": name == "fc1"}
        residual = randn(R, T, N) if name in ("proj", "fc2") else None
        if residual is not None:
            given |= {"residual": residual, "table": table, "index": index}
            options |= {"gate_column": 2 * D}
        cost = linear_cost(a, weight, residual=residual, out=out)
        yield Case(f"linear {name}", f"{R * T} x {K} x {N}", linear, linear_ref, given, options, out, cost, product=True)
    qkv, out = randn(R, T, 3 * D), empty(R, T, D)
    shape = f"{R} x {heads} x {T} x {D // heads}"
    yield Case(
        "attention", shape, attention, attention_ref, {"qkv": qkv}, {"heads": heads}, out, attention_cost(qkv), product=True
    )
    yield from _ends(config, batch, randn, {"h": h, "table": table, "index": index})


def _ends(config: DiTConfig, batch: int, randn: Callable[..., Tensor], trunk: dict[str, Tensor]) -> Iterator[Case]:
    """The kernels at the ends of a step, on float32 samples."""
    D, p, C, side = config.hidden_size, config.patch_size, config.in_channels, config.input_size
    device = trunk["h"].device
    x = randn(batch, C, side, side, dtype=torch.float32)
    out = torch.full_like(x, float("nan"))
    plan = make_plan(linear_schedule(), steps=STEPS, eta=0.5)
    step = torch.arange(batch, dtype=torch.int32, device=device) % STEPS
    counters = {name: torch.arange(batch, device=device) + offset for name, offset in (("seeds", 7), ("indices", 3))}
    solver = {"coef": step_table(plan).to(device), "step": step, **counters}
    solver |= {"scale": 1 + randn(STEPS, batch, dtype=torch.float32).abs()}
    output = randn(2 * batch, config.out_channels, side, side)
    given: dict[str, Any] = {"model_out": output, "x": x, **solver}
    yield Case(
        "guided_step", str(list(output.shape)), guided_step, guided_step_ref, given, {}, out, guided_step_cost(output, x)
    )
    weight, bias = randn(D, C, p, p, spread=0.3), randn(D)
    position = randn(config.tokens, D)
    tokens = torch.full_like(trunk["h"][:batch], float("nan"))
    given = {"x": x, "weight": weight, "bias": bias, "position": position}
    cost = patch_embed_cost(x, weight, position, out=tokens)
    yield Case("patch_embed", str(list(x.shape)), patch_embed, patch_embed_ref, given, {}, tokens, cost)
    last = {"weight": randn(p * p * config.out_channels, D, spread=D**-0.5), "bias": randn(p * p * config.out_channels)}
    given = {**trunk, **last, "x": x, **solver, "embed_weight": weight, "embed_bias": bias, "position": position}
    given["tokens"] = tokens
    options = {"shift_column": 0, "scale_column": D, "patch": p}
    cost = step_boundary_cost(trunk["h"], last["weight"], x, patch=p, tokens=tokens, position=position)
    shape = str(list(trunk["h"].shape))
    yield Case("step_boundary", shape, step_boundary, step_boundary_ref, given, options, out.clone(), cost)
    drawn = torch.full_like(x, float("nan"))
    yield Case("noise", str(list(x.shape)), noise, noise_ref, counters, {"step": 1}, drawn, noise_cost(drawn))
