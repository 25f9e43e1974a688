"""Measures which tiles a GPU wants, and writes the table that the kernels read (see `kernels/tuned.py`).

For each launch of a guided step of DiT-XL/2, B/2 and S/2 at 256 px in bf16, the `candidates` are compiled, all cores at once;
a launch then finds them in the compiler's cache. Those that fail a gate of the offline check (spills, shared memory, no
wgmma) are struck, and so are those that compute anything but what the default does. The rest are timed in turn with the
default, as graphs and with cold caches, at batch 32 and at batch 1.

A sample's bits may not depend on its batch, so one configuration serves all batches. What counts is the geometric mean over
both batches of the time in terms of the default's: a configuration is taken that gains more than 2 % by it, loses more than
2 % at neither batch, and does so again when it is measured a second time with the default alone.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from multiprocessing.pool import AsyncResult, Pool
from unittest import mock

import torch
from torch import Tensor
from triton import OutOfResources

from fastcfg.kernels._launch import gpu_of, offline, target_of
from fastcfg.kernels.check import compile_entry
from fastcfg.kernels.tuned import VARIABLE, Config, Entry, Key, Table, table_for, write_table
from fastcfg.models.dit import DiTConfig
from gpu.candidates import candidates
from gpu.cases import Case, cases
from gpu.correctness import TINY, config_of
from gpu.report import Session, Times, captured, interleaved

MODELS = ("DiT-XL/2", "DiT-B/2", "DiT-S/2")
BATCHES = (32, 1)
GAIN = 0.02  # what less would be is neither sure nor worth another configuration
COMPILE_SECONDS = 90.0  # the longest that compilers may take to start and to answer
DRY_LAUNCHES = ("linear fc2", "attention")


@dataclass
class Launch:
    """One launch: its case by batch, its configurations, the default first, and what the compilers hold against each."""

    name: str
    key: Key
    cases: dict[int, Case]
    tiles: list[Config]
    faults: list[AsyncResult[list[str]]]


def tune(session: Session) -> None:
    """Tunes launch by launch while there is time, and writes the table after each; entries in use stay until measured."""
    some = torch.empty(0, device=session.device)
    gpu, target = gpu_of(some), target_of(some)
    before, path = table_for(gpu), session.report.path.with_suffix(".json")
    entries = {} if before is None else {entry.key: entry for entry in before.entries}
    with _compilers(session) as pool:
        for launch in _launches(session, pool, "sm_90" if session.dry else target):
            if session.left() <= 0:
                session.report.row("tune", f"stopped before {launch.key}: out of time", "note")
                break
            entries.pop(launch.key, None)
            entry = _tune(session, launch)
            entries |= {} if entry is None else {launch.key: entry}
            write_table(path, Table(gpu, target, tuple(entries.values())))
    told = f"{len(entries)} entries in {path}: name it in {VARIABLE} to use it, move it to kernels/tables to ship it"
    session.report.row("table", told, "note")


@contextmanager
def _compilers(session: Session) -> Iterator[Pool]:
    """Processes that know nothing of this one's GPU, or of a dry run's interpreter; stopped at the end, whatever they do."""
    count = 1 if session.dry else max(1, len(os.sched_getaffinity(0)) - 1)
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        pool = multiprocessing.get_context("spawn").Pool(count)
    with pool:
        yield pool


def _launches(session: Session, pool: Pool, target: str) -> Iterator[Launch]:
    """What there is to tune, each once, model by model: all candidates of one are on their way to the compilers at once."""
    dtype, batches = (torch.float16, (2, 1)) if session.dry else (torch.bfloat16, BATCHES)
    seen: set[Key] = set()
    for config in [DiTConfig(**TINY)] if session.dry else [config_of(name) for name in MODELS]:
        found = []
        for group in zip(*(cases(config, batch, dtype, session.device) for batch in batches), strict=True):
            key, default = asked(group[0], target)
            if key is None or key in seen or (session.dry and group[0].name not in DRY_LAUNCHES):
                continue
            seen.add(key)
            tiles = [default, *candidates(key, default, target)[-2 if session.dry else 0 :]]
            faults = [pool.apply_async(_faults, (key, tile, target, config.num_heads)) for tile in tiles]
            found.append(Launch(group[0].name, key, dict(zip(batches, group, strict=True)), tiles, faults))
        yield from found


def asked(case: Case, target: str) -> tuple[Key | None, Config]:
    """What a case's launch looks up in a table (None: nothing), and the configuration that it takes without one."""
    keys: list[Key] = []
    configs: list[Config] = []
    with offline(target, lambda kernel, config, arguments: configs.append(config), keys.append):
        case.run()
    return (keys[0] if keys else None), {name: int(size) for name, size in configs[-1].items()}


