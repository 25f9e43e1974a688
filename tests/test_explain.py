"""What `explain` says, where its ceilings come from, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_fused_dit import random_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcfg
from fastcfg import ceilings as ceilings_module
from fastcfg.ceilings import STATED, Ceilings, known_gpu, measured_ceilings, stated_ceilings
from fastcfg.cli import main
from fastcfg.explain import Explanation, count_flops, explain
from fastcfg.kernels._launch import Cost
from fastcfg.ledger import Entry, Ledger, Saving, Work
from fastcfg.models.denoiser import Denoiser

CPU = torch.device("cpu")
H100 = STATED["h100"]


def explained(engine: str = "cpu", model: Denoiser | None = None, **asked: object) -> Explanation:
    one = fastcfg.Sampler(model or random_model(), steps=4, batch=2, engine=engine, dtype="fp32", interval=(0, 500))
    return explain(one.model, one.plan, one.engine, one.batch, one.last_seconds, **asked)


class Square(nn.Module):
    """A module of another kind, with a weight, a buffer and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.register_buffer("offset", torch.zeros(12))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.linear(x.flatten(1)) + self.offset).view_as(x)


def square() -> fastcfg.Sampler:
    return fastcfg.Sampler(Square().eval(), null_label=1, shape=(3, 2, 2), steps=4)


def test_text_holds_the_ledger_and_its_totals() -> None:
    told = explained(ceilings=Ceilings("a machine", "measured", {"float32": 1e12}, 1e11))
    ledger = told.ledger
    assert ledger is not None
    text = str(told)
    assert "ceilings      a machine, measured: float32 1 TFLOP/s; 100 GB/s" in text
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert rows["a guided step"] == ["times", "a", "piece", "GFLOP", "MB", "floor", "ms"]
    assert rows["total"] == [str(ledger.guided.total.launches), *numbers(ledger.guided.total)]
    assert rows["a call of 4 steps"] == [str(ledger.call.launches), *numbers(ledger.call)]
    assert rows["linear 64 to 256, GELU"][0] == "2"
    for saving in ledger.savings:
        assert f"{saving.name}: {saving.reason}" in text
    assert "interval: no null rows in 2 of 4 steps" in text


def entry(name: str, launches: int, gflop: float, mb: float, ms: float | None) -> Entry:
    return Entry(name, launches, round(gflop * 1e9), round(mb * 1e6), None if ms is None else ms / 1e3)


def told_by_hand(**changes: object) -> Explanation:
    """2 samples in 5 steps, of which 3 are guided; every number is another."""
    one, step, start = entry("linear", 12, 1.5, 20, 0.25), entry("total", 13, 2.5, 21, 0.5), entry("total", 2, 0.125, 3, 0.0625)
    hoisted, unhoisted = entry("total", 4, 0.75, 5, 0.5), entry("total", 6, 7, 8, 9)
    ledger = Ledger(
        engine="cuda", dtype="float16", batch=2, ceilings=H100, guided=Work((one,), step),
        unguided=Work((replace(one, launches=10),), replace(step, launches=11)), start=Work((), start),
        hoisted=Work((), hoisted), unhoisted=Work((), unhoisted), call=entry("call", 1234, 1234.5, -2345.6, 2.5),
        savings=(
            Saving("hoisted", "adaLN", 3 * 10**9, 0, 0.001), Saving("shared", "tokens", 0, 4_000_000, 0.0),
            Saving("interval", "nothing", 0, 0, 0.0),
        ),
    )  # fmt: skip
    told = Explanation(
        plan="the plan", engine="cuda", device="cuda:1", dtype="float16", batch=2, steps=5, guided_steps=3, rows=16,
        flops_per_row=10**9, flops=16 * 10**9, weight_bytes=3_000_000, classifier_rows=0, classifier_flops=0,
        last_seconds=None, notes=("one", "two"), ledger=ledger,
    )  # fmt: skip
    return replace(told, **changes)


