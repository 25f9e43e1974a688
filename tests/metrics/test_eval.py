"""All figures together, and the command: what it prints, what it leaves out, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastcfg import metrics as m
from fastcfg.cli import main
from fastcfg.errors import Error
from fastcfg.training.data import load_data

FASHION = Path("/usr/share/datasets/fashion-mnist")


def features(n: int = 60, width: int = 6, shift: float = 0.0, **more: object) -> m.Features:
    return m.Features((np.random.default_rng(n).standard_normal((n, width)) + shift).astype(np.float32), **more)  # type: ignore[arg-type]


def judged(n: int = 60) -> m.Features:
    labels = np.arange(n) % 4
    logits = (5 * np.eye(4)[labels]).astype(np.float32)
    return features(n, logits=logits, labels=labels, judges_labels=True)


def reference(n: int = 80, width: int = 6) -> m.Reference:
    x = features(n, width).values
    return m.Reference(m.moments(x), x, n)


@pytest.mark.parametrize("seed", [m.SEED, 7])
def test_every_figure_is_that_of_its_own_function(seed: int) -> None:
    samples, other = judged(), reference()
    found = {figure.name: figure for figure in m.evaluate(samples, other, bootstrap=10, seed=seed)}
    assert tuple(found) == m.METRICS
    x, y = samples.values, other.features
    whole = m.manifold(x, y)
    expected = {
        "frechet_distance": (m.frechet_distance(x, y), m.frechet_error(x, y, 10, seed)),
        "kid": m.kid(x, y, subset_size=60, seed=seed),
        "inception_score": (
            m.inception_score(samples.logits, seed=seed),
            m.inception_score_error(samples.logits, resamples=10, seed=seed),
        ),
        **whole._asdict(),
        "class_accuracy": (1.0, 0.0),
    }
    for name, figure in found.items():
        assert tuple(figure.estimate) == pytest.approx(tuple(expected[name]), rel=1e-9), name
        assert figure.samples == 60
        assert figure.reference == (0 if name in ("inception_score", "class_accuracy") else 80)


@pytest.mark.parametrize(("width", "resamples"), [(512, 100), (513, 20)])
def test_wide_features_are_resampled_less(width: int, resamples: int) -> None:
    (figure,) = m.evaluate(features(8, width), reference(9, width), ["frechet_distance"])
    error = m.frechet_error(features(8, width).values, reference(9, width).moments, resamples)
    assert figure.estimate.error == pytest.approx(error, rel=1e-9)


def test_metrics_by_name_come_in_that_order() -> None:
    found = m.evaluate(judged(), reference(), ["recall", "frechet_distance"], bootstrap=0)
    assert [figure.name for figure in found] == ["recall", "frechet_distance"]
    assert np.isnan(found[1].estimate.error)


def test_figures_follow_the_seed() -> None:
    one, same, other = (m.evaluate(judged(), reference(), bootstrap=5, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


LACKING = {
    "no logits": (features(), reference(), {"inception_score": "no", "class_accuracy": "has none"}),
    "no labels": (features(logits=np.zeros((60, 4)), judges_labels=True), reference(), {"class_accuracy": "samples have none"}),
    "logits of something else": (
        features(logits=np.zeros((60, 4)), labels=np.zeros(60, int)), reference(), {"class_accuracy": "whose classes are"}),
    "labels beyond the network": (
        features(logits=np.zeros((60, 4)), labels=np.full(60, 4), judges_labels=True), reference(),
        {"class_accuracy": r"0\.\.3, got 4 to 4"}),
    "statistics alone": (
        judged(), m.Reference(m.Moments(np.zeros(6), np.eye(6))), dict.fromkeys(("kid", *m.METRICS[3:7]), "give images")),
    "five samples": (judged(5), reference(), dict.fromkeys(m.METRICS[2:7], "needs at least")),
    "five references": (judged(), reference(5), dict.fromkeys(m.METRICS[3:7], "at least 6 samples on either side, got 5")),
    "one sample": (judged(1), reference(), dict.fromkeys(m.METRICS[:7], "needs at least")),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_what_inputs_do_not_allow_is_left_out_or_refused(case: str) -> None:
    """Left out where nothing was named, with the reason; an error where it was."""
    samples, other, expected = LACKING[case]
    reasons = m.unavailable(samples, other)
    assert set(reasons) == set(expected)
    found = [figure.name for figure in m.evaluate(samples, other, bootstrap=0)]
    assert found == [name for name in m.METRICS if name not in expected]
    for name, reason in expected.items():
        with pytest.raises(Error, match=f"{name} needs .*{reason}|{name} {reason}"):
            m.check(samples, other, [name])


def test_impossible_requests_are_refused() -> None:
    samples = judged()
    with pytest.raises(Error, match="unknown metric 'fid': known are frechet_distance, kid"):
        m.evaluate(samples, reference(), ["fid"])
    with pytest.raises(Error, match=r"^frechet_distance, kid, .*coverage cannot be had without a reference"):
        m.evaluate(judged(), None)
    with pytest.raises(Error, match="one width, got 6 and 9"):
        m.evaluate(samples, reference(width=9))
    with pytest.raises(Error, match="at least 2, got 1"):
        m.evaluate(samples, reference(), bootstrap=1)
    broken = features()
    broken.values[3, 2] = np.nan
    with pytest.raises(Error, match="NaN or infinity"):
        m.evaluate(broken, reference(), ["frechet_distance"])


def grey(folder: Path, name: str, n: int = 24, labelled: bool = True, size: int = 28) -> Path:
    rng = np.random.default_rng(n)
    arrays = {"arr_0": rng.integers(0, 256, (n, size, size, 1), dtype=np.uint8)}
    np.savez(folder / name, **arrays, **({"arr_1": np.arange(n) % 10} if labelled else {}))
    return folder / name


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["eval", *(str(a) for a in arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_command_prints_a_row_a_figure(tmp_path: Path) -> None:
    a, b = grey(tmp_path, "a.npz", 24), grey(tmp_path, "b.npz", 30)
    lines = run(a, b, "--features", "fashion-cnn", "--bootstrap", 4).splitlines()
    assert lines[0] == f"{a} against {b}, seen through fashion-cnn (128 features)"
    rows = {line[:16].strip(): line[16:].split() for line in lines[3:-1]}
    assert tuple(rows) == tuple(name.replace("_", " ") for name in m.METRICS)
    assert rows["recall"][-2:] == ["24", "30"]
    assert rows["class accuracy"][-2:] == ["24", "-"]
    assert "24 samples do not fill 128 features" in lines[-1]


@pytest.mark.parametrize(("n", "warns"), [(128, True), (129, False)])
def test_command_warns_of_samples_that_cannot_fill_the_features(n: int, warns: bool, tmp_path: Path) -> None:
    """n samples have a covariance of rank n - 1."""
    a, b = grey(tmp_path, "a.npz", n), grey(tmp_path, "b.npz", 30)
    text = run(a, b, "--features", "fashion-cnn", "--metrics", "frechet_distance", "--bootstrap", 0)
    assert (f"{n} samples do not fill 128 features" in text) == warns


def test_command_reads_no_reference_for_figures_that_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = grey(tmp_path, "a.npz", 24), grey(tmp_path, "b.npz", 30)
    monkeypatch.setattr(m, "open_reference", lambda *_, **__: pytest.fail("it read the reference"))
    lines = run(a, b, "--features", "fashion-cnn", "--metrics", "class_accuracy,inception_score", "--bootstrap", 0).splitlines()
    assert lines[0] == f"{a}, seen through fashion-cnn (128 features)"
    assert [line.split()[-2:] for line in lines[3:]] == [["24", "-"], ["24", "-"]], "or a word on a figure not asked for"
    data = json.loads(run(a, b, "--features", "fashion-cnn", "--metrics", "class_accuracy", "--json"))
    assert data["reference"] == {"path": str(b), "count": None}


def test_command_judges_one_of_several_scales(tmp_path: Path) -> None:
    a, b = grey(tmp_path, "a.npz", 24), grey(tmp_path, "b.npz", 30)
    with np.load(a) as archive:
        np.savez(tmp_path / "s.npz", **archive, arr_2=np.arange(24) % 4 + 1)
    told = json.loads(run(tmp_path / "s.npz", b, "--features", "fashion-cnn", "--scale", 3, "--bootstrap", 0, "--json"))
    assert told["samples"] == {"path": str(tmp_path / "s.npz"), "scale": 3, "count": 6}


def test_command_says_the_same_in_json(tmp_path: Path) -> None:
    a, b = grey(tmp_path, "a.npz", 24), grey(tmp_path, "b.npz", 30)
    data = json.loads(run(a, b, "--features", "fashion-cnn", "--bootstrap", 0, "--seed", 5, "--json"))
    network = m.load_network("fashion-cnn")
    samples, other = m.extract(m.open_images(a), network), m.open_reference(b, network)
    for figure in m.evaluate(samples, other, bootstrap=0, seed=5):
        assert data["figures"][figure.name]["value"] == pytest.approx(figure.estimate.value, rel=1e-9), figure.name
    assert data["figures"]["frechet_distance"]["error"] is None
    assert data["figures"]["class_accuracy"]["low"] < data["figures"]["class_accuracy"]["value"]
    assert data["samples"] == {"path": str(a), "scale": None, "count": 24}
    assert data["features"]["fingerprint"] == network.fingerprint


def test_command_leaves_out_and_says_why(tmp_path: Path) -> None:
    a = grey(tmp_path, "a.npz", 24, labelled=False)
    np.savez(tmp_path / "s.npz", mu=np.zeros(128), sigma=np.eye(128))
    text = run(a, tmp_path / "s.npz", "--features", "fashion-cnn", "--bootstrap", 2)
    assert "class_accuracy is left out: it needs labels, and the samples have none" in text
    assert "kid is left out: it needs features of the reference" in text
    assert text.count("left out") == 6
    assert next(line for line in text.splitlines() if line.startswith("frechet")).endswith("?")


REFUSED = {
    "no features named": ("{a} {b}", "--features"),
    "unknown network": ("{a} {b} --features vgg", "no feature network at 'vgg'"),
    "no samples": ("{dir}/none.npz {b} --features fashion-cnn", "none.npz"),
    "no reference": ("{a} {dir}/none --features fashion-cnn", "no images at"),
    "unknown metric": ("{a} {b} --features fashion-cnn --metrics fid", "unknown metric 'fid'"),
    "metric without labels": ("{unlabelled} {b} --features fashion-cnn --metrics class_accuracy", "needs labels"),
    "KID from statistics": ("{a} {wide} --features fashion-cnn --metrics kid", "kid needs features of the reference"),
    "statistics of another width": ("{a} {narrow} --features fashion-cnn", "one width, got 128 and 5"),
    "images of another size": ("{small} {b} --features fashion-cnn", "28 x 28, got 1 x 8 x 8"),
    "bootstrap of one": ("{a} {b} --features fashion-cnn --bootstrap 1", "at least 2, got 1"),
    "negative bootstrap": ("{a} {b} --features fashion-cnn --bootstrap -3", "got -3"),
    "seed": ("{a} {b} --features fashion-cnn --seed -1", "seed of a metric must be 0 to 2^32 - 1, got -1"),
    "scale of an npz": ("{a} {b} --features fashion-cnn --scale 2", "--scale picks samples of a job"),
    "scale of a split": ("{dir}:test {b} --features fashion-cnn --scale 2", "--scale picks samples of a job"),
    "several scales": ("{scales} {b} --features fashion-cnn", "scales 1, 3: pick one with --scale"),
    "several scales of a reference": ("{b} {scales} --features fashion-cnn", "for a REFERENCE, export one scale"),
    "scale that is none": ("{scales} {b} --features fashion-cnn --scale 2", "no samples at scale 2, only at 1, 3"),
    "device": ("{a} {b} --features fashion-cnn --device abacus", "'abacus'"),
}


WITHOUT_THE_REFERENCE = ("unknown metric", "metric without labels", "bootstrap of one", "negative bootstrap", "seed")


@pytest.mark.parametrize("case", REFUSED)
def test_command_exits_2_before_the_work_and_writes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "extract", lambda *_, **__: pytest.fail("it judged the samples"))
    if case in WITHOUT_THE_REFERENCE:
        monkeypatch.setattr(m, "open_reference", lambda *_, **__: pytest.fail("it read the reference"))
    names = {"a": grey(tmp_path, "a.npz"), "b": grey(tmp_path, "b.npz", 30), "dir": tmp_path}
    names |= {"unlabelled": grey(tmp_path, "u.npz", labelled=False), "small": grey(tmp_path, "s.npz", size=8)}
    for name, width in (("wide", 128), ("narrow", 5)):
        names[name] = tmp_path / f"{name}.npz"
        np.savez(names[name], mu=np.zeros(width), sigma=np.eye(width))
    names["scales"] = tmp_path / "scales.npz"
    np.savez(names["scales"], arr_0=np.zeros((4, 28, 28, 1), np.uint8), arr_2=[1.0, 3.0] * 2)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 784)
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(2))
    before = sorted(tmp_path.rglob("*"))
    line, message = REFUSED[case]
    result = CliRunner().invoke(main, ["eval", *line.format(**names).split()])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Fashion-MNIST")
def test_real_images_are_near_and_others_far() -> None:
    """600 test images against 1,200 training images; then without a class, and noise. See benchmarks/metrics_check.py."""
    train, test = load_data(FASHION, "train"), load_data(FASHION, "test")
    network = m.load_network("fashion-cnn")
    pixels, labels = test.images[:600].transpose(0, 2, 3, 1), test.labels[:600]
    other = m.reference_of(m.from_arrays(train.images[:1200].transpose(0, 2, 3, 1)), network)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    sets = {"real": (pixels, labels), "missing": (pixels[labels != 8], labels[labels != 8]), "noise": (noise, labels)}
    found = {}
    for name, (images, y) in sets.items():
        samples = m.extract(m.from_arrays(images, y), network)
        found[name] = {f.name: f.estimate for f in m.evaluate(samples, other, bootstrap=20)}
    real, missing, noise_ = found["real"], found["missing"], found["noise"]
    for far in (missing, noise_):
        assert far["frechet_distance"].interval[0] > 2 * real["frechet_distance"].interval[1]
        assert far["kid"].interval[0] > real["kid"].interval[1]
        assert far["coverage"].interval[1] < real["coverage"].interval[0]
    assert abs(real["kid"].value) < 3 * real["kid"].error
    assert missing["recall"].interval[1] < real["recall"].interval[0]
    assert noise_["recall"].value < 0.1
    assert noise_["density"].value < 0.5 < real["density"].value
    assert noise_["class_accuracy"].value < 0.2 < 0.9 < real["class_accuracy"].value
