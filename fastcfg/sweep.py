"""Sweeps: samples over a grid of guidance settings from the same noise, as jobs that can be resumed, judged and plotted.

DIR/sweep.toml      the sweep as it was given, frozen when it began
DIR/jobs/NAME/      one job for each setting but the scale: its scales share batches
DIR/sweep.csv       a row for each point, as soon as it is judged
DIR/sweep.png       the trade-off in plots
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastcfg import metrics as m
from fastcfg.checkpoints import load
from fastcfg.errors import Error
from fastcfg.explain import count_flops, count_gradient_flops
from fastcfg.files import check_writable, write_file
from fastcfg.guidance import exact
from fastcfg.jobs import Spec, run
from fastcfg.jobs.stores import looks_remote
from fastcfg.jobs.toml import parse_table, read_text
from fastcfg.models.denoiser import Denoiser

GRID = ("solver", "steps", "interval", "rescale")  # what a sweep varies besides the scale
POINT = ("classifier", *GRID, "scale")
EVAL = ("reference", "features", "metrics", "bootstrap")

Row = dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """jobs: {name: spec}, one for each combination of the grid. The rest is what `fastcfg eval` takes."""

    jobs: dict[str, Spec]
    reference: str
    features: str
    metrics: tuple[str, ...] | None = None
    bootstrap: int | None = None

    @classmethod
    def from_toml(cls, path: Path, text: str | None = None) -> Sweep:
        """A job's spec, with a table [grid] of lists (any of solver, steps, interval, rescale) and a table [eval] of
        reference, features and, if wanted, metrics and bootstrap.

        interval = [false, [100, 600]] is without and with. text, errors: as of `Spec.from_toml`.
        """
        data, places = parse_table(read_text(path) if text is None else text, path)
        grid, judged = _table(path, data, "grid", GRID), _table(path, data, "eval", EVAL)
        for key in ("reference", "features"):
            if not isinstance(judged.get(key), str):
                raise Error(f"{path} [eval]: {key} must be text, as `fastcfg eval` takes it, got {judged.get(key)!r}")
        names = judged.get("metrics")
        if names is not None and not (isinstance(names, list) and all(name in m.METRICS for name in names)):
            raise Error(f"{path} [eval]: metrics must be a list of {', '.join(m.METRICS)}, got {names!r}")
        bootstrap = judged.get("bootstrap")
        if bootstrap is not None and not (type(bootstrap) is int and bootstrap >= 0 and bootstrap != 1):
            raise Error(f"{path} [eval]: bootstrap must be 0 or a whole number of at least 2, got {bootstrap!r}")
        for key, values in grid.items():
            if key in data:
                raise Error(f"{places[key]}: {key} is given twice, here and in [grid]")
            if not isinstance(values, list) or not values:
                raise Error(f"{path} [grid]: {key} must be a list of at least one, got {values!r}")
        jobs = {}
        for values in itertools.product(*grid.values()):
            chosen = {key: value for key, value in zip(grid, values, strict=True) if value is not False}
            spec = Spec.from_table(data | chosen, path, places | dict.fromkeys(chosen, f"{path} [grid]"))
            if spec.output != "uint8":
                raise spec.refused("output", "a sweep judges pixels: leave output out")
            jobs[_name(spec)] = spec
        return cls(jobs, judged["reference"], judged["features"], tuple(names) if names else None, bootstrap)


def run_sweep(
    path: str | Path,
    out: str | Path,
    *,
    devices: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> list[Row]:
    """Samples and judges what is missing of the sweep at `path` in the local folder `out`; every row of its sweep.csv.

    devices, workers, ray: as `fastcfg.jobs.run` takes them. Each row is a point: its settings, samples, rows_a_sample (model
    rows: 2 a guided step, 1 another), gradients_a_sample (of the classifier), gflop_a_sample (of both, as counted by
    `fastcfg explain`) and, of each metric, the figure and its 95 % interval. The same call resumes a
    killed sweep, and comes to the same rows.
    """
    path, out = Path(path), Path(out)
    text = read_text(path)  # once, as a job's
    sweep = Sweep.from_toml(path, text)
    _check_out(path, text, out)
    network = m.load_network(sweep.features, device="auto")
    reference = m.open_reference(sweep.reference, network)
    model = load(next(iter(sweep.jobs.values())).checkpoint)  # the grid varies no checkpoint
    _check(sweep, model, network, reference)
    _freeze(path, text, out)
    for name, spec in sweep.jobs.items():
        if progress:
            print(f"{name}: {spec.samples} samples", file=sys.stderr)
        run(spec, out / "jobs" / name, devices=devices, workers=workers, ray=ray, progress=progress)
    table = out / "sweep.csv"
    judged = {_key(row): row for row in read_rows(table)}
    points = [(name, settings) for name, spec in sweep.jobs.items() for settings in _settings(spec, model)]
    for name, settings in tqdm(points, "judge", unit="point", file=sys.stderr, disable=not progress):
        if _key(settings) not in judged:
            samples = m.extract(m.open_images(out / "jobs" / name, float(settings["scale"])), network)
            figures = m.evaluate(samples, reference, sweep.metrics, bootstrap=sweep.bootstrap)
            judged[_key(settings)] = settings | {"samples": str(len(samples))} | figure_cells(figures)
            write_rows(table, _rows(points, judged))
    return _rows(points, judged)


def _rows(points: Sequence[tuple[str, Row]], judged: Mapping[tuple[str, ...], Row]) -> list[Row]:
    """Those of the points that are judged, in their order."""
    return [judged[key] for _, settings in points if (key := _key(settings)) in judged]


def _table(path: Path, data: dict[str, Any], name: str, known: Sequence[str]) -> dict[str, Any]:
    """Takes the table `name` out of `data`."""
    table = data.pop(name, {})
    if not isinstance(table, dict):
        raise Error(f"{path}: {name} must be a table: [{name}]")
    for key in table:
        if key not in known:
            raise Error(f"{path} [{name}]: unknown key {key!r}: known are {', '.join(known)}")
    return table


def _name(spec: Spec) -> str:
    """A folder's name for the settings of the grid."""
    parts = [spec.solver, str(spec.steps)]
    if spec.interval is not None:
        parts += [
            "interval",
            *(["sigma"] if spec.interval.unit == "sigma" else []),
            exact(spec.interval.lo),
            exact(spec.interval.hi),
        ]
    return "-".join(parts + ([f"rescale-{exact(spec.rescale)}"] if spec.rescale else []))


