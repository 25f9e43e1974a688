"""Sweeps: the grid, the points' figures, going on after an end at any point, refusals."""

import csv
import math

import numpy as np
import pytest
import torch

import fastcfg
from fastcfg import Error, jobs, metrics, sweep
from fastcfg.images import to_uint8
from fastcfg.sweep import Sweep, run_sweep, write_rows

COUNT = 20
SPEC = """
checkpoint = "fashion-mnist"
count = {count}
labels = "balanced"
scales = [1.0, 3.0]
unit_size = 16
batch = 8

[grid]
steps = [2]
interval = [false, [0, 600]]

[eval]
reference = "{reference}"
features = "fashion-cnn"
metrics = ["frechet_distance", "class_accuracy"]
bootstrap = 2
"""


def write_spec(folder):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    path = folder / "sweep.toml"
    path.write_text(SPEC.format(count=COUNT, reference=folder / "reference.npz"))
    return path


@pytest.fixture
def spec(tmp_path):
    return write_spec(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of the sweep, its rows), of one run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", run_sweep(write_spec(folder), folder / "out", progress=False)


def test_every_point_is_a_row_with_the_figures_of_its_own_samples(whole):
    out, rows = whole
    assert [(row["interval"], row["scale"]) for row in rows] == [("", "1"), ("", "3"), ("0:600", "1"), ("0:600", "3")]
    assert [row["rows_a_sample"] for row in rows] == ["2", "4", "2", "3"]  # t = 999 is outside the interval
    assert {(row["classifier"], row["gradients_a_sample"]) for row in rows} == {("", "0")}
    with open(out / "sweep.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    # the last point, sampled and judged without a job
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=2, interval=(0, 600), batch=8)
    images = to_uint8(sampler(torch.arange(COUNT) % 10, 3.0, seeds=0))
    network = metrics.load_network("fashion-cnn")
    samples = metrics.extract(metrics.from_arrays(images, np.arange(COUNT) % 10), network)
    reference = metrics.open_reference(out.parent / "reference.npz", network)
    for figure in metrics.evaluate(samples, reference, ["frechet_distance", "class_accuracy"], bootstrap=2):
        assert math.isclose(float(rows[-1][figure.name]), figure.estimate.value, rel_tol=1e-5)


def test_all_points_start_from_the_same_noise(whole):
    out, _ = whole
    seen = set()
    for name in Sweep.from_toml(out / "sweep.toml").jobs:
        samples = jobs.open(out / "jobs" / name)[:]
        for scale in (1.0, 3.0):
            rows = samples.scale == scale
            seen.add((samples.seed[rows].tobytes(), samples.index[rows].tobytes(), samples.label[rows].tobytes()))
    assert len(seen) == 1


def test_a_classifier_is_guidance_like_another(spec, tmp_path):
    """Its scales are the sweep's, and its gradients are counted beside the model's rows."""
    text = spec.read_text().replace("scales = [1.0, 3.0]", 'scales = [0.0, 3.0]\nclassifier = "fashion-mnist"')
    spec.write_text(text.replace("interval = [false, [0, 600]]", "interval = [[0, 600]]"))
    rows = run_sweep(spec, tmp_path / "out", progress=False)
    counts = [(row["classifier"], row["scale"], row["rows_a_sample"], row["gradients_a_sample"]) for row in rows]
    assert counts == [("null", "0", "2", "0"), ("null", "3", "2", "1")]  # t = 999 is outside the interval
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=2, interval=(0, 600), batch=1, classifier_guidance=(
        fastcfg.ClassifierGuidance(fastcfg.load_classifier("fashion-mnist"))))  # fmt: skip
    cost = sampler.explain()
    assert float(rows[1]["gflop_a_sample"]) == pytest.approx((cost.flops + cost.classifier_flops) / 1e9, rel=1e-5)
    assert float(rows[0]["gflop_a_sample"]) == pytest.approx(2 * cost.flops_per_row / 1e9, rel=1e-5)


