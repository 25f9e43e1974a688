"""The fused program, on the kernels' own definitions (`X_ref`) and with operations that count and poison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcfg.engines import Request, fused_dit
from fastcfg.engines.cpu_native import cpu_operations
from fastcfg.engines.cpu_ops import CpuOperations
from fastcfg.engines.fused_dit import Buffers, FusedDiT, Layer, is_plain_dit
from fastcfg.engines.reference import ReferenceEngine
from fastcfg.guidance import Guidance, Interval, scale_table
from fastcfg.kernels._step import step_table
from fastcfg.kernels.adaln import adaln_ref
from fastcfg.kernels.attention import attention_ref
from fastcfg.kernels.guided_step import guided_step_ref
from fastcfg.kernels.linear import linear_ref
from fastcfg.kernels.patch_embed import patch_embed_ref
from fastcfg.models.denoiser import Denoiser, describe_dit
from fastcfg.models.dit import DiT
from fastcfg.plan import Plan, make_plan

CPU = torch.device("cpu")
TINY = {"input_size": 8, "in_channels": 3, "hidden_size": 64, "depth": 2, "num_heads": 1, "num_classes": 5}
# x0 = (x - sigma eps) / alpha is 158 eps at t = 999, so that clipping it to [-1, 1] shows 158 times eps's rounding: an x0 that
# is clipped is compared from here on
LOW = [300, 200, 100, 50]


class Definitions:
    """The kernels' definitions as a set of operations."""

    state_dtype = torch.float32
    table_dtype = None
    any_rows = True

    adaln = staticmethod(adaln_ref)
    linear = staticmethod(linear_ref)
    attention = staticmethod(attention_ref)
    guided_step = staticmethod(guided_step_ref)
    patch_embed = staticmethod(patch_embed_ref)
    step_table = staticmethod(step_table)

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        del rows, sensitive
        return Layer(weight, bias)


