"""The whole CUDA engine under the interpreter, against the reference engine, and its handling of weights and requests."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted import relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

import fastcfg
from fastcfg.engines import cuda, make_engine
from fastcfg.engines.capture import StepGraphs
from fastcfg.engines.cuda import CudaEngine, DiTLoop, ModuleLoop
from fastcfg.models.denoiser import describe_dit
from fastcfg.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"input_size": 8, "in_channels": 3, "hidden_size": 64, "depth": 2, "num_heads": 1, "num_classes": 5}
# Of the largest value. Over these steps the network's own float32 rounding grows to this, whichever engine computes it
CLOSE = 3e-5
# A clipped x0 = (x - sigma eps) / alpha shows 158 times eps's rounding at t = 999; it is compared from here on
LOW = [300, 200, 100, 50]


def random_dit(seed: int = 0, **changes: object) -> fastcfg.DiT:
    """A DiT in which every weight matters: none of the zeros that training starts from."""
    module = fastcfg.DiT(**{**TINY, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25)
    return module


class Foreign(nn.Module):
    """A small module that is not a DiT: t and y as channels, a convolution either side of a non-linearity."""

    def __init__(self, channels: int = 3, variance: bool = False):
        super().__init__()
        self.inner = nn.Conv2d(channels, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, channels * (1 + variance), 3, padding=1)
        self.classes = nn.Embedding(6, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = self.classes(y) + torch.sin(t[:, None].to(x.dtype))  # which a quarter of a timestep changes
        return self.outer(torch.tanh(self.inner(x) + condition[:, :, None, None]))


def sampler(model: nn.Module, engine: str = "cuda", **options: object) -> fastcfg.Sampler:
    fixed = {"steps": 4, "batch": 2, "device": "cpu", "dtype": "fp32", "engine": engine}
    return fastcfg.Sampler(model, **{**fixed, **options})


def foreign_sampler(engine: str = "cuda", module: nn.Module | None = None, **options: object) -> fastcfg.Sampler:
    torch.manual_seed(0)
    module = Foreign().eval() if module is None else module
    return sampler(module, engine, null_label=5, num_classes=5, shape=(3, 8, 8), **options)


def difference(make: object, scale: object = 3.0, labels: tuple[int, ...] = (1, 4), **call: object) -> float:
    """cuda against reference, for samplers that `make(engine)` makes."""
    got, want = (make(engine)(labels, scale, 11, **call) for engine in ("cuda", "reference"))
    assert (got.shape, got.dtype) == (want.shape, torch.float32)
    return relative_error(got, want)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"hidden_size": 144, "num_heads": 2}, {"interval": (200, 700)}),
        ({}, {"solver": "ddpm"}),
        ({"learn_sigma": False}, {"solver": "dpmpp_2m"}),
        ({}, {"eta": 0.8, "guidance_channels": 2}),
        ({}, {"rescale": 0.7}),
        ({}, {"rescale": 0.7, "guidance_channels": 2, "solver": "dpmpp_2m"}),
        ({"learn_sigma": False}, {"clip": True, "spacing": LOW}),
        ({"block_conditioning": True}, {}),
        ({"patch_size": 4, "in_channels": 5}, {"eta": 0.5}),  # 80 values a patch: no step_boundary
        ({"mlp_norm_eps": 1e-2}, {"solver": "euler", "spacing": "linspace", "steps": 5}),  # t is 999, 749.25, ..
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) or "plain",
)
def test_a_dit_agrees_with_the_reference(model, options):
    module = random_dit(**model)
    assert difference(lambda engine: sampler(module, engine, **options)) < CLOSE


def test_each_row_has_its_own_scale_label_and_seed():
    module = random_dit(depth=1)

    def run(engine):
        return sampler(module, engine, batch=3)([0, 0, 3], torch.tensor([1.5, 4.0, 7.0]), [3, 4, 5])

    assert relative_error(run("cuda"), run("reference")) < CLOSE
    varying = torch.tensor([[1.0], [4.0], [2.0], [1.0]])  # no null rows at the ends
    assert difference(lambda engine: sampler(module, engine), scale=varying) < CLOSE
    assert difference(lambda engine: sampler(module, engine), scale=1.0) < CLOSE


@pytest.mark.parametrize("options", [{"eta": 0.8}, {"solver": "ddpm"}, {}, {"solver": "euler", "spacing": LOW}], ids=str)
def test_given_noise(options):
    module = random_dit()
    x_T, noise = torch.randn(2, 3, 8, 8), torch.randn(4, 2, 3, 8, 8)
    assert difference(lambda engine: sampler(module, engine, **options), x_T=x_T, noise=noise) < CLOSE


def test_given_and_drawn_noise_in_turn_leave_no_trace():
    drawn = sampler(random_dit(depth=1), steps=2, eta=0.8)
    first = drawn([1, 2], 3.0, 5)
    noise = torch.randn(2, 2, 3, 8, 8)
    given = drawn([1, 2], 3.0, 5, noise=noise)
    assert torch.equal(drawn([1, 2], 3.0, 5), first)
    assert torch.equal(drawn([1, 2], 3.0, 5, noise=noise), given)
    assert not torch.equal(first, given)


def test_a_table_in_windows(monkeypatch):
    module = random_dit(depth=1)
    whole = sampler(module, steps=5, eta=0.5)([1, 4], 3.0)
    row = (6 + 2) * 64 * 4
    monkeypatch.setattr(cuda, "TABLE_BYTES", 2 * 3 * row)  # two steps of two labels and the null label
    windows = sampler(module, steps=5, eta=0.5)
    assert relative_error(windows([1, 4], 3.0), whole) < 1e-6
    (loop,) = windows.engine._loops.values()
    assert (loop.window, len(loop.table)) == (2, 6)


def test_a_samples_bits_do_not_depend_on_its_batch():
    """With 64 tokens a tile is one sample, and with one label the table's rows keep their places in a tile: NumPy's products,
    which the interpreter makes, depend on both."""
    module = random_dit(input_size=16, depth=1)
    together = sampler(module, steps=2, batch=3, eta=0.5)([2, 2, 2], 3.0, [9, 8, 7])
    pair = sampler(module, steps=2, batch=2, eta=0.5)
    assert torch.equal(pair([2, 2], 3.0, [7, 9]), together[[2, 0]])
    assert torch.equal(pair([2], 3.0, [8]), together[1:2])


def test_the_result_is_the_callers():
    one = sampler(random_dit(depth=1), steps=2)
    first = one([1, 2], 3.0, 0)
    kept = first.clone()
    one([3, 4], 3.0, 1)
    assert torch.equal(first, kept)


def test_the_callers_modes_leave_no_trace():
    one = sampler(random_dit(depth=1), steps=2)
    with torch.inference_mode():
        first = one([1, 2], 3.0)
    assert torch.equal(one([1, 2], 3.0), first)
    with torch.autocast("cpu", torch.bfloat16):
        other = sampler(random_dit(depth=1), steps=2)
        assert torch.equal(other([1, 2], 3.0), first)
    assert not one([1, 2], 3.0).requires_grad


@pytest.mark.parametrize("foreign", [False, True])
def test_torchs_default_dtype_does_not_matter(foreign, default_dtype):
    make = foreign_sampler if foreign else lambda **options: sampler(random_dit(depth=1), **options)
    options = {"steps": 2, "rescale": 0.5}
    want = make(**options)([1, 4], 3.0)
    made = make(**options)
    with default_dtype(torch.float64):
        got = made([1, 4], 3.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("foreign", [False, True])
def test_torchs_default_device_does_not_matter(foreign):
    make = foreign_sampler if foreign else lambda **options: sampler(random_dit(depth=1), **options)
    want = make(steps=2)([1, 4], 3.0)
    made = make(steps=2)
    with torch.device("meta"):
        got = made([1, 4], 3.0)
    assert torch.equal(got, want)


def test_predict_agrees_with_the_reference():
    module = random_dit()
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([999, 400, 3])
    for make in (lambda engine: sampler(module, engine), foreign_sampler):
        got, want = (make(engine).predict(x, t, [0, 4, 2]) for engine in ("cuda", "reference"))
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-5
        got, want = (make(engine).predict(x, t, None) for engine in ("cuda", "reference"))
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interval": (200, 700)},
        {"eta": 0.8, "rescale": 0.5},
        {"solver": "dpmpp_2m"},
        {"solver": "euler", "spacing": "linspace", "steps": 5},
    ],
    ids=str,
)
def test_a_foreign_module_agrees_with_the_reference(options):
    assert difference(lambda engine: foreign_sampler(engine, **options)) < CLOSE


def test_a_foreign_module_with_learned_variance():
    torch.manual_seed(0)
    module = Foreign(variance=True).eval()
    assert difference(lambda engine: foreign_sampler(engine, module, solver="ddpm")) < CLOSE


def test_a_foreign_module_conditioned_on_embeddings():
    class Embedded(Foreign):
        def forward(self, x, t, y):
            return self.outer(torch.tanh(self.inner(x) + y[:, :, None, None] + 0 * t[:, None, None, None]))

    torch.manual_seed(0)
    module, null, labels = Embedded().eval(), torch.randn(16), torch.randn(2, 16)
    run = [sampler(module, e, null_label=null, shape=(3, 8, 8))(labels, 3.0) for e in ("cuda", "reference")]
    assert relative_error(*run) < CLOSE


def test_a_model_without_a_null_label():
    module = random_dit(class_dropout_prob=0.0)
    assert difference(lambda engine: sampler(module, engine), scale=1.0) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_changed_weights_are_noticed_and_taken_up_in_place(dtype):
    module, other = random_dit(seed=1, depth=1), random_dit(seed=2, depth=1)
    name = "fp32" if dtype == torch.float32 else "fp16"
    one = sampler(module, dtype=name, steps=2)
    one([1, 2], 3.0)
    before = [tensor.data_ptr() for tensor in one.engine._weights._program.weights()]
    module.load_state_dict(other.state_dict())
    with pytest.raises(fastcfg.Error, match=r"sampler\.refresh"):
        one([1, 2], 3.0)
    one.refresh()
    fresh, x, t = sampler(other, dtype=name, steps=2), torch.ones(2, 3, 8, 8), torch.tensor([12.5, 700.0])
    assert torch.equal(one([1, 2], 3.0), fresh([1, 2], 3.0))
    assert torch.equal(one.predict(x, t, [1, 2]), fresh.predict(x, t, [1, 2]))
    assert [tensor.data_ptr() for tensor in one.engine._weights._program.weights()] == before


def test_a_module_that_got_a_hook_is_not_sampled_as_before():
    module = random_dit(depth=1)
    one = sampler(module, steps=2)
    module.blocks[0].attn.register_forward_hook(lambda *_: None)
    for call in (lambda: one([1, 2], 3.0), one.refresh):
        with pytest.raises(fastcfg.Error, match="make a new sampler"):
            call()


def test_changed_weights_of_a_foreign_module():
    torch.manual_seed(0)
    module, other = Foreign().eval(), Foreign().eval()
    itself, converted = foreign_sampler(module=module), foreign_sampler(module=module, dtype="fp16")
    first = itself([1, 2], 3.0)
    converted([1, 2], 3.0)
    module.load_state_dict(other.state_dict())
    assert not torch.equal(itself([1, 2], 3.0), first)  # it reads the module's own weights
    with pytest.raises(fastcfg.Error, match=r"sampler\.refresh"):
        converted([1, 2], 3.0)
    converted.refresh()
    assert converted.engine._loops  # what is captured reads the same copy
    assert torch.equal(converted([1, 2], 3.0), foreign_sampler(module=other, dtype="fp16")([1, 2], 3.0))
    module.outer.weight = nn.Parameter(first.new_zeros(3, 16, 3, 3))
    with pytest.raises(fastcfg.Error, match=r"sampler\.refresh"):
        itself([1, 2], 3.0)
    itself.refresh()
    assert not itself.engine._loops  # what was captured reads where the weights were
    assert torch.equal(itself([1, 2], 3.0), foreign_sampler(module=copy.deepcopy(module))([1, 2], 3.0))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_sampler_made_in_inference_mode_is_refreshed_outside(dtype):
    with torch.inference_mode():
        made = foreign_sampler(dtype=dtype, steps=2)
    want = made([1, 4], 2.0)
    made.refresh()
    assert torch.equal(made([1, 4], 2.0), want)


def test_what_is_fused_and_what_is_not():
    for changes, kind in (({}, DiTLoop), ({"hidden_size": 40, "num_heads": 2}, ModuleLoop)):
        module = random_dit(**changes)
        one = sampler(module)
        one([1, 2], 3.0)
        (loop,) = one.engine._loops.values()
        assert (type(loop), bool(one.engine.notes)) == (kind, kind is ModuleLoop)
    assert "not the package's DiT" in foreign_sampler().engine.notes[0]
    assert difference(lambda engine: sampler(module, engine)) < CLOSE


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_size": 128}, None),
        ({"hidden_size": 136}, "a head has 136 values"),
        ({"hidden_size": 40, "num_heads": 2}, "a head has 20 values"),
        ({"patch_size": 8, "in_channels": 4}, None),
        ({"patch_size": 8, "in_channels": 5}, "a patch has 320 values"),
    ],
)
def test_what_the_kernels_take(config, why):
    found = cuda.why_not_fused(describe_dit(random_dit(depth=1, **config)))
    assert found is None if why is None else found.startswith(why)


def test_buffers_of_few_batch_sizes_are_kept(monkeypatch):
    cleared = []
    monkeypatch.setattr(cuda, "MAX_BATCHES", 2)
    monkeypatch.setattr(StepGraphs, "clear", lambda graphs: cleared.append(graphs))
    one = sampler(random_dit(depth=1), steps=2)
    asked = []
    run = one.engine.run
    one.engine.run = lambda request: asked.append(request) or run(request)
    one([1, 2], 3.0)
    (request,) = asked
    for rows in (1, 3):
        few = {name: getattr(request, name)[..., :1].repeat(*[1] * (getattr(request, name).ndim - 1), rows)
               for name in ("labels", "scale")}  # fmt: skip
        seeds = request.seeds[:1].repeat(rows)
        one.engine.run(replace(request, **few, seeds=seeds, indices=seeds))
    assert list(one.engine._loops) == [1, 3]
    assert len(cleared) == 1


def test_refusals():
    module = random_dit()
    with pytest.raises(fastcfg.Error, match="int8"):
        sampler(module, dtype="int8")
    with pytest.raises(fastcfg.Error, match="bf16"):
        sampler(module, dtype="bf16")
    with pytest.raises(fastcfg.Error, match="fp32, bf16, fp16, and the model is float64: give a dtype"):
        foreign_sampler(module=Foreign().eval().double(), dtype="auto")
    assert foreign_sampler(module=Foreign().eval().double()).engine.dtype == torch.float32
    with pytest.raises(fastcfg.Error, match="needs a GPU"):
        CudaEngine(sampler(module).model, sampler(module).plan, torch.device("meta"))
    training = sampler(module)
    module.train()
    with pytest.raises(fastcfg.Error, match="training mode"):
        training([1, 2], 3.0)


def test_without_a_gpu_and_without_the_interpreter_it_is_refused(monkeypatch):
    one = sampler(random_dit())
    monkeypatch.setattr(cuda, "interpreted", lambda: False)
    with pytest.raises(fastcfg.Error, match="use the cpu engine"):
        make_engine("cuda", one.model, one.plan, "cpu", "auto")


def test_auto_is_float32_under_the_interpreter():
    assert sampler(random_dit(), dtype="auto").engine.dtype == torch.float32


def test_the_official_codes_outputs(tmp_path):
    """The forwards and one loop; the whole file is `fastcfg verify --engine cuda`, a minute under the interpreter."""
    expected = fastcfg.files.read_safetensors(GOLDEN / "dit_tiny.expected.safetensors")
    kept = ("x", "t", "y", "forward", "forward_null", "cfg3", "ddim10_cfg3", "ddim10_timesteps")
    subset = tmp_path / "expected.safetensors"
    save_file({name: expected[0][name] for name in kept}, subset, expected[1])
    rows = [row for row in verify(GOLDEN / "dit_tiny.weights.safetensors", subset, engine="cuda") if row.relative is not None]
    assert len(rows) == len(kept) - 3
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