def test_text_of_numbers_given_by_hand() -> None:
    assert str(told_by_hand()).splitlines() == [
        "the plan",
        "",
        "engine        cuda on cuda:1, float16, batch 2",
        "model rows    16: 3 guided steps x 4, 2 unguided x 2",
        "model FLOPs   16.000 G a batch (1.0000 G a row)",
        "weights       3.00 MB",
        "note          one",
        "note          two",
        "",
        "ledger        engine cuda, float16, batch 2",
        f"ceilings      {H100}",
        "",
        f"{'a guided step':36}{'launches':>14}{'GFLOP':>14}{'MB':>14}{'floor ms':>14}",
        f"{'  linear':36}{'12':>14}{'1.5':>14}{'20':>14}{'0.25':>14}",
        f"{'  total':36}{'13':>14}{'2.5':>14}{'21':>14}{'0.5':>14}",
        f"{'a step without null rows':36}{'11':>14}{'2.5':>14}{'21':>14}{'0.5':>14}",
        f"{'before the first step':36}{'2':>14}{'0.125':>14}{'3':>14}{'0.0625':>14}",
        f"{'the hoisted table':36}{'4':>14}{'0.75':>14}{'5':>14}{'0.5':>14}",
        f"{'a call of 5 steps':36}{'1,234':>14}{'1,234':>14}{'-2,346':>14}{'2.5':>14}",
        f"{'a step would add, not hoisted':36}{'6':>14}{'7':>14}{'8':>14}{'9':>14}",
        "",
        f"{'saved in a call':50}{'GFLOP':>14}{'MB':>14}{'floor ms':>14}",
        f"{'  hoisted: adaLN':50}{'3':>14}{'0':>14}{'1':>14}",
        f"{'  shared: tokens':50}{'0':>14}{'4':>14}{'0':>14}",
    ]


def test_text_of_a_batch_that_was_measured_guided_by_a_classifier_in_every_step() -> None:
    told = told_by_hand(guided_steps=5, classifier_rows=8, classifier_flops=4 * 10**9, last_seconds=0.5, ledger=None, notes=())
    assert str(told).splitlines()[3:] == [
        "model rows    16: 5 guided steps x 4",
        "model FLOPs   16.000 G a batch (1.0000 G a row)",
        "classifier    8 rows, forward and backward: 4.000 GFLOP a batch",
        "weights       3.00 MB, read 5 times a batch",
        "measured      0.500 s for the last batch (40.0 GFLOP/s if it was guided)",
    ]


def test_text_of_a_model_without_a_null_label_has_no_guided_step() -> None:
    told = told_by_hand()
    assert told.ledger is not None
    text = str(replace(told, ledger=replace(told.ledger, guided=None)))
    assert f"{'a step':36}{'launches':>14}" in text
    assert f"{'  linear':36}{'10':>14}" in text
    assert "guided step " not in text
    assert "null rows" not in text


def test_weights_are_parameters_and_buffers_in_the_engines_dtype() -> None:
    values = 12 * 12 + 12 + 12
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        one = fastcfg.Sampler(Square().eval(), null_label=1, shape=(3, 2, 2), steps=4, engine="reference", dtype=dtype)
        assert one.explain().weight_bytes == size * values


def test_a_known_gpus_ceilings_are_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcfg.explain.known_gpu", lambda device: replace(H100, name=f"of {device}"))
    told = explained()
    assert told.ledger is not None
    assert told.ledger.ceilings == replace(H100, name="of cpu")


def numbers(cost: object) -> list[str]:
    return [f"{value:.4g}" for value in (cost.flops / 1e9, cost.bytes / 1e6, 1e3 * cost.floor_seconds)]


def test_json_is_the_same_numbers() -> None:
    told = explained(ceilings="h100")
    data = json.loads(json.dumps(told.to_json()))
    assert data["ledger"]["call"]["flops"] == told.ledger.call.flops
    assert data["ledger"]["guided"]["entries"][0]["name"] == "adaln"
    assert data["ledger"]["ceilings"]["bandwidth"] == 3.35e12
    assert [saving["name"] for saving in data["ledger"]["savings"]] == ["hoisted", "shared", "interval"]


def test_without_ceilings_there_are_no_floor_times() -> None:
    told = explained()
    assert told.ledger is not None
    assert told.ledger.ceilings is None
    assert "none given" in str(told)
    assert "floor ms" not in str(told)


