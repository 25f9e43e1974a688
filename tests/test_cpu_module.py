"""The cpu engine on modules that are not our DiT: the reference's samples by each way of running the module, and the choice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_fused_dit import random_model, relative
from torch import Tensor, nn

from fastcfg import Error, Sampler
from fastcfg.engines import cpu_module, openvino_module
from fastcfg.engines.cpu_module import CpuModuleEngine
from fastcfg.engines.cpu_ops import has_bf16
from fastcfg.engines.openvino_module import OpenVinoForward, openvino_version, unreported

FOREIGN = {"shape": (4, 8, 8), "null_label": 5, "num_classes": 5}
needs_openvino = pytest.mark.skipif(openvino_version() is None, reason="OpenVINO is not installed")
WAYS = ["eager", "compiled", pytest.param("openvino", marks=needs_openvino)]


class Convolution(nn.Module):
    """Takes up to 13 in its output, so that rounding is relative to values of that size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(4, 4, 3, 3, generator=generator))
        self.table = nn.Embedding.from_pretrained(torch.randn(6, 4, generator=generator))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = x + self.table(y)[:, :, None, None] + (t / 1000).to(x.dtype)[:, None, None, None]
        return torch.tanh(nn.functional.conv2d(h, self.weight, padding=1))


class TwoBranches(Convolution):
    """Another output above t = 500: what a trace at one t would not know."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) if t[0] > 500 else -super().forward(x, t, y)


@pytest.fixture(autouse=True)
def _own_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Stands in for torch.compile's code generation, which takes a minute: modules that it was given."""
    given: list[nn.Module] = []

    def compiled(module: nn.Module, **_: object) -> nn.Module:
        given.append(module)
        return original(module, backend="eager", dynamic=False)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    yield given
    torch._dynamo.reset()


