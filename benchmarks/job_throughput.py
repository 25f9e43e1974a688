"""What a batch job costs over the bare sampler, and diffusers' loop beside it: the same model, labels and noise, in one run.

    python benchmarks/job_throughput.py                                # 10,000 samples; nothing else should run
    python benchmarks/job_throughput.py --samples 100 --block 20 --out /tmp/x.csv

Samples of the shipped model, 25 DDIM steps, s = 2. All take turns: the job computes a block, in its worker process, up to its
files on disk; a Sampler in this process computes the block's first unit again in memory; and diffusers' pipeline loop, with the
same weights, does so in the first few blocks. A pause of one leaves the others alone with the machine. Prints the median over
blocks of each one's images/s and of the job's over the Sampler's, and the worker's resident memory in the first and the last
thousand samples; writes benchmarks/results/job_throughput.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import psutil
import torch
from cpu.cases import diffusers_twin, shipped_model
from cpu.report import Report, this_machine
from numpy.typing import NDArray
from torch import Tensor

import fastcfg
from fastcfg.engines import DTYPES
from fastcfg.errors import Error
from fastcfg.images import to_uint8
from fastcfg.jobs import Job, Spec, Unit, all_units, compute, open_store
from fastcfg.jobs.job import freeze, resolve
from fastcfg.jobs.local_runner import run_units
from fastcfg.jobs.worker import Outcome
from fastcfg.models.denoiser import Denoiser
from fastcfg.noise import INITIAL_STEP, normal

STEPS, SCALE = 25, 2.0
THOUSAND = 1000
UNITS = 4  # in a block; the first is the others' as well


@dataclass
class Blocks:
    """The job's units in blocks; the iterator a runner takes them from, which is empty between blocks."""

    units: list[Unit]
    _given: deque[Unit] = field(default_factory=deque)

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        if not self._given:
            raise StopIteration
        return self._given.popleft()

    def give(self, size: int) -> list[Unit]:
        """Hands out the next `size` units."""
        block, self.units = self.units[:size], self.units[size:]
        self._given.extend(block)
        return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--block", type=int, default=1000, help=f"samples in a block of {UNITS} units")
    parser.add_argument("--diffusers", type=int, default=3, help="blocks with diffusers' loop; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtype", default="auto", help="of all; auto is the faster for fastcfg on this machine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "job_throughput.csv")
    options = parser.parse_args()
    report = Report(options.out, this_machine(torch.get_num_threads()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(report, Path(folder), options)
    except Error as error:
        sys.exit(f"error: {error}")


def _measure(report: Report, folder: Path, options: argparse.Namespace) -> None:
    load = psutil.getloadavg()[0]
    model = shipped_model()  # in diffusers' form: the same function for both
    fastcfg.save(model, folder / "model.safetensors")
    spec = Spec(
        checkpoint=str(folder / "model.safetensors"), scales=(SCALE,), count=options.samples, steps=STEPS, spacing="leading",
        eta=0.0, clip="keep_eps", dtype=options.dtype, unit_size=max(1, options.block // UNITS), batch=options.batch,
    )  # fmt: skip
    job = freeze(open_store(folder / "job"), spec, resolve(spec, "cpu"), None)
    sampler = job.make_sampler("cpu")
    theirs = DiffusersLoop(model, job.spec) if options.diffusers else None
    _warm_up(sampler, theirs, job)
    rates, memory = _take_turns(job, sampler, theirs, options)
    shape, dtype = f"fashion-mnist, {STEPS} steps, s = {SCALE:g}, batch {options.batch}", job.spec.dtype
    report.row("job", "load average of the machine at the start", load, "tasks", shape=shape)
    for name, found in rates.items():
        report.row("job", f"{name}, median of {len(found)} blocks", median(found), "images/s", shape=shape, dtype=dtype)
    ratios = [ours / bare for ours, bare in zip(rates["job"], rates["Sampler"], strict=True)]
    report.row("job", "job over Sampler", median(ratios), "", shape=shape, dtype=dtype)
    first = mean(rss for done, rss in memory if done <= THOUSAND)
    last = mean(rss for done, rss in memory if done > options.samples - THOUSAND)
    report.row("job", "worker's memory, first thousand", first / 2**20, "MiB", shape=shape, dtype=dtype)
    report.row("job", "worker's memory, last thousand", last / 2**20, "MiB", shape=shape, dtype=dtype, fraction=last / first)


def _take_turns(
    job: Job, sampler: fastcfg.Sampler, theirs: DiffusersLoop | None, options: argparse.Namespace
) -> tuple[dict[str, list[float]], list[tuple[int, int]]]:
    """({who: images/s of each block}, [(samples done, the worker's bytes)])."""
    rates: dict[str, list[float]] = {name: [] for name in ("job", "Sampler", *(["diffusers"] if theirs else []))}
    memory: list[tuple[int, int]] = []
    blocks = Blocks(list(all_units(job.spec)))
    block, begin = blocks.give(1), 0.0  # the worker starts in the first, which does not count
    waiting = {unit.k for unit in block}
    with closing(run_units(job, blocks, ["cpu"])) as events:  # type: ignore[type-var]
        for event in events:
            if not isinstance(event, Outcome):
                continue
            if event.status != "written":
                raise Error(f"unit {event.unit.k}: {event.status} {event.error}")
            (worker,) = psutil.Process().children()
            memory.append((event.unit.stop, worker.memory_info().rss))
            waiting.discard(event.unit.k)
            if waiting:
                continue
            if begin:
                rates["job"].append(sum(unit.size for unit in block) / (time.perf_counter() - begin))
                rates["Sampler"].append(_rate(lambda unit: compute(sampler, job.spec, unit), block[0]))
                if theirs is not None and len(rates["diffusers"]) < options.diffusers:
                    rates["diffusers"].append(_rate(theirs.sample, block[0]))
            print(f"{event.unit.stop} samples", file=sys.stderr)
            block, begin = blocks.give(UNITS), time.perf_counter()
            waiting = {unit.k for unit in block}
    return rates, memory


def _rate(call: Callable[[Unit], object], unit: Unit) -> float:
    begin = time.perf_counter()
    call(unit)
    return unit.size / (time.perf_counter() - begin)


class DiffusersLoop:
    """The loop of diffusers' DiTPipeline with its DDIM, on the same weights, labels and noise, batch by batch."""

    def __init__(self, model: Denoiser, spec: Spec):
        from diffusers import DDIMScheduler

        self.spec, self.shape, self.null = spec, model.shape, torch.as_tensor(model.null_label)
        self.classes = model.num_classes or 0
        self.dtype = DTYPES[spec.dtype]
        self.module = diffusers_twin(model).to(self.dtype)
        self.scheduler: Any = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=model.clip)

    @torch.inference_mode()
    def sample(self, unit: Unit) -> NDArray[np.uint8]:
        """The images of a unit of a job with one scale, uint8 [n, H, W, C]."""
        i = np.arange(unit.start, unit.stop)
        parts = [self._batch(i[at : at + self.spec.batch]) for at in range(0, unit.size, self.spec.batch)]
        return to_uint8(torch.cat(parts))

    def _batch(self, i: NDArray[np.int64]) -> Tensor:
        x = normal(np.full(len(i), self.spec.seed), i, INITIAL_STEP, self.shape).to(self.dtype)
        y = torch.cat([torch.from_numpy(i % self.classes), self.null.expand(len(i))])
        self.scheduler.set_timesteps(self.spec.steps)
        for t in self.scheduler.timesteps:
            output = self.module(torch.cat([x, x]), t.expand(len(y)), y).sample
            cond, null = output[:, : self.shape[0]].chunk(2)
            x = self.scheduler.step(null + SCALE * (cond - null), t, x).prev_sample
        return x


def _warm_up(sampler: fastcfg.Sampler, theirs: DiffusersLoop | None, job: Job) -> None:
    """Calls everybody once, and checks that they compute the same images."""
    unit = Unit(0, 0, min(job.spec.batch, job.spec.samples))
    ours = compute(sampler, job.spec, unit)["images"]
    if theirs is not None:
        difference = np.abs(ours.astype(int) - theirs.sample(unit)).mean()
        if difference > 2:  # of 255; with another label or other noise it is ten times as much
            raise Error(f"diffusers' images differ from ours by {difference:.2f} of 255 on average")
        print(f"mean difference from diffusers' images: {difference:.3f} of 255", file=sys.stderr)


if __name__ == "__main__":
    main()