def test_a_gpus_name_gives_the_cuda_engines_ledger_on_a_machine_without_one() -> None:
    for engine in ("cpu", "reference"):
        told = explained(engine, ceilings="h200")
        assert (told.engine, told.ledger.engine, told.ledger.dtype) == (engine, "cuda", "bfloat16")
        assert told.ledger.ceilings == STATED["h200"]
    exact = replace(random_model(), low_precision=False)
    assert explained(model=exact, ceilings="h200").ledger.dtype == "float32"
    assert explained(ceilings="h200", dtype=torch.float16).ledger.dtype == "float16"


def test_the_floor_of_a_batch_stands_beside_its_time() -> None:
    one = fastcfg.Sampler(random_model(), steps=4, batch=2, engine="cpu", dtype="fp32")
    one([1, 2], 3.0)
    slow = Ceilings("a machine", "measured", {"float32": 1e3}, 1e12)
    told = explain(one.model, one.plan, one.engine, 2, one.last_seconds, slow)
    assert f"floor         {told.ledger.call.flops / 1e3:.3f} s for a guided batch" in str(told)
    assert "floor  " not in str(explain(one.model, one.plan, one.engine, 2, one.last_seconds, "h100"))  # another engine's


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: explained(ceilings="h300"), ("'h300'", "h100, h200")),
        (lambda: explained(ceilings=["h100"]), ("['h100']", "h100, h200")),
        (lambda: explained("reference", ceilings="measured"), ("'measured'", "'reference'")),
        (lambda: explained(ceilings="h100", dtype=torch.int8), ("int8", "bfloat16")),
        (lambda: explained(ceilings=Ceilings("a GPU", "stated", {"bfloat16": 1e12}, 1e12)), ("no rate for float32",)),
        (lambda: explained(model=random_model(num_heads=16), ceilings="h100"), ("4 values", "multiples of 8")),
    ],
)
def test_what_cannot_be_told_is_refused(ask: Callable[[], object], words: tuple[str, ...]) -> None:
    with pytest.raises(fastcfg.Error) as caught:
        ask()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("dtype", "want"), [("auto", "bfloat16"), ("fp32", "float32")])
def test_a_sampler_gives_a_gpus_ledger_in_the_dtype_it_was_asked_for(dtype: str, want: str) -> None:
    one = fastcfg.Sampler(random_model(), steps=2, engine="reference", dtype=dtype)
    assert one.explain("h200").ledger.dtype == want


def test_other_modules_have_no_ledger() -> None:
    one = square()
    assert one.explain().ledger is None
    assert f"read {one.plan.steps} times a batch" in str(one.explain())
    with pytest.raises(fastcfg.Error, match="Square is not the package's DiT"):
        explain(one.model, one.plan, one.engine, one.batch, None, "h100")


def test_without_triton_the_ledger_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fastcfg.kernels", "fastcfg.ledger"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fastcfg, "kernels", fastcfg.kernels)  # put back what a failed import leaves there
    monkeypatch.setitem(sys.modules, "triton", None)
    told = explained()
    assert told.ledger is None
    assert "no ledger: the kernels' costs need Triton" in str(told)
    with pytest.raises(fastcfg.Error, match="need Triton"):
        explained(ceilings="measured")


