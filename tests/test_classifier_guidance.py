"""Classifier guidance: Bayes' rule on Gaussian mixtures, where every score is known, and what a caller may rely on."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fused_dit import random_model, relative
from torch import Tensor, nn

from fastcfg import Denoiser, Error, Sampler, Schedule, schedule
from fastcfg.engines import cpu_module
from fastcfg.engines.cpu import CpuEngine
from fastcfg.files import read_safetensors, write_safetensors
from fastcfg.guidance import ClassifierGuidance
from fastcfg.models.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from fastcfg.plan import gradient_column
from fastcfg.solvers import Grid

CLASSES, PARTS, SHAPE = 3, 2, (1, 2, 3)  # an even mixture of two Gaussians a class, on six values
LABELS, SEED = [0, 1, 2, 1, 0], 7


class Mixture(nn.Module):
    """x0 of class k is an even mixture of N(mean[k, m], spread[k, m]^2), and classes are not even. All in float64."""

    def __init__(self, levels: Schedule):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.levels = levels
        self.mean = nn.Parameter(0.8 * torch.randn(CLASSES, PARTS, math.prod(SHAPE), generator=g, dtype=torch.float64), False)
        self.spread = nn.Parameter(0.2 + 0.3 * torch.rand(CLASSES, PARTS, generator=g, dtype=torch.float64), False)
        self.prior = nn.Parameter(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), False)

    def at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma) [N, 1, 1]; x - alpha mean [N, K, M, D]; the variance of each Gaussian at t [N, K, M]."""
        alpha, sigma = (torch.from_numpy(v)[:, None, None] for v in self.levels.at(t.numpy() - self.levels.time_offset))
        away = x.double().flatten(1)[:, None, None] - alpha[..., None] * self.mean
        return alpha, sigma, away, (alpha * self.spread) ** 2 + sigma**2

    def log_joint(self, away: Tensor, variance: Tensor) -> Tensor:
        """log p(x_t, k, m) up to a constant, [N, K, M]."""
        D = away.shape[-1]
        return (self.prior / PARTS).log()[:, None] - D / 2 * variance.log() - away.square().sum(-1) / (2 * variance)


class Exact(Mixture):
    """The network: E[eps | x_t, y] in closed form, or of all classes for the null label; as what `predicts` says."""

    def __init__(self, levels: Schedule, predicts: str):
        super().__init__(levels)
        self.predicts = predicts

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma, away, variance = self.at(x, t)
        own = (y[:, None] == torch.arange(CLASSES)) | (y[:, None] == CLASSES)
        share = self.log_joint(away, variance).masked_fill(~own[..., None], -torch.inf).flatten(1).softmax(1)
        share = share.view_as(variance)[..., None]
        eps = (share * (sigma / variance)[..., None] * away).sum((1, 2))
        x0 = (share * (self.mean + (alpha * self.spread**2 / variance)[..., None] * away)).sum((1, 2))
        outputs = {"eps": eps, "x0": x0, "v": alpha[..., 0] * eps - sigma[..., 0] * x0, "flow": eps - x0}
        return outputs[self.predicts].view_as(x)


