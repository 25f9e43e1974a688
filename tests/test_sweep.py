"""Sweeps: the grid, the points' figures, going on after an end at any point, refusals."""

import csv
import math

import numpy as np
import pytest
import torch

import fastcfg
from fastcfg import Error, jobs, metrics, sweep
from fastcfg.images import to_uint8
from fastcfg.sweep import Sweep, run_sweep

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


@pytest.fixture
def spec(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    path = tmp_path / "sweep.toml"
    path.write_text(SPEC.format(count=COUNT, reference=tmp_path / "reference.npz"))
    return path


def test_every_point_is_a_row_with_the_figures_of_its_own_samples(spec, tmp_path):
    rows = run_sweep(spec, tmp_path / "out", progress=False)
    assert [(row["interval"], row["scale"]) for row in rows] == [("", "1"), ("", "3"), ("0:600", "1"), ("0:600", "3")]
    assert [row["rows_a_sample"] for row in rows] == ["2", "4", "2", "3"]  # t = 999 is outside the interval
    with open(tmp_path / "out" / "sweep.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    # the last point, sampled and judged without a job
    sampler = fastcfg.Sampler(fastcfg.load("fashion-mnist"), steps=2, interval=(0, 600), batch=8)
    images = to_uint8(sampler(torch.arange(COUNT) % 10, 3.0, seeds=0))
    network = metrics.load_network("fashion-cnn")
    samples = metrics.extract(network, metrics.from_arrays(images, np.arange(COUNT) % 10))
    reference = metrics.open_reference(tmp_path / "reference.npz", network)
    for figure in metrics.evaluate(samples, reference, ["frechet_distance", "class_accuracy"], bootstrap=2):
        assert math.isclose(float(rows[-1][figure.name]), figure.estimate.value, rel_tol=1e-5)


def test_all_points_start_from_the_same_noise(spec, tmp_path):
    run_sweep(spec, tmp_path / "out", progress=False)
    seen = set()
    for name in Sweep.from_toml(spec).jobs:
        samples = jobs.open(tmp_path / "out" / "jobs" / name)[:]
        for scale in (1.0, 3.0):
            rows = samples.scale == scale
            seen.add((samples.seed[rows].tobytes(), samples.index[rows].tobytes(), samples.label[rows].tobytes()))
    assert len(seen) == 1


@pytest.mark.parametrize("after", [1, 3])
def test_a_sweep_that_ended_early_comes_to_the_same_table(after, spec, tmp_path, monkeypatch):
    run_sweep(spec, tmp_path / "whole", progress=False)
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
    judged = []
    monkeypatch.setattr(sweep.m, "evaluate", lambda *a, **o: judged.append(1) or evaluate(*a, **o))
    run_sweep(spec, tmp_path / "out", progress=False)
    assert len(judged) == 4 - after
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()


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


def test_another_sweep_in_the_folder_is_refused(spec, tmp_path):
    run_sweep(spec, tmp_path / "out", progress=False)
    spec.write_text(spec.read_text().replace("[1.0, 3.0]", "[1.0, 4.0]"))
    with pytest.raises(Error, match="holds another sweep"):
        run_sweep(spec, tmp_path / "out", progress=False)