class Plain(Square):
    """What torch's meta device has no way for: a tensor that is no buffer, a branch on a value, a t in fractions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(12)
        self.time = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.time(t[:, None])[:, :, None, None] if t.max().item() else x
        return (self.linear(x.flatten(1)) * self.table).view_as(x)


def test_any_module_that_can_be_sampled_is_counted() -> None:
    model = Denoiser(Plain().eval(), (3, 2, 2), 1, 1)
    one = fastcfg.Sampler(model, steps=5, solver="euler", spacing="linspace")
    assert one([0], 2.0).shape == (1, 3, 2, 2)
    assert one.explain().flops_per_row == 2 * 12 * 12 + 2
    unguided = fastcfg.Sampler(replace(model, null_label=None), steps=5, solver="euler", spacing="linspace")
    assert unguided.explain().flops_per_row == 2 * 12 * 12 + 2
    traced = torch.jit.trace(Square().eval(), (torch.zeros(1, 3, 2, 2), torch.zeros(1), torch.zeros(1)))
    assert fastcfg.Sampler(traced, null_label=1, shape=(3, 2, 2), steps=4).explain().flops_per_row == 2 * 12 * 12


class Classifying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(12, 1), torch.ones(12)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1) * self.table)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_classifier_is_counted_in_any_mode(mode: Callable[[], AbstractContextManager]) -> None:
    with mode():
        guidance = fastcfg.ClassifierGuidance(Classifying().eval())
        one = fastcfg.Sampler(Square().eval(), null_label=1, shape=(3, 2, 2), steps=4, classifier_guidance=guidance)
        told = one.explain()
    assert told.classifier_flops == told.classifier_rows * 2 * 2 * 12  # forward, and backward as far as x


def test_counting_copies_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    for model, flops in ((Denoiser(Square().eval(), (3, 2, 2), 1, 1), 2 * 12 * 12), (random_model(), None)):
        counted = count_flops(model)
        assert counted == flops if flops else counted > 0
        assert {p.device for p in (*model.module.parameters(), *model.module.buffers())} == {CPU}


def test_stated_ceilings_are_the_data_sheets_in_flops_and_bytes() -> None:
    assert H100.floor(Cost(bytes=3_350_000, flops=0), "bfloat16") == pytest.approx(1e-6)
    assert H100.floor(Cost(bytes=0, flops=989_400_000), "float16") == pytest.approx(1e-6)
    assert H100.floor(Cost(bytes=0, flops=494_700_000), "float32") == pytest.approx(3e-6)  # three passes in TF32
    with pytest.raises(fastcfg.Error, match="measured"):
        stated_ceilings("rtx9090")


@pytest.mark.parametrize(
    ("name", "sparse", "full", "bandwidth"),
    [
        ("a100", 624, 312 / 6, 2039),
        ("h100", 1978.8, 989.4 / 6, 3350),
        ("h200", 1978.8, 989.4 / 6, 4800),
        ("b200", 4500, 2200 / 6, 8000),
        ("mi300x", 2614.8, 163.4, 5300),
    ],
)
def test_stated_ceilings_are_half_of_the_rates_with_sparsity(name: str, sparse: float, full: float, bandwidth: float) -> None:
    """full: TF32's with sparsity, halved, and three passes of it; on AMD's GPU the matrix units' float32."""
    low = sparse / 2 * 1e12
    assert STATED[name].rates == pytest.approx({"bfloat16": low, "float16": low, "float32": full * 1e12})
    assert STATED[name].bandwidth == pytest.approx(bandwidth * 1e9)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert known_gpu(torch.device("cuda", 0)) == (STATED[known] if known else None)
    assert known_gpu(CPU) is None