class ExactClassifier(Mixture):
    """log p(y | x_t) up to a constant, which autograd is left to differentiate."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        _, _, away, variance = self.at(x, t)
        return self.log_joint(away, variance).logsumexp(2)


def exact(predicts: str = "eps", name: str = "linear", **options: object) -> Callable[..., Sampler]:
    """Makes samplers of the mixture: with a base, guided by its exact classifier."""
    levels = schedule(name)
    model = Denoiser(Exact(levels, predicts).eval(), SHAPE, CLASSES, CLASSES, schedule=levels, predicts=predicts)

    def make(base: str | None = None, **others: object) -> Sampler:
        asked = None if base is None else ClassifierGuidance(ExactClassifier(levels).eval(), base=base)
        settings = {"steps": 12, "spacing": "trailing", "batch": 5, "engine": "reference"}
        return Sampler(model, classifier_guidance=asked, **{**settings, **options, **others})

    return make


def same(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


WORLDS = {
    "ddim eps": ("eps", "linear", {"eta": 0.0}),
    "ddim v": ("v", "linear", {"eta": 0.0}),
    "ddim x0": ("x0", "linear", {"eta": 0.0}),
    "ddim v cosine": ("v", "cosine", {"eta": 0.0, "spacing": [990, 800, 500, 200, 30], "steps": 5}),
    "ddim eta 1": ("eps", "linear", {"eta": 1.0}),
    "ddpm": ("v", "linear", {"solver": "ddpm"}),
    "dpmpp_2m": ("x0", "linear", {"solver": "dpmpp_2m"}),
    "euler": ("eps", "linear", {"solver": "euler", "spacing": "linspace"}),
    "clipped": ("eps", "linear", {"clip": True}),
    "clipped, eps kept": ("v", "linear", {"clip": "keep_eps"}),
    "flow": ("flow", "flow", {"solver": "euler", "spacing": [950, 700, 400, 100, 20], "steps": 5}),
}


@pytest.mark.parametrize("world", WORLDS)
def test_bayes_rule_makes_unconditional_samples_conditional(world: str) -> None:
    """eps_y = eps - sigma grad log p(y | x_t), so at scale 1 the exact classifier gives what the exact eps_y gives."""
    predicts, name, options = WORLDS[world]
    make = exact(predicts, name, **options)
    want = make()(LABELS, seeds=SEED)
    same(make("null")(LABELS, seeds=SEED), want)
    assert (make("null")(LABELS, seeds=SEED, classifier_scale=0.0) - want).abs().max() > 0.1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("interval", [None, (150, 650)])
def test_guidance_by_the_exact_classifier_is_classifier_free_guidance(world: str, interval: tuple[int, int] | None) -> None:
    """eps + s (eps_y - eps) = eps - s sigma grad log p = eps_y - (s - 1) sigma grad log p (2207.12598, section 3.2)."""
    predicts, name, options = WORLDS[world]
    make = exact(predicts, name, interval=interval, **options)
    scales = np.array([1.0, 1.5, 2.0, 3.0, 5.0])
    want = make()(LABELS, scales, SEED)
    conditional = make("conditional")
    same(conditional(LABELS, seeds=SEED, classifier_scale=scales - 1), want)
    # What one strength lacks the other makes up for: s of classifier-free guidance and c of the classifier's are s + c
    same(conditional(LABELS, np.minimum(scales, 1.75), SEED, classifier_scale=np.maximum(scales - 1.75, 0)), want)
    if interval is None:
        same(make("null")(LABELS, seeds=SEED, classifier_scale=scales), want)


def test_scale_by_step() -> None:
    make = exact(steps=4)
    scales = np.array([[1.0], [4.0], [2.0], [1.0]])
    same(make("conditional")(LABELS, seeds=SEED, classifier_scale=scales - 1), make()(LABELS, scales, SEED))


def test_a_scale_is_taken_in_float64() -> None:
    assert ClassifierGuidance(a_classifier(), 0.1).table(2, 3).tolist() == [[0.1] * 3] * 2


@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "flow"])
def test_the_plans_column_is_the_definition(predicts: str) -> None:
    """At one x_t, eps is moved by -sigma g and the output recomputed from what a prediction is."""
    for alpha, sigma in ((0.6, 0.4), (0.1, 0.9)) if predicts == "flow" else ((0.6, 0.8), (0.0064, math.sqrt(1 - 0.0064**2))):
        x, eps, g = np.random.default_rng(0).normal(size=(3, 50))

        def output(e: np.ndarray, alpha: float = alpha, sigma: float = sigma, x: np.ndarray = x) -> np.ndarray:
            x0 = (x - sigma * e) / alpha
            return {"eps": e, "x0": x0, "v": alpha * e - sigma * x0, "flow": e - x0}[predicts]

        column = gradient_column(Grid(np.array([alpha, 1.0]), np.array([sigma, 0.0]), predicts))
        np.testing.assert_allclose(column[0] * g, output(eps - sigma * g) - output(eps), rtol=1e-9, atol=1e-9 / alpha)


def test_where_the_sample_is_all_noise_nothing_is_added() -> None:
    plan = exact("flow", "flow", solver="euler")("null").plan
    assert plan.alpha[0] == 0
    assert plan.gradient is not None
    assert plan.gradient[0] == 0
    assert (plan.gradient[1:] < 0).all()
    assert torch.isfinite(exact("flow", "flow", solver="euler")("null")(LABELS)).all()


def test_the_plan_shows_the_column() -> None:
    make = exact(steps=2)
    assert "gradient" in str(make("null").plan)
    assert "gradient" not in str(make().plan)
    assert make().plan.gradient is None


# From here on, networks whose gradient is nothing in particular.


def a_classifier(channels: int = 3, classes: int = 5, seed: int = 0, name: str = "linear") -> Classifier:
    torch.manual_seed(seed)
    module = Classifier(ClassifierConfig(channels, classes, width=8, levels=2, blocks=1), schedule(name)).eval()
    return module.requires_grad_(False)


def guided(model: Denoiser | nn.Module, base: str = "null", scale: float = 20.0, **options: object) -> Sampler:
    asked = ClassifierGuidance(a_classifier(), scale, base)
    return Sampler(model, classifier_guidance=asked, **{"steps": 3, "batch": 4, "dtype": "fp32", **options})


ENGINES = ["reference", "cpu"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", ["null", "conditional"])
def test_scale_0_is_unguided_to_the_bit(engine: str, base: str) -> None:
    model = random_model()
    plain = Denoiser(model.module, model.shape, 5, 6, learned_variance=True)  # whose labels have the null label among them
    labels = [1, 4, 0]
    sampler = guided(model, base, engine=engine)
    want = Sampler(plain, steps=3, batch=4, dtype="fp32", engine=engine)([5] * 3 if base == "null" else labels, seeds=SEED)
    calls: list[int] = []
    sampler.classifier_guidance.classifier.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(sampler(labels, seeds=SEED, classifier_scale=0), want)
    assert calls == []
    assert not torch.equal(sampler(labels, seeds=SEED), want)
    mixed = sampler(labels, seeds=SEED, classifier_scale=[0, 20, 0])
    assert torch.equal(mixed[[0, 2]], want[[0, 2]])
    assert not torch.equal(mixed[1], want[1])


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize(("base", "scale"), [("null", 1.0), ("conditional", 1.0), ("conditional", 3.0)])
def test_the_cpu_engine_is_the_reference(base: str, scale: float, solver: str) -> None:
    options = {"solver": solver, "interval": (100, 800), "steps": 4, "predicts": "v"}
    if base == "conditional":
        options |= {"rescale": 0.5, "guidance_channels": 2}
    call = ([1, 4, 0, 2, 2], scale, SEED)
    reference, ours = (guided(random_model(), base, engine=engine, **options)(*call) for engine in ENGINES)
    assert relative(ours, reference) < 1e-5
    assert relative(reference, guided(random_model(), base, scale=0.0, engine="reference", **options)(*call)) > 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", ["null", "conditional"])
def test_bits_do_not_depend_on_how_many_rows_or_which_neighbours(engine: str, base: str) -> None:
    sampler = guided(random_model(), base, engine=engine, eta=1.0)
    labels, seeds = [0, 1, 2, 3, 4, 0, 1, 2, 3], list(range(9))
    scales = [20.0, 1.0, 20.0, 0.0, 5.0, 20.0, 3.0, 20.0, 1.0]
    together = sampler(labels, seeds=seeds, classifier_scale=scales)
    for some in ([0], [8, 2], [7, 6, 5, 4, 3, 2, 1, 0], [2, 2, 2]):
        few = sampler([labels[i] for i in some], seeds=[seeds[i] for i in some], classifier_scale=[scales[i] for i in some])
        assert torch.equal(few, together[some])


def test_bits_do_not_depend_on_the_cpu_engines_batch_or_workers() -> None:
    labels = [i % 5 for i in range(9)]
    want = guided(random_model(), engine="cpu", batch=9)(labels, seeds=SEED)
    for batch, workers in ((1, 1), (4, 2), (9, 3)):
        sampler = guided(random_model(), engine="cpu", batch=batch)
        sampler.engine = CpuEngine(sampler.model, sampler.plan, sampler.engine.device, sampler.engine.dtype, workers)
        assert torch.equal(sampler(labels, seeds=SEED), want)


class Sizes(nn.Module):
    """A classifier whose rows' bits depend on no other row, or on all of them. sizes: of its forwards."""

    def __init__(self, mixes: bool):
        super().__init__()
        self.mixes, self.sizes = mixes, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.sizes.append(len(x))
        seen = (x - x.mean(0)) if self.mixes and len(x) > 1 else x
        return torch.tanh(seen.flatten(1)[:, :5]) * torch.arange(1, 6)


