"""The openvino engine: the reference's samples, the same bits for any batch, and what it refuses."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_fused_dit import LOW, random_model, relative
from torch import Tensor, nn

from fastcfg import Error, Sampler
from fastcfg.cli import main
from fastcfg.engines import openvino_dit
from fastcfg.engines.cpu_ops import beside_int8, has_bf16
from fastcfg.engines.openvino_module import openvino_version, quantises_activations
from fastcfg.models.denoiser import Denoiser
from fastcfg.models.dit import DiT

pytestmark = pytest.mark.skipif(openvino_version() is None, reason="OpenVINO is not installed")

MODELS = {
    "head 64": {"hidden_size": 128, "num_heads": 2},
    "own conditions": {"hidden_size": 72, "block_conditioning": True, "time_frequency_shift": 1, "mlp_norm_eps": 1e-2},
    "odd": {"input_size": 10, "hidden_size": 36, "num_heads": 3, "learn_sigma": False},
    "many tokens": {"input_size": 24, "hidden_size": 64, "num_heads": 1, "depth": 1},
}
FOREIGN = {"shape": (4, 8, 8), "null_label": 5, "num_classes": 5, "schedule": "linear", "predicts": "eps"}
INT8 = openvino_version() is not None and quantises_activations()
DTYPES = ["fp32", *["bf16"] * has_bf16(), *["int8"] * INT8]


class Foreign(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + (t + y).to(x.dtype)[:, None, None, None]


@lru_cache
def model_of(name: str) -> Denoiser:
    return random_model(**MODELS[name])


@lru_cache
def sampler_of(name: str, dtype: str = "fp32", batch: int = 8) -> Sampler:
    return Sampler(model_of(name), steps=3, batch=batch, engine="openvino", dtype=dtype, eta=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_the_reference(name: str) -> None:
    options = {
        "steps": 3,
        "eta": 0.5,
        "spacing": LOW[-3:],
        "interval": (60, 150),
        "clip": True,
        "rescale": 0.7,
        "dtype": "fp32",
    }
    call = {"labels": [0, 4, 2, 1, 3], "scale": [1.0, 1.5, 4.0, 4.0, 2.0], "seeds": 7}
    want = Sampler(model_of(name), engine="reference", **options)(**call)
    assert relative(Sampler(model_of(name), engine="openvino", batch=3, **options)(**call), want) <= 1e-5


@pytest.mark.parametrize(("name", "dtype"), [*(("head 64", dtype) for dtype in DTYPES), ("many tokens", "fp32")])
def test_bits_do_not_depend_on_batch_or_neighbours(name: str, dtype: str) -> None:
    sampler, alone = sampler_of(name, dtype), sampler_of(name, dtype, batch=1)
    labels, seeds = [0, 3, 1, 2, 4, 0, 1, 3, 2], list(range(9))
    together = sampler(labels, 3.0, seeds)
    for row in (0, 4, 8):
        assert torch.equal(alone(labels[row : row + 1], 3.0, seeds[row : row + 1])[0], together[row])
    assert torch.equal(sampler(labels[2:5], [3.0, 1.5, 9.0], seeds[2:5])[0], together[2])


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 products")
def test_bf16_errs_no_more_than_twice_what_torch_does() -> None:
    model = model_of("head 64")
    x = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.linspace(5, 995, 16).round(), torch.arange(16) % 5
    exact, torchs, ours = (
        Sampler(model, engine=engine, dtype=dtype).predict(x, t, y)
        for engine, dtype in (("reference", "fp32"), ("reference", "bf16"), ("openvino", "bf16"))
    )
    assert 1e-4 < relative(ours, exact) <= 2 * relative(torchs, exact)


@pytest.mark.skipif(not INT8, reason="OpenVINO quantises no activations on this CPU")
def test_int8_is_whole_numbers_times_scales() -> None:
    """A scale for each output channel and for each `hidden_size` activations of a token, in torch's arithmetic."""
    model = model_of("head 64")
    assert isinstance(model.module, DiT)
    D = model.module.config.hidden_size
    x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.linspace(20, 980, 8).round(), torch.arange(8) % 5

    def rounded(values: Tensor) -> Tensor:
        groups = values.unflatten(-1, (-1, D))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        return (torch.round(groups / scale) * scale).flatten(-2)

    in_int8 = copy.deepcopy(model)
    assert isinstance(in_int8.module, DiT)
    for block in in_int8.module.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            layer.weight.data = torch.round(layer.weight.detach() / scale) * scale
            layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    exact, want, ours = (
        Sampler(of, engine=engine, dtype=dtype).predict(x, t, y)
        for of, engine, dtype in ((model, "reference", "fp32"), (in_int8, "reference", "fp32"), (model, "openvino", "int8"))
    )
    if beside_int8() == torch.float32:
        assert relative(ours, want) < 0.1 * relative(want, exact)
    assert 1e-4 < relative(ours, exact) < 0.02