def random_model(seed: int = 0, **changes: object) -> Denoiser:
    """A DiT in which every weight matters: none of the zeros that training starts from."""
    module = DiT(**{**TINY, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25)
    return describe_dit(module)


def a_plan(model: Denoiser, steps: int = 4, guidance: Guidance | None = None, **options: object) -> Plan:
    return make_plan(model.schedule, steps=steps, guidance=guidance, **options)


def request(plan: Plan, labels: list[int], scale: float = 3.0) -> Request:
    B = len(labels)
    table = torch.from_numpy(scale_table(scale, plan.steps, B))
    return Request(torch.tensor(labels), table, plan.guided, np.arange(B), np.zeros(B, np.int64))


def sample(model: Denoiser, plan: Plan, operations: object, asked: Request, **options: object) -> Tensor:
    program = FusedDiT(model, plan, operations, CPU, torch.float32)
    with torch.no_grad():
        return program.run(asked, [slice(0, len(asked.labels))], program.denoise, **options)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("operations", [Definitions(), CpuOperations(), cpu_operations()], ids=["definitions", "torch", "cpu"])
@pytest.mark.parametrize(
    ("model", "guidance", "options"),
    [
        ({}, {}, {"solver": "ddim"}),
        ({"hidden_size": 144, "num_heads": 2}, {"channels": 2}, {"solver": "ddim", "eta": 0.8, "clip": True, "spacing": LOW}),
        ({"block_conditioning": True}, {"rescale": 0.7}, {"solver": "dpmpp_2m"}),
        ({"time_frequency_shift": 1, "mlp_norm_eps": 1e-2}, {"interval": Interval(200, 800)}, {"solver": "euler"}),
        ({"num_heads": 4}, {"interval": Interval(200, 800)}, {"solver": "ddpm", "variance": "learned_range"}),
        ({"learn_sigma": False}, {"rescale": 0.3, "channels": 1}, {"solver": "ddpm", "clip": "keep_eps", "spacing": LOW}),
    ],
)
def test_program_is_the_reference(operations: object, model: dict, guidance: dict, options: dict) -> None:
    denoiser = random_model(**model)
    plan = a_plan(denoiser, guidance=Guidance(**guidance), **options)
    asked = request(plan, [2, 0, 2])
    want = ReferenceEngine(denoiser, plan, CPU, torch.float32).run(asked)
    assert relative(sample(denoiser, plan, operations, asked), want) <= 1e-5


def test_table_holds_what_each_block_makes_of_t_and_y() -> None:
    for own in (False, True):
        model = random_model(block_conditioning=own)
        module, t, y = model.module, torch.tensor([999.0, 12.5]), torch.tensor([5, 1])
        for operations in (Definitions(), cpu_operations()):
            program = FusedDiT(model, a_plan(model), operations, CPU, torch.float32)
            with torch.no_grad():
                table = program.modulations(t, y)
                owners = [block if own else module for block in module.blocks]
                conditions = [owner.t_embedder(t) + owner.y_embedder(y) for owner in [*owners, module]]
                layers = [block.adaLN_modulation for block in [*module.blocks, module.final_layer]]
                want = torch.cat([layer(c) for layer, c in zip(layers, conditions, strict=True)], dim=1)
            torch.testing.assert_close(table, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("operations", [Definitions(), CpuOperations(), cpu_operations()], ids=["definitions", "torch", "cpu"])
def test_a_table_in_windows_changes_no_bit(operations: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(depth=1)
    plan = a_plan(model, steps=70)
    asked = request(plan, [0, 3])
    whole = sample(model, plan, operations, asked)
    monkeypatch.setattr(fused_dit, "TABLE_BYTES", 1)
    program = FusedDiT(model, plan, operations, CPU, torch.float32)
    assert [len(window) for window in program.windows(3)] == [32, 32, 6]
    assert torch.equal(sample(model, plan, operations, asked), whole)
    monkeypatch.setattr(fused_dit, "TABLE_BYTES", 3 * 64 * program.table_width * 4)
    assert [len(window) for window in program.windows(3)] == [64, 6]


class Counting(CpuOperations):
    """Rows that each operation was given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[int] = []
        self.attended: list[int] = []

    def patch_embed(self, x: Tensor, *others: Tensor, **options: Tensor | None) -> Tensor:
        self.embedded.append(len(x))
        return super().patch_embed(x, *others, **options)

    def attention(self, qkv: Tensor, heads: int, *, out: Tensor | None = None) -> Tensor:
        self.attended.append(len(qkv))
        return super().attention(qkv, heads, out=out)


class Packing(CpuOperations):
    """The layers that are not to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.sensitive: list[Tensor] = []

    def pack(self, weight: Tensor, bias: Tensor, *, rows: int, sensitive: bool = False) -> Layer:
        self.sensitive += [weight] * sensitive
        return super().pack(weight, bias, rows=rows, sensitive=sensitive)


def test_of_the_trunk_the_last_layer_alone_is_sensitive() -> None:
    model, packing = random_model(depth=1), Packing()
    FusedDiT(model, a_plan(model), packing, CPU, torch.float32)
    last, *conditions = packing.sensitive
    assert torch.equal(last, model.module.final_layer.linear.weight)
    assert sum(map(len, conditions)) == (6 + 2) * TINY["hidden_size"]


def test_null_rows_are_computed_inside_the_interval_only_and_patches_once() -> None:
    model = random_model(depth=1)
    plan = a_plan(model, steps=6, guidance=Guidance(interval=Interval(200, 700)))
    assert 0 < plan.guided.sum() < 6
    counting = Counting()
    sample(model, plan, counting, request(plan, [0, 1, 2]))
    assert counting.attended == [6 if guided else 3 for guided in plan.guided]
    assert counting.embedded == [3] * 6


def test_unguided_request_has_no_null_label_in_its_table() -> None:
    model = random_model(depth=1)
    plan = a_plan(model)
    program = FusedDiT(model, plan, CpuOperations(), CPU, torch.float32)
    asked = replace(request(plan, [4, 0, 4], scale=1.0), guided=np.zeros(plan.steps, bool))
    labels, cond, null = program._unique(asked)
    assert labels.tolist() == [0, 4]
    assert cond.tolist() == [1, 0, 1]
    assert null is None


def test_buffers_are_filled_before_they_are_read() -> None:
    model = random_model()
    plan = a_plan(model)
    program = FusedDiT(model, plan, Definitions(), CPU, torch.float32)
    buffers = program.buffers(8)  # more rows than the run has
    poisoned = Buffers(*(buffer.fill_(float("nan")) for buffer in vars(buffers).values()))
    asked = request(plan, [0, 1, 2])

    def denoise(tokens: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return program.denoise(tokens, table, index, poisoned)

    with torch.no_grad():
        first = program.run(asked, [slice(0, 3)], denoise)
        again = program.run(asked, [slice(0, 2), slice(2, 3)], denoise)
    assert torch.equal(first, sample(model, plan, Definitions(), asked))
    assert relative(again, first) < 1e-5
    assert all(buffer.isnan().any() for buffer in vars(poisoned).values())  # rows 6 and 7: the buffers themselves were used
    assert not any(buffer[:6].isnan().any() for buffer in vars(poisoned).values())


def test_only_an_unmodified_dit_is_plain() -> None:
    assert all(is_plain_dit(random_model(block_conditioning=own).module) for own in (False, True))

    class Child(DiT):
        pass

    replaced, hooked, parametrised = (random_model().module for _ in range(3))
    replaced.blocks[0].mlp.fc1 = nn.Sequential(replaced.blocks[0].mlp.fc1, nn.Dropout(0.1))
    hooked.blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    nn.utils.parametrizations.weight_norm(parametrised.blocks[0].attn.qkv)
    assert not any(map(is_plain_dit, [Child(**TINY), replaced, hooked, parametrised, nn.Linear(1, 1)]))