@pytest.mark.parametrize(("mixes", "sizes"), [(False, [16, 4, 2]), (True, [1] * 21)])
def test_samples_share_a_classifiers_forward_where_that_leaves_them_their_bits(mixes: bool, sizes: list[int]) -> None:
    asked = ClassifierGuidance(Sizes(mixes).eval())
    sampler = Sampler(random_model(), engine="reference", batch=21, steps=1, spacing=[500], classifier_guidance=asked)
    asked.classifier.sizes.clear()
    together = sampler([i % 5 for i in range(21)], seeds=SEED)
    assert asked.classifier.sizes == sizes
    for i in (0, 15, 17, 20):
        assert torch.equal(sampler([i % 5], seeds=SEED, indices=[i])[0], together[i])


class Foreign(nn.Module):
    """Counts the rows it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(3, 3, 3, 3, generator=generator))
        self.table = nn.Embedding.from_pretrained(torch.randn(6, 3, generator=generator))
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen += y.tolist()
        return torch.tanh(nn.functional.conv2d(x + self.table(y)[:, :, None, None], self.weight, padding=1))


def foreign(**options: object) -> tuple[Foreign, dict[str, object]]:
    return Foreign().eval(), {"shape": (3, 8, 8), "null_label": 5, "num_classes": 5, **options}


def test_a_module_on_the_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "fastest", lambda *_: "eager")
    module, options = foreign()
    reference, ours = (guided(module, engine=engine, **options) for engine in ENGINES)
    scales = [20.0, 0.0, 5.0, 20.0, 1.0]
    want = reference([0, 1, 2, 3, 4], seeds=SEED, classifier_scale=scales)
    assert relative(ours([0, 1, 2, 3, 4], seeds=SEED, classifier_scale=scales), want) < 1e-6
    assert torch.equal(ours([3], seeds=SEED, indices=[3]), ours([0, 3], seeds=SEED, indices=[0, 3])[1:])


@pytest.mark.parametrize(
    ("base", "scale", "rows"),
    [("null", 1.0, {5: 12}), ("conditional", 1.0, {1: 12}), ("conditional", 2.0, {1: 12, 5: 4})],
)
def test_forwards_are_no_more_than_needed(base: str, scale: float, rows: dict[int, int]) -> None:
    """Three steps of four rows, one of them in the interval: no conditional forward on null, no gradient outside."""
    module, options = foreign(engine="reference", spacing=[900, 500, 100], interval=(400, 600))
    sampler = guided(module, base, **options)
    module.seen.clear()
    asked: list[int] = []
    sampler.classifier_guidance.classifier.register_forward_pre_hook(lambda _, inputs: asked.extend(inputs[1].tolist()))
    sampler([1, 1, 1, 1], scale)
    assert {label: module.seen.count(label) for label in set(module.seen)} == rows
    assert asked == [500] * 4


class Fixed(nn.Module):
    """eps 0, and v the same everywhere: what is left of a step is its mean and its spread."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 0.5)], dim=1)