def settle(way: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes `way` the fastest; the questions that were asked."""
    asked: list[str] = []

    def answer(question: str, options: dict[str, object]) -> str:
        assert way in options
        asked.append(question)
        return way

    monkeypatch.setattr(cpu_module, "fastest", answer)
    return asked


def sampler(module: nn.Module, **options: object) -> Sampler:
    return Sampler(module, **{"steps": 3, "batch": 4, "engine": "cpu", "dtype": "fp32", **FOREIGN, **options})


def reference(module: nn.Module, **options: object) -> Sampler:
    return sampler(module, **{**options, "engine": "reference"})


@pytest.mark.parametrize("way", WAYS)
def test_samples_are_the_references_and_depend_on_no_neighbour(
    way: str, compiler: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(way, monkeypatch)
    options = {"solver": "ddim", "eta": 0.5, "rescale": 0.5, "interval": (200, 800)}
    made = sampler(Convolution().eval(), batch=3, **options)
    assert isinstance(made.engine, CpuModuleEngine)
    got = made([4, 0, 1], scale=2.0, seeds=5)
    assert relative(got, reference(Convolution().eval(), **options)([4, 0, 1], scale=2.0, seeds=5)) < 1e-5
    for batch in (1, 2):
        alone = sampler(Convolution().eval(), batch=batch, **options)([0], scale=2.0, seeds=5, indices=[1])
        assert torch.equal(alone[0], got[1])
    assert len(compiler) == (3 if way == "compiled" else 0)


@pytest.mark.parametrize("way", WAYS)
def test_predict_is_the_module(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(way, monkeypatch)
    x, made = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), sampler(Convolution().eval())
    for t in (torch.tensor([5, 700]), torch.tensor([5.5, 700.25])):
        got = made.predict(x, t, [1, 2])
        torch.testing.assert_close(got, Convolution()(x, t, torch.tensor([1, 2])).detach(), rtol=0, atol=1e-6)


def test_the_choice_is_measured_noted_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[set[str]] = []

    def slow_eager(options: dict) -> dict[str, float]:
        measured.append(set(options))
        for option in options.values():
            option()
        return {name: 2.0 if name == "eager" else 1.0 for name in options}

    monkeypatch.setattr("fastcfg.engines.choice.measure", slow_eager)
    monkeypatch.setattr(cpu_module, "openvino_version", lambda: None)
    for _ in range(2):
        made = sampler(Convolution().eval())
        made([0], scale=2.0)
        assert "torch.compile was the fastest here for guided steps" in made.engine.notes
        assert "torch.compile was the fastest here for guided steps" in str(made.explain())
        made([0], scale=2.0)
    assert measured == [{"eager", "compiled"}]
    made([0], scale=1.0)
    assert len(measured) == 2  # one row is another question
    assert made.engine.notes[-1] == "torch.compile was the fastest here for unguided steps"


@needs_openvino
def test_what_is_remembered_holds_for_one_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settle("eager", monkeypatch)
    for version in (openvino_version(), "2031.1", None):
        monkeypatch.setattr(cpu_module, "openvino_version", lambda version=version: version)
        sampler(Convolution().eval())([0], scale=2.0)
    assert len(set(asked)) == 3


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(module: nn.Module, **_: object) -> nn.Module:
        def fail(*_: object) -> None:
            raise RuntimeError("no C++ compiler found\nand more")

        broken = Convolution()
        broken.forward = fail
        del module
        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    made = sampler(Convolution().eval())
    assert relative(made([0], scale=2.0), reference(Convolution().eval())([0], scale=2.0)) < 1e-5
    assert "torch.compile is not used: no C++ compiler found" in made.engine.notes


def test_without_openvino_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settle("eager", monkeypatch)
    monkeypatch.setattr(cpu_module, "openvino_version", lambda: None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    made = sampler(Convolution().eval())
    made([0], scale=2.0)
    assert "pip install 'fastcfg[openvino]'" in str(made.explain())
    assert not any("openvino" in question for question in asked)


def test_an_error_of_the_module_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler(Convolution().eval())

    def fail(*_: object) -> None:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(made.model.module, "forward", fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        made([0], scale=2.0)


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_it_goes_stale_and_has_no_int8(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "openvino" and not has_bf16():
        pytest.skip("this CPU has no bf16")
    settle(way, monkeypatch)
    module = Convolution().eval()
    made = sampler(module, dtype="bf16")
    before = made([0])
    assert relative(before, reference(module)([0])) < 0.03
    with torch.no_grad():
        module.weight.zero_()
    with pytest.raises(Error, match="refresh"):
        made([0])
    made.refresh()
    assert not torch.equal(made([0]), before)
    with pytest.raises(Error, match="Convolution"):
        sampler(module, dtype="int8")


def test_float16_is_what_the_module_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settle("eager", monkeypatch)
    module = Convolution().eval()
    made = sampler(module, dtype="fp16")
    assert made.engine.dtype == torch.float16
    assert 0 < relative(made([0]), reference(module)([0])) < 3e-3


@needs_openvino
def test_openvino_copies_weights_and_knows_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    settle("openvino", monkeypatch)
    module = Convolution().eval()
    made = sampler(module)
    with torch.no_grad():
        module.weight.mul_(0.5)
    before = made([2], scale=2.0)  # converted here, from the weights of here
    assert torch.equal(before, made([2], scale=2.0))
    forward = next(iter(made.engine._forwards.values()))
    inputs = torch.ones(2, 4, 8, 8), torch.full((2,), 500), torch.tensor([2, 5])
    output = forward(*inputs)
    with torch.no_grad():
        module.weight.mul_(0.5)
        module.table.weight.mul_(0.5)  # looked up where it lies, unless it was copied
    assert torch.equal(forward(*inputs), output)
    with pytest.raises(Error, match="refresh"):
        made([2], scale=2.0)
    made.refresh()
    after = made([2], scale=2.0)
    assert relative(after, reference(module)([2], scale=2.0)) < 1e-5
    assert relative(after, before) > 1e-2
    module.train()
    with pytest.raises(Error, match="training mode"):
        made([2], scale=2.0)


@needs_openvino
@pytest.mark.parametrize("dtype", ["fp32", *["bf16"] * has_bf16()])
def test_openvino_is_left_out_where_its_output_is_not_the_modules(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, factor = OpenVinoForward.__call__, 1 + (2e-5 if dtype == "fp32" else 0.02)
    monkeypatch.setattr(OpenVinoForward, "__call__", lambda self, *inputs: original(self, *inputs) * factor)
    made = sampler(Convolution().eval(), dtype=dtype)
    made([0], scale=2.0)
    assert not any(isinstance(forward, OpenVinoForward) for forward in made.engine._forwards.values())
    assert any(note.startswith("OpenVINO is not used: its output differs") for note in made.engine.notes)


@needs_openvino
@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16, which OpenVINO would take for float32")
def test_openvino_in_its_own_precision_would_not_pass_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(openvino_module.PRECISIONS, torch.float32, "bf16")
    with torch.no_grad(), pytest.raises(Error, match="differs"):
        OpenVinoForward(Convolution().eval(), torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 5]))


@needs_openvino
def test_openvino_freezes_no_branch(capfd: pytest.CaptureFixture) -> None:
    made = sampler(TwoBranches().eval(), steps=4)
    got = made([0], scale=2.0)
    assert relative(got, reference(TwoBranches().eval(), steps=4)([0], scale=2.0)) < 1e-5
    assert any(note.startswith("OpenVINO is not used") for note in made.engine.notes)
    assert "def forward" not in "".join(capfd.readouterr())


@needs_openvino
@pytest.mark.parametrize("CI", [None, "", "false"])
def test_ci_is_as_it_was(CI: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False) if CI is None else monkeypatch.setenv("CI", CI)
    with unreported():
        assert os.environ["CI"] == "true"
    assert os.environ.get("CI") == CI


@needs_openvino
def test_openvino_reports_to_nobody_and_leaves_logging_alone(tmp_path: Path) -> None:
    """In a process of its own. Where OpenVINO is about to report, it makes a folder `intel` for the user's identity."""
    code = """
import logging, torch
from fastcfg.engines.openvino_module import OpenVinoForward

class Sum(torch.nn.Module):
    def forward(self, x, t, y):
        return x + (t + y)[:, None]

x, t = torch.ones(1, 4), torch.tensor([1])
with torch.no_grad():
    forward = OpenVinoForward(Sum().eval(), x, t, t)
assert forward(x, t, t).tolist() == [[3.0] * 4]
assert not logging.getLogger().handlers
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, check=True)
    assert not (tmp_path / "intel").exists()


@needs_openvino
def test_openvino_on_a_diffusers_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(7)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=6,
    )  # fmt: skip
    settle("openvino", monkeypatch)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
    made = sampler(unet.eval())
    want = unet(x, t, torch.tensor([1, 4])).sample.detach()
    assert relative(made.predict(x, t, [1, 4]), want) < 1e-5
    assert "OpenVINO was the fastest here for unguided steps" in made.engine.notes


def test_a_modified_dit_runs_as_the_module_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    settle("eager", monkeypatch)
    model = random_model()
    options = {"steps": 3, "batch": 4, "engine": "cpu", "dtype": "fp32"}
    plain = Sampler(model, **options)([1], scale=2.0)
    model.module.blocks[0].register_forward_hook(lambda module, inputs, output: 0.5 * output)
    made = Sampler(model, **options)
    assert isinstance(made.engine, CpuModuleEngine)
    assert relative(made([1], scale=2.0), plain) > 1e-3


# In a process of its own: what is tested ends a process
DROPPED = """
import signal, subprocess, sys, threading
import torch
from torch import nn
from fastcfg.engines.openvino_module import OpenVinoForward

class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, y):
        return self.mix(x)

signal.signal(signal.SIGCHLD, lambda *_: None)
inputs = torch.ones(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
with torch.no_grad():
    made = [OpenVinoForward(Field().eval(), *inputs)]
dropping = threading.Thread(target=made.clear)
dropping.start()
dropping.join()
subprocess.run([sys.executable, "-c", ""], check=True)
"""


@needs_openvino
def test_signals_are_handled_after_another_thread_dropped_a_forward() -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