def _check(sweep: Sweep, model: Denoiser, network: m.FeatureNetwork, reference: m.Reference) -> None:
    """Raises Error, before anything is sampled, where the samples could not be judged as asked."""
    C, H, W = model.shape
    for spec in sweep.jobs.values():
        spec.check_model(model)
        n = spec.samples // len(spec.scales)
        black = m.from_arrays(np.broadcast_to(np.zeros((1, H, W, C), np.uint8), (n, H, W, C)), np.zeros(n, np.int64))
        m.check(m.preview(black, network), reference, sweep.metrics, sweep.bootstrap)


def _settings(spec: Spec, model: Denoiser) -> Iterator[Row]:
    """The settings of each of a job's points."""
    plan = spec.make_plan(model)
    at, by_classifier = spec.interval, spec.classifier_guidance()
    flops, gradient_flops = count_flops(model), 0
    rows_on, gradients_on = spec.steps + int(plan.guided.sum()), 0
    if by_classifier is not None and plan.gradient is not None:
        gradient_flops = count_gradient_flops(by_classifier.classifier, model)
        rows_on, gradients_on = spec.steps, int((plan.guided & (plan.gradient != 0)).sum())
    off = 1 if by_classifier is None else 0
    for scale in spec.scales:
        rows, gradients = (spec.steps, 0) if scale == off else (rows_on, gradients_on)
        yield {
            "classifier": spec.classifier_base or "",
            "solver": spec.solver,
            "steps": str(spec.steps),
            "interval": "" if at is None else str(at),
            "rescale": exact(spec.rescale),
            "scale": exact(scale),
            "rows_a_sample": str(rows),
            "gradients_a_sample": str(gradients),
            "gflop_a_sample": f"{(rows * flops + gradients * gradient_flops) / 1e9:.6g}",
        }


def figure_cells(figures: Sequence[m.Figure]) -> Row:
    """The cells of a table for these figures: each, and the ends of its 95 % interval as NAME_low and NAME_high."""
    cells: Row = {}
    for figure in figures:
        low, high = figure.estimate.interval
        values = {figure.name: figure.estimate.value, f"{figure.name}_low": low, f"{figure.name}_high": high}
        cells |= {name: f"{value:.6g}" for name, value in values.items()}
    return cells


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in POINT)


def _check_out(path: Path, text: str, out: Path) -> None:
    """Raises Error if another sweep than the `text` of `path` is in `out`, or other things, or if it is no local folder that
    can be written in.

    Makes nothing.
    """
    if looks_remote(out):
        raise Error(f"cannot write in {out}: a sweep is kept in a local folder")
    kept = out.absolute() / "sweep.toml"
    try:
        new = next(place for place in (kept, *kept.parents) if place.parent.exists())
        if not new.parent.is_dir():
            raise Error(f"cannot write in {out}: {new.parent} is not a folder")
        check_writable(new)
        if kept.exists():
            if read_text(kept) != text:
                raise Error(f"{out} holds another sweep: compare {out / kept.name} with {path}, or give another --out")
        elif out.exists() and any(out.iterdir()):
            raise Error(f"{out} holds other things: want a new or an empty folder for --out")
    except OSError as error:
        raise Error(f"cannot write in {out}: {error.strerror or error}") from error


def _freeze(path: Path, text: str, out: Path) -> None:
    """Keeps the sweep's text in `out`. Raises Error as `_check_out` does."""
    _check_out(path, text, out)  # again: another sweep may have begun there
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"cannot write in {out}: {error.strerror or error}") from error
    if not (out / "sweep.toml").exists():
        write_file(out / "sweep.toml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_rows(table: Path) -> list[Row]:
    """The rows of a table, none where there is no table yet."""
    try:
        return list(csv.DictReader(io.StringIO(table.read_text())))
    except FileNotFoundError:
        return []


def write_rows(table: Path, rows: Sequence[Row]) -> None:
    """Writes a table whole, with the columns of all its rows."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(itertools.chain(*rows))), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(table, lambda temporary: temporary.write_text(buffer.getvalue()))