def test_guidance_leaves_the_variance_alone() -> None:
    """The noise that a step adds is the network's to say, whatever the classifier moves in it."""
    sampler = guided(Fixed().eval(), shape=(3, 8, 8), null_label=5, solver="ddpm", steps=2, spacing=[600, 200])
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    first = {on: sampler([1], x_T=x_T, noise=on * noise, classifier_scale=[[40.0], [0.0]]) for on in (0.0, 1.0)}
    none = {on: sampler([1], x_T=x_T, noise=on * noise, classifier_scale=0) for on in (0.0, 1.0)}
    assert (first[0.0] - none[0.0]).abs().max() > 1e-3
    assert none[1.0].abs().max() > 0.1
    same(first[1.0] - first[0.0], none[1.0] - none[0.0], 1e-5)


def test_gradients_are_the_same_in_any_mode_of_the_caller_and_leave_no_trace() -> None:
    for engine in ENGINES:
        sampler = guided(random_model(), engine=engine)
        classifier = sampler.classifier_guidance.classifier.requires_grad_(True)
        want = sampler([1, 2], seeds=SEED)
        assert not want.requires_grad
        assert all(parameter.grad is None for parameter in classifier.parameters())
        with torch.inference_mode():
            assert torch.equal(sampler([1, 2], seeds=SEED), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sampler([1, 2], seeds=SEED), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sampler_may_be_made_and_refreshed_in_inference_mode(dtype: torch.dtype) -> None:
    model, classifier = random_model(), a_classifier().to(dtype).requires_grad_(True)

    def made(module: nn.Module) -> Sampler:
        return Sampler(model, steps=2, engine="reference", classifier_guidance=ClassifierGuidance(module, 20.0))

    want = made(classifier)([1, 2], seeds=SEED)
    with torch.inference_mode():
        samplers = made(classifier), made(copy.deepcopy(classifier))
        assert all(torch.equal(sampler([1, 2], seeds=SEED), want) for sampler in samplers)
        for sampler in samplers:
            sampler.refresh()
    assert all(torch.equal(sampler([1, 2], seeds=SEED), want) for sampler in samplers)


def test_torchs_default_dtype_does_not_matter(default_dtype: Callable) -> None:
    model, classifier = random_model(), a_classifier()

    def samples() -> Tensor:
        asked = ClassifierGuidance(classifier, 20.0)
        return Sampler(model, steps=2, engine="reference", classifier_guidance=asked)([1, 2], seeds=SEED)

    want = samples()
    with default_dtype(torch.float64):
        got = samples()
    assert torch.equal(got, want)


def test_torchs_default_device_does_not_matter() -> None:
    model, classifier = random_model(), a_classifier()

    def samples() -> Tensor:
        asked = ClassifierGuidance(classifier, 20.0)
        return Sampler(model, steps=2, engine="cpu", classifier_guidance=asked)([1, 2], seeds=SEED)

    want = samples()
    with torch.device("meta"):
        got = samples()
    assert torch.equal(got, want)


def test_bf16_networks_take_the_gradient_in_float32() -> None:
    asked: list[torch.dtype] = []
    sampler = guided(random_model(), engine="reference", dtype="bf16")
    sampler.classifier_guidance.classifier.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].dtype))
    assert torch.isfinite(sampler([1, 2])).all()
    assert set(asked) == {torch.float32}