@pytest.mark.parametrize("after", [1, 3])
def test_a_sweep_that_ended_early_comes_to_the_same_table(after, spec, whole, tmp_path, monkeypatch):
    evaluate, calls = metrics.evaluate, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(sweep.m, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, tmp_path / "out", progress=False)
    monkeypatch.undo()
    table = tmp_path / "out" / "sweep.csv"
    header, *lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([header, *lines[1:]]))  # and one that is not the last is lost
    judged, tables = [], []
    monkeypatch.setattr(sweep, "write_rows", lambda table, rows: tables.append(len(rows)) or write_rows(table, rows))
    monkeypatch.setattr(sweep.m, "evaluate", lambda *a, **o: judged.append(1) or evaluate(*a, **o))
    run_sweep(spec, tmp_path / "out", progress=False)
    assert len(judged) == 5 - after
    assert tables == list(range(after, 5)), "killed now, the sweep would have lost points that were judged"
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == (whole[0] / "sweep.csv").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = [2]", "steps = 2", "list of at least one"),
        ("steps = [2]", "stepz = [2]", "unknown key 'stepz'"),
        ("steps = [2]", "steps = [0]", "steps must be a whole number"),
        ("interval = [false", "interval = [[3, 1]", "lower bound"),
        ("scales = [1.0, 3.0]", "scales = [1.0, 3.0]\nsteps = 5", "given twice"),
        ("scales = [1.0, 3.0]", 'scales = [1.0, 3.0]\noutput = "latents"', "judges pixels"),
        ('"class_accuracy"]', '"accuracy"]', "metrics must be a list of"),
        ('features = "fashion-cnn"', "", "features must be text"),
        ("bootstrap = 2", "bootstrap = 1", "bootstrap must be"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_written(old, new, message, spec, tmp_path):
    text = spec.read_text()
    assert old in text
    spec.write_text(text.replace(old, new))
    with pytest.raises(Error, match=message):
        run_sweep(spec, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_judged_is_refused_before_it_is_sampled(spec, tmp_path):
    spec.write_text(spec.read_text().replace("count = 20", "count = 5").replace('"class_accuracy"]', '"density"]'))
    with pytest.raises(Error, match="density needs at least 6 samples on either side, got 5"):
        run_sweep(spec, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("afile", "afile is not a folder"),
        ("afile/sweep", "afile is not a folder"),
        ("/proc/sw", "cannot write /proc/sw: "),
        ("x" * 300, "File name too long"),
        ("s3://bucket/sweep", "a sweep is kept in a local folder"),
        (".", "holds other things"),
    ],
)
def test_out_is_refused_before_anything_is_loaded(out, message, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").touch()
    spec.rename(tmp_path / "spec.toml")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sweep.m, "load_network", lambda *_: pytest.fail("the network was loaded"))
    with pytest.raises(Error, match=message):
        run_sweep("spec.toml", out, progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_spec_that_is_edited_meanwhile_is_kept_as_it_was_begun(spec, tmp_path, monkeypatch):
    text, load = spec.read_text(), metrics.load_network
    monkeypatch.setattr(sweep.m, "load_network", lambda *a, **o: spec.write_text("# another") and load(*a, **o))
    monkeypatch.setattr(sweep, "run", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(pytest.fail.Exception):
        run_sweep(spec, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "sweep.toml").read_text() == text


def test_a_folder_that_cannot_be_made_is_one_error(spec, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Error, match=r"cannot write in .*out: File exists"):
        sweep._freeze(spec, spec.read_text(), tmp_path / "out")


def test_settings_that_differ_in_the_last_digits_are_other_points(spec):
    text = spec.read_text().replace("[false, [0, 600]]", "[[100.0001, 999], [100.0002, 999]]\nrescale = [0.7, 0.70000001]")
    spec.write_text(text.replace("scales = [1.0, 3.0]", "scales = [3.0, 3.0000001]"))
    found = Sweep.from_toml(spec)
    want = [(lo, phi) for lo in ("100.0001", "100.0002") for phi in ("0.7", "0.70000001")]
    assert list(found.jobs) == [f"ddim-2-interval-{lo}-999-rescale-{phi}" for lo, phi in want]
    model = fastcfg.load("fashion-mnist")
    points = [settings for job in found.jobs.values() for settings in sweep._settings(job, model)]
    assert len({sweep._key(settings) for settings in points}) == len(points) == 8
    assert {float(settings["scale"]) for settings in points} == {3.0, 3.0000001}


def test_another_sweep_in_the_folder_is_refused(spec, whole):
    spec.write_text(spec.read_text().replace("[1.0, 3.0]", "[1.0, 4.0]"))
    with pytest.raises(Error, match="holds another sweep"):
        run_sweep(spec, whole[0], progress=False)
