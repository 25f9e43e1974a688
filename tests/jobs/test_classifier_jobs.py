"""Jobs guided by a classifier: whose samples they are, whose weights decide them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import make_job

import fastcfg
from fastcfg import ClassifierGuidance, Error, jobs
from fastcfg.jobs import Spec
from fastcfg.jobs.job import check_same
from fastcfg.models.classifier import Classifier, ClassifierConfig, save_classifier

SCALES = (0.0, 2.1)  # 2.1 is no float32


@pytest.fixture
def write_classifier(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_classifier(name, seed, classes=5): a random classifier for the tiny model's noise levels."""

    def write(name: str, seed: int, classes: int = 5) -> Path:
        torch.manual_seed(seed)
        schedule = fastcfg.load(tiny_checkpoint).schedule
        save_classifier(Classifier(ClassifierConfig(3, classes, width=8, levels=2), schedule), tmp_path / name, {})
        return tmp_path / name

    return write


@pytest.fixture
def spec(tiny_spec: Spec, write_classifier: Callable[..., Path]) -> Spec:
    return replace(tiny_spec, classifier=str(write_classifier("a.safetensors", 0)), scales=SCALES)


@pytest.mark.parametrize("base", ["null", "conditional"])
def test_samples_are_those_of_a_sampler(base: str, spec: Spec, tmp_path: Path) -> None:
    make_job(replace(spec, classifier_base=base, output="latents"), tmp_path / "out")
    samples = jobs.open(tmp_path / "out")[:]
    assert spec.classifier is not None
    guidance = ClassifierGuidance(fastcfg.load_classifier(spec.classifier), base=base)
    options = spec.sampler_options()
    sampler = fastcfg.Sampler(fastcfg.load(spec.checkpoint), classifier_guidance=guidance, **options)
    x = sampler(samples.label, classifier_scale=np.tile(SCALES, 20), seeds=samples.seed, indices=samples.index)
    assert np.array_equal(samples.image, x.numpy())
    assert np.array_equal(samples.scale, np.tile(np.float32(SCALES), 20))
    # and the classifier matters: scale 0 is the model's own sample
    unguided = fastcfg.Sampler(fastcfg.load(spec.checkpoint), **options)
    rows = samples.scale == 0
    if base == "conditional":
        own = unguided(samples.label[rows], 1.0, seeds=samples.seed[rows], indices=samples.index[rows]).numpy()
        assert np.array_equal(samples.image[rows], own)
    assert not np.array_equal(samples.image[rows], samples.image[~rows])


def test_another_classifier_is_refused_and_a_moved_one_is_not(
    spec: Spec, write_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(spec, tmp_path / "out", [])
    assert job.spec.classifier is not None
    moved = Path(job.spec.classifier).rename(tmp_path / "moved.safetensors")
    asked = replace(spec, classifier=str(moved))
    check_same(job, asked)
    assert jobs.run(asked, tmp_path / "out", devices="cpu", progress=False).complete
    with pytest.raises(Error, match="another checkpoint or classifier"):
        check_same(job, replace(spec, classifier=str(write_classifier("b.safetensors", 1))))
    with pytest.raises(Error, match="classifier_base: 'null' there, None here"):
        check_same(job, replace(spec, classifier=None, classifier_base=None, scales=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        ('classifier = "nowhere.safetensors"', "classifier", "nowhere.safetensors"),
        ('classifier = "seven.safetensors"', "classifier", "7"),
        ("classifier = 3", "classifier", "must be text"),
        ('classifier_base = "null"', "classifier_base", "goes with a classifier"),
        ('classifier = "a.safetensors"\nclassifier_base = "y"', "classifier_base", "unknown classifier_base"),
        ('classifier = "a.safetensors"\nrescale = 0.5', "rescale", "is classifier-free guidance's"),
        ('classifier = "a.safetensors"\nguidance_channels = 1', "guidance_channels", "is classifier-free guidance's"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_line(
    line: str, key: str, message: str, write_spec: Callable[..., Path], write_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    write_classifier("a.safetensors", 0)
    write_classifier("seven.safetensors", 0, classes=7)
    path = write_spec()
    path.write_text(path.read_text() + line + "\n")
    number = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{key} ="))
    with pytest.raises(Error, match=f"line {number}: ") as caught:
        jobs.run(path, tmp_path / "out", devices="cpu", progress=False)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_scales_below_one_need_a_classifier(write_spec: Callable[..., Path]) -> None:
    with pytest.raises(Error, match="line 3: scales: each must be at least 1"):
        Spec.from_toml(write_spec(scales=[0.5]))