def test_a_copied_classifier_that_changed_is_noticed() -> None:
    classifier = a_classifier().bfloat16()
    sampler = Sampler(
        random_model(), steps=2, batch=2, engine="reference", classifier_guidance=ClassifierGuidance(classifier, 9)
    )
    before = sampler([1, 2])
    with torch.no_grad():
        classifier.head.weight.mul_(2)
    with pytest.raises(Error, match=r"the classifier's weights changed .* sampler.refresh\(\)"):
        sampler([1, 2])
    sampler.refresh()
    assert not torch.equal(sampler([1, 2]), before)


def test_a_classifier_in_training_mode_is_refused() -> None:
    sampler = guided(random_model())
    sampler.classifier_guidance.classifier.blocks[0].train()
    with pytest.raises(Error, match=r"the classifier is in training mode.*classifier.eval\(\)"):
        sampler([1])
    with pytest.raises(Error, match="the classifier is in training mode"):
        Sampler(random_model(), classifier_guidance=ClassifierGuidance(a_classifier().train()))


class Says(nn.Module):
    """A classifier that answers what it was made with."""

    def __init__(self, answer: Callable[[Tensor], object]):
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> object:
        return self.answer(x)


def with_classifier(module: nn.Module, base: str = "null", **options: object) -> Callable[[], object]:
    return lambda: Sampler(random_model(), classifier_guidance=ClassifierGuidance(module.eval(), base=base), **options)


def embedded() -> Sampler:
    module = Foreign().eval()
    module.table = nn.Linear(4, 3).eval()  # type: ignore[assignment]
    asked = ClassifierGuidance(a_classifier())
    module.seen = type("Deaf", (list,), {"__iadd__": lambda self, _: self})()
    return Sampler(module, shape=(3, 8, 8), null_label=torch.zeros(4), classifier_guidance=asked)