def test_weights_that_change_are_noticed_and_taken_up() -> None:
    model = random_model(**MODELS["head 64"])
    sampler = Sampler(model, steps=2, batch=2, engine="openvino", dtype="fp32")
    before = sampler([1, 2], 3.0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.5)
    with pytest.raises(Error, match="refresh"):
        sampler([1, 2], 3.0)
    sampler.refresh()
    after = sampler([1, 2], 3.0)
    assert relative(after, before) > 1e-3
    assert relative(after, Sampler(model, steps=2, engine="reference", dtype="fp32")([1, 2], 3.0)) <= 1e-5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks the system for a thread's cores")
def test_threads_are_bound_to_no_core() -> None:
    """Processes on one machine would bind theirs to the same cores, and share those while others idle."""
    sampler = sampler_of("many tokens")
    sampler([1, 2, 3], 2.0)  # what compiles may be bound
    seen, done = set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            for thread in os.listdir("/proc/self/task"):
                with suppress(OSError):  # it ended just now
                    seen.add(frozenset(os.sched_getaffinity(int(thread))))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        for _ in range(20):  # they would be bound while they compute
            sampler([1, 2, 3], 2.0)
    finally:
        done.set()
        watching.join()
    assert seen == {frozenset(os.sched_getaffinity(0))}


def _in_a_fork(sampler: Sampler, answers: multiprocessing.Queue) -> None:
    try:
        answers.put(sampler([1], 3.0).shape)
    except Error as error:
        answers.put(str(error))


def test_a_forked_process_is_told_to_make_its_own() -> None:
    sampler = sampler_of("head 64")
    sampler([1], 3.0)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_in_a_fork, args=(sampler, answers))
    process.start()
    assert "does not outlive a fork" in answers.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (random_model(**MODELS["own conditions"]), {"dtype": "int8"}, ("16", "72", "'cpu'")),
        (None, {"dtype": "fp16"}, ("fp32", "float16")),
        (None, {"device": "meta"}, ("'openvino' runs on the CPU", "meta")),
        (Foreign().eval(), FOREIGN, ("Foreign", "'cpu'")),
    ],
)
def test_what_the_engine_has_not_is_refused(module: nn.Module | Denoiser | None, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(Error) as refusal:
        Sampler(module or model_of("head 64"), engine="openvino", **options)
    assert all(word in str(refusal.value) for word in words)


def test_int8_where_openvino_would_only_store_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_dit, "quantises_activations", lambda: False)
    with pytest.raises(Error, match="VNNI"):
        Sampler(model_of("head 64"), engine="openvino", dtype="int8")


def test_without_openvino_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_dit, "openvino_version", lambda: None)
    with pytest.raises(Error, match=r"pip install 'fastcfg\[openvino\]'"):
        Sampler(model_of("head 64"), engine="openvino")


def test_explain_has_no_ledger_of_a_graph_and_says_so() -> None:
    assert sampler_of("head 64").explain().ledger is None
    with pytest.raises(Error, match="OpenVINO's graph"):
        sampler_of("head 64").explain("measured")


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    arguments = ["sample", "--labels", "3", "--scale", "2", "--steps", "2", "--engine", "openvino", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert out.exists()
