"""Jobs made within the test's own process, and what their samples must be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import fastcfg
from fastcfg.jobs import Job, Spec, Unit, all_units, compute, open_store, write_unit
from fastcfg.jobs.job import Resolved, freeze, resolve
from fastcfg.jobs.units import Arrays


def make_job(spec: Spec, out: str | Path, units: Iterable[Unit] | None = None) -> Job:
    """The job `spec` at `out`, with `units` of it (all unless given) computed one after the other."""
    job = freeze(open_store(out), spec, resolve(spec, "cpu"), None)
    sampler = job.make_sampler("cpu")
    for unit in all_units(job.spec) if units is None else units:
        write_unit(job, unit, compute(sampler, job.spec, unit))
    return job


def expected(spec: Spec) -> Arrays:
    """A job's arrays by one call of a Sampler, which knows nothing of units. Pixels as `fastcfg.images` truncates them."""
    model = fastcfg.load(spec.checkpoint)
    S = len(spec.scales)
    i = np.arange(spec.samples)
    labels = i // S % model.num_classes if spec.labels == "balanced" else np.array(spec.labels)[i // S]
    scales = np.array([spec.scales[k % S] for k in i], np.float32)
    sampler = fastcfg.Sampler(model, **spec.sampler_options())
    x = sampler(labels.tolist(), scales.tolist(), spec.seed, indices=(i // S).tolist()).numpy()
    if spec.output == "uint8":
        x = np.clip(127.5 * x + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return {"images": x, "labels": labels, "scales": scales, "seeds": np.full(len(i), spec.seed), "indices": i // S}


def make_noise_job(out: str | Path, count: int, unit_size: int, shape: tuple[int, int, int], classes: int = 10) -> Job:
    """A job of random pixels [C, H, W] that no model made: as large as one likes, in seconds."""
    spec = Spec("none", (1.5,), count=count, unit_size=unit_size, dtype="fp32", engine="cpu")
    job = Job(open_store(out), spec, "0" * 64, Resolved("fp32", "cpu", shape, "cpu", "none"))
    job.store.prepare()
    job.store.write("job.json", [json.dumps(job.describe()).encode()])
    C, H, W = shape
    for unit in all_units(spec):
        n = unit.size
        i = np.arange(unit.start, unit.stop)
        images = np.random.default_rng(unit.k).integers(0, 256, (n, H, W, C), np.uint8)
        columns = {"labels": i % classes, "seeds": i * 0, "indices": i, "scales": np.full(n, 1.5, np.float32)}
        write_unit(job, unit, {**columns, "images": images})
    return job