def call(base: str = "null", **arguments: object) -> Callable[[], object]:
    return lambda: guided(random_model(), base)([0, 1], **arguments)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "not a module": (lambda: ClassifierGuidance(lambda x, t: x), "torch.nn.Module.*function"),
    "unknown base": (lambda: ClassifierGuidance(a_classifier(), base="both"), "'null' or 'conditional', got 'both'"),
    "negative scale": (
        lambda: ClassifierGuidance(a_classifier(), -1),
        "classifier scale must be finite and at least 0, got -1",
    ),
    "scale NaN": (call(classifier_scale=float("nan")), "classifier scale must be finite"),
    "scale text": (call(classifier_scale="2"), "classifier scale must be a number or numbers, got '2'"),
    "scale wrong rows": (call(classifier_scale=[1.0] * 3), "classifier scale has one value a row: 3 values .* 2 rows"),
    "scale wrong steps": (call(classifier_scale=np.ones((2, 1))), r"classifier scale per step must be \[3, 1\] or \[3, 2\]"),
    "scale without classifier": (
        lambda: Sampler(random_model(), steps=2)([0], classifier_scale=1.0),
        "no classifier: make it with classifier_guidance=",
    ),
    "classifier-free scale on null": (call(scale=2.0), "base 'null' predicts nothing for y: scale must be 1"),
    "classifier-free scale outside the interval": (
        lambda: guided(random_model(), interval=(0, 1))([0, 1], [[2.0], [1.0], [1.0]]),
        "base 'null' predicts nothing for y",
    ),
    "w on null": (call(w=1.0), "base 'null' predicts nothing for y"),
    "rescale on null": (with_classifier(a_classifier(), rescale=0.5), "base 'null' has none"),
    "guided channels on null": (with_classifier(a_classifier(), guidance_channels=1), "base 'null' has none"),
    "no null label": (
        lambda: Sampler(random_model(class_dropout_prob=0.0), classifier_guidance=ClassifierGuidance(a_classifier())),
        "no null label .* base 'conditional'",
    ),
    "embeddings": (embedded, "whole numbers for labels, and the model's are embeddings"),
    "other classes": (with_classifier(a_classifier(classes=4)), r"into \[1, 4\]: want logits \[1, 5\]"),
    "other channels": (
        with_classifier(a_classifier(channels=1)),
        r"could not be differentiated as classifier\(x \[1, 3, 8, 8\]",
    ),
    "no tensor": (with_classifier(Says(lambda _: "a cat")), r"into str: want logits \[1, 5\]"),
    "constant": (with_classifier(Says(lambda x: x.new_zeros(len(x), 5))), "could not be differentiated"),
    "without gradient": (
        with_classifier(Says(torch.no_grad()(lambda x: x.flatten(1)[:, :5]))),
        "could not be differentiated",
    ),
    "other schedule": (with_classifier(a_classifier(name="cosine")), "trained on schedule .*'cosine'.* sampled on .*'linear'"),
    "cuda graphs": (with_classifier(a_classifier(), engine="cuda"), "hold no classifier's gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    action, says = BAD[case]
    with pytest.raises(Error, match=says) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_a_classifier_is_saved_whole(tmp_path: Path) -> None:
    path, made = tmp_path / "classifier.safetensors", a_classifier(name="cosine")
    save_classifier(made, path, {"step": 3})
    read = load_classifier(path)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    assert torch.equal(read(x, t), made(x, t))
    assert not read.training
    assert read.config == made.config
    assert read.schedule.to_json() == schedule("cosine").to_json()
    assert json.loads(read_safetensors(path)[1]["training"]) == {"step": 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "other"}, "of another kind"),
        ({"config": json.dumps({"width": 9})}, "width must be a multiple of 8, got 9"),
        ({"config": json.dumps({"depth": 9})}, "description is damaged"),
        ({"config": json.dumps({"width": 16})}, "does not fit its config"),
        ({"schedule": "{"}, "description is damaged"),
    ],
)
def test_a_bad_classifier_file_is_refused(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    save_classifier(a_classifier(), path, {})
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {**metadata, **changes})
    with pytest.raises(Error, match=says) as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(Error, match="not a whole safetensors file"):
        load_classifier(path)


class OneLinear(nn.Module):
    """One product a row: 192 values to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def test_explain_counts_the_classifiers_forward_and_backward() -> None:
    settings = {"steps": 10, "spacing": "ddim", "interval": (100, 300), "batch": 4}
    asked = ClassifierGuidance(OneLinear().eval())
    guide, plain = Sampler(random_model(), classifier_guidance=asked, **settings), Sampler(random_model(), **settings)
    told = guide.explain()
    assert told.rows == 4 * 10
    assert told.guided_steps == 0
    assert told.classifier_rows == 4 * 3
    assert told.classifier_flops == 4 * 3 * 2 * (2 * 192 * 5)  # x W and then W' g, a multiply-add being two
    assert "12 rows, forward and backward" in str(told)
    assert plain.explain().classifier_flops == 0
    assert "classifier" not in str(plain.explain())