def test_measured_ceilings_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    measured = measured_ceilings(CPU, torch.float32)
    assert measured.source == "measured"
    assert 1e9 < measured.rates["float32"] < 1e14
    assert 1e8 < measured.bandwidth < 1e13
    assert torch.equal(torch.get_rng_state(), state)
    asked: list[str] = []

    def two_seconds(options: dict[str, Callable[[], object]]) -> dict[str, float]:
        for option in options.values():
            option()
        asked.extend(options)
        return dict.fromkeys(options, 2.0)

    monkeypatch.setattr(ceilings_module, "measure", two_seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(ceilings_module, "REPEATS", 2)
    monkeypatch.setattr(ceilings_module, "wide_dtype", lambda _: torch.float32)
    three_cores = measured_ceilings(CPU, torch.int8)
    assert asked == ["int8", "float32", "copy"]
    assert three_cores.rates["int8"] == 3 * 2 * 2 * 256 * 1024 * 1024 / 2
    assert three_cores.bandwidth == 3 * 2 * 2 * 2**18 / 2


class Counted(TorchDispatchMode):
    """Counts the operations inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_a_measurement_repeats_what_its_rate_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this thread, as the one worker: how often each piece of work is done between two looks at the clock."""
    did: dict[str, Counter[str]] = {}

    def count(options: dict[str, Callable[[], object]]) -> dict[str, float]:
        for name, option in options.items():
            with Counted() as did[name]:
                option()
            did[name] = did[name].calls
        return dict.fromkeys(options, 1.0)

    class Layer:
        def __init__(self, *_: object) -> None:
            pass

        def products(self, _: object) -> Callable[[], object]:
            return lambda: torch.zeros(1).neg_()

    monkeypatch.setattr(ceilings_module, "measure", count)
    monkeypatch.setattr(ceilings_module, "NativeLayer", Layer)
    monkeypatch.setattr(ceilings_module, "kernels", lambda: SimpleNamespace(library=None))
    workers = SimpleNamespace(count=1, map=lambda work, numbers: [work(number) for number in numbers])
    monkeypatch.setattr(ceilings_module, "Workers", lambda _: workers)
    for in_c, product in ((True, "neg_"), (False, "addmm")):
        monkeypatch.setattr(ceilings_module, "in_one_call", lambda _, in_c=in_c: in_c)
        monkeypatch.setattr(ceilings_module, "cpu_operations", lambda int8: Products())
        measured_ceilings(CPU, torch.int8)
        measured_ceilings(CPU, torch.float32)
        assert did["float32"][product] == ceilings_module.REPEATS
        assert did["copy"]["copy_"] == ceilings_module.REPEATS
    monkeypatch.setattr(ceilings_module, "GPU_PRODUCT", 64)
    monkeypatch.setattr(ceilings_module, "GPU_COPY", 4096)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    ceilings_module._measured_on_gpu(CPU)
    assert did["product"]["mm"] == did["copy"]["copy_"] == ceilings_module.REPEATS


class Products:
    """Of the cpu engine's operations, what a measurement asks of them."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor, *, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert weight.is_floating_point(), "int8 is of packing, not of what is packed"
        return weight.float(), bias.float()

    def linear(self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(h[0].float(), weight, bias)


def test_a_gpu_without_memory_for_a_measurement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", refuse)
    with pytest.raises(fastcfg.Error, match="2 GiB of memory on cpu"):
        ceilings_module._measured_on_gpu(CPU)


@pytest.mark.parametrize(("hip", "part"), [(None, 6), ("6.4", 8)])
def test_measured_ceilings_of_a_gpu(hip: str | None, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in its place, at small sizes and a second each."""
    monkeypatch.setattr(torch.version, "hip", hip)
    waited: list[object] = []

    def a_second(options: dict[str, Callable[[], object]]) -> dict[str, float]:
        for option in options.values():
            option()
        return dict.fromkeys(options, 1.0)

    monkeypatch.setattr(ceilings_module, "measure", a_second)
    monkeypatch.setattr(ceilings_module, "GPU_PRODUCT", 64)
    monkeypatch.setattr(ceilings_module, "GPU_COPY", 4096)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    measured = ceilings_module._measured_on_gpu(CPU)
    assert measured.name == "a GPU"
    assert measured.rates == {"bfloat16": 20 * 64**3, "float16": 20 * 64**3, "float32": 20 * 64**3 / part}
    assert measured.bandwidth == 20 * 4096
    assert waited == [CPU, CPU]


def command(*arguments: object):
    return CliRunner().invoke(main, ["explain", "--steps", "3", *map(str, arguments)])


def test_command_prints_which_ceilings_it_took() -> None:
    stated = command("--engine", "reference", "--ceilings", "mi300x", "--batch", 64)
    assert stated.exit_code == 0, stated.output
    assert "engine cuda, float32, batch 64" in stated.output  # the shipped model asks for it
    assert "MI300X, stated: bfloat16 1307 TFLOP/s" in stated.output
    measured = json.loads(command("--measure", "--dtype", "fp32", "--json").output)
    assert measured["ledger"]["ceilings"]["source"] == "measured"
    assert measured["ledger"]["call"]["floor_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ceilings", "h300"], ("'h300'", "a100")),
        (["--ceilings", "h100", "--measure"], ("give one", "h100")),
        (["--engine", "reference", "--measure"], ("'reference'",)),
    ],
)
def test_command_exits_2_for_what_cannot_be_told(arguments: list[str], words: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert all(word in result.output for word in words), result.output
    assert "Traceback" not in result.output