def _faults(key: Key, config: Config, target: str, heads: int) -> list[str]:
    """The gates of the offline check that a configuration fails; called in a compiler's process."""
    return [fault for row in compile_entry(key, config, target, heads) for fault in row.failures]


def _tune(session: Session, launch: Launch) -> Entry | None:
    """The entry for a launch; None where the default stands."""
    tiles = _sound(session, launch)
    times = _times(session, launch, tiles)
    for tile, row in zip(tiles, times, strict=True):
        for (batch, case), own, default in zip(launch.cases.items(), row, times[0], strict=True):
            unit, shape = f"of the default's time, batch {batch}", f"{case.shape}: {_text(tile)}"
            session.report.row(launch.name, own[1] / default[1], unit, shape=shape, dtype=case.out.dtype, times=own)
    chosen = _chosen(session, times)
    if chosen:
        tiles = [tiles[0], tiles[chosen]]
        times = _times(session, launch, tiles)
        if _chosen(session, times):
            session.report.row(launch.name, f"takes {_text(tiles[1])}", "note", shape=launch.key)
            return _entry(session, launch, tiles[1], times)
    session.report.row(launch.name, "keeps its default", "note", shape=launch.key)
    return None


def _sound(session: Session, launch: Launch) -> list[Config]:
    """The default, and those that compile as they should and compute what it does; a row says why each other is struck."""
    default, *others = launch.tiles  # what the compilers hold against the default is a matter for `kernels check`
    wanted = [case.outputs(default) for case in launch.cases.values()]
    sound = [default]
    for tile, faults in zip(others, launch.faults[1:], strict=True):
        fault = _verdict(session, faults) or _difference(launch, tile, wanted)
        if fault:
            session.report.row(launch.name, fault, "struck", shape=_text(tile))
        else:
            sound.append(tile)
    return sound


def _verdict(session: Session, faults: AsyncResult[list[str]]) -> str:
    try:
        return "; ".join(faults.get(timeout=min(COMPILE_SECONDS, max(1.0, session.left()))))
    except multiprocessing.TimeoutError:
        return "not compiled in time"


def _difference(launch: Launch, tile: Config, wanted: Sequence[Sequence[Tensor]]) -> str:
    """How a configuration's outputs differ from those wanted, beyond what the order of a sum and one rounding can do."""
    allowed = max(2 * torch.finfo(getattr(torch, launch.key.dtype)).eps, 1e-5)
    try:
        for case, of_default in zip(launch.cases.values(), wanted, strict=True):
            for got, want in zip(case.outputs(tile), of_default, strict=True):
                off = float((got.double() - want.double()).abs().max() / want.double().abs().max())
                if not off <= allowed:  # NaN is not
                    return f"off by {off:.2g} of the largest value on {case.shape}"
    except (OutOfResources, RuntimeError) as error:
        return f"does not run: {(str(error).splitlines() or [''])[0]}"
    return ""


def _times(session: Session, launch: Launch, tiles: Sequence[Config]) -> list[tuple[Times, ...]]:
    """For each configuration, its times at the batches."""
    of_batches = []
    for case in launch.cases.values():
        calls = [captured(partial(case.run, tile), session.device) for tile in tiles]
        of_batches.append(interleaved(calls, session.device, seconds=0.5, most=100))
    return list(zip(*of_batches, strict=True))


def _chosen(session: Session, times: Sequence[Sequence[Times]]) -> int:
    if session.dry:  # its times mean nothing, and something is to be written
        return len(times) - 1
    return fastest([[middle for _, middle, _ in row] for row in times])


def fastest(times: Sequence[Sequence[float]]) -> int:
    """Which configuration to take by its times at the batches; those of the default come first, and 0 is to keep it."""
    ratios = [[own / default for own, default in zip(row, times[0], strict=True)] for row in times]
    means = [math.prod(row) ** (1 / len(row)) for row in ratios]
    gaining = [i for i, row in enumerate(ratios) if means[i] < 1 - GAIN and max(row) <= 1 + GAIN]
    return min(gaining, key=means.__getitem__, default=0)


def _entry(session: Session, launch: Launch, config: Config, times: Sequence[Sequence[Times]]) -> Entry:
    ms = {f"batch {batch}": [round(row[i][1], 5) for row in times] for i, batch in enumerate(launch.cases)}
    measured = {name: session.report.machine[name] for name in ("driver", "torch", "triton", "commit")}
    measured["date"] = datetime.now(timezone.utc).date().isoformat()
    return Entry(launch.key.kernel, launch.key.dtype, dict(launch.key.shape), config, ms, measured)


def _text(config: Config) -> str:
    return " ".join(f"{name}={size}" for name, size in config.items())
