"""Measures which tiles a GPU wants, and writes the table that the kernels read (see `kernels/tuned.py`).

For each launch of a guided step of DiT-XL/2, B/2 and S/2 at 256 px in bf16, the `candidates` are compiled, all cores at once;
a launch then finds them in the compiler's cache. Those that fail a gate of the offline check (spills, shared memory, no
wgmma) are struck, and so are those that compute anything but what the default does. The rest are timed in turn with the
default, as graphs and with cold caches, at batch 32 and at batch 1.

A sample's bits may not depend on its batch, so one configuration serves all batches, or two that give the same bits: the
second is for launches that leave multiprocessors idle with the first. What counts is the geometric mean over both batches of
the time in terms of the default's: a choice is taken that gains more than 2 % by it, loses more than 2 % at neither batch,
and does so again when it is measured a second time with the default alone; a second configuration must gain as much again.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from multiprocessing.pool import AsyncResult, Pool
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton import OutOfResources

from fastcfg.kernels._launch import Grid, gpu_of, multiprocessors, offline, target_of
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


@dataclass(frozen=True)
class Tile:
    """A configuration that computes what it should. bits: equal for those with the same outputs, to the bit, in every case.

    fills: by batch, whether it has a program for each multiprocessor.
    """

    config: Config
    bits: int
    fills: tuple[bool, ...]


class Choice(NamedTuple):
    """Numbers of tiles: which is taken, and which by launches that it does not fill."""

    tile: int
    few: int


DEFAULT = Choice(0, 0)


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
    with offline(target, lambda kernel, grid, config, arguments: configs.append(config), keys.append):
        case.run()
    return (keys[0] if keys else None), {name: int(size) for name, size in configs[-1].items()}


def programs(case: Case, target: str, config: Config) -> int:
    """How many programs the case's launch has with `config`."""
    grids: list[Grid] = []
    with offline(target, lambda kernel, grid, config, arguments: grids.append(grid)):
        case.run(config)
    return math.prod(grids[-1])


def _faults(key: Key, config: Config, target: str, heads: int) -> list[str]:
    """The gates of the offline check that a configuration fails; called in a compiler's process."""
    return [fault for row in compile_entry(key, config, target, heads) for fault in row.failures]


def _tune(session: Session, launch: Launch) -> Entry | None:
    """The entry for a launch; None where the default stands."""
    tiles = _sound(session, launch)
    times = _times(session, launch, tiles)
    for tile, row in zip(tiles, times, strict=True):
        for (batch, case), own, default in zip(launch.cases.items(), row, times[0], strict=True):
            unit, shape = f"of the default's time, batch {batch}", f"{case.shape}: {_text(tile.config)}"
            session.report.row(launch.name, own[1] / default[1], unit, shape=shape, dtype=case.out.dtype, times=own)
    choice = _chosen(session, tiles, times)
    if choice != DEFAULT:
        tiles = [tiles[n] for n in dict.fromkeys((0, *choice))]
        times = _times(session, launch, tiles)
        choice = _chosen(session, tiles, times)
    if choice == DEFAULT:
        session.report.row(launch.name, "keeps its default", "note", shape=launch.key)
        return None
    found = f"takes {_text(tiles[choice.tile].config)}"
    found += f"; for few rows {_text(tiles[choice.few].config)}" if choice.few != choice.tile else ""
    session.report.row(launch.name, found, "note", shape=launch.key)
    return _entry(session, launch, tiles, choice, times)


def _sound(session: Session, launch: Launch) -> list[Tile]:
    """The default, and those that compile as they should and compute what it does; a row says why each other is struck."""
    default, *others = launch.tiles  # what the compilers hold against the default is a matter for `kernels check`
    seen = [_outputs(launch, default)]  # each outputs that differ in a bit, the default's first
    sound = [Tile(default, 0, _fills(launch, default))]
    for config, faults in zip(others, launch.faults[1:], strict=True):
        fault, outputs = _verdict(session, faults), []
        if not fault:
            try:
                outputs = _outputs(launch, config)
                fault = _difference(launch, outputs, seen[0])
            except (OutOfResources, RuntimeError) as error:
                fault = f"does not run: {(str(error).splitlines() or [''])[0]}"
        if fault:
            session.report.row(launch.name, fault, "struck", shape=_text(config))
            continue
        bits = next((n for n, known in enumerate(seen) if all(map(torch.equal, outputs, known))), len(seen))
        seen += [outputs] * (bits == len(seen))
        sound.append(Tile(config, bits, _fills(launch, config)))
    return sound


def _fills(launch: Launch, config: Config) -> tuple[bool, ...]:
    cases = launch.cases.values()
    return tuple(programs(case, target_of(case.out), config) >= multiprocessors(case.out) for case in cases)


def _verdict(session: Session, faults: AsyncResult[list[str]]) -> str:
    try:
        return "; ".join(faults.get(timeout=min(COMPILE_SECONDS, max(1.0, session.left()))))
    except multiprocessing.TimeoutError:
        return "not compiled in time"


def _outputs(launch: Launch, config: Config) -> list[Tensor]:
    """What a configuration makes of all cases."""
    return [tensor for case in launch.cases.values() for tensor in case.outputs(config)]


def _difference(launch: Launch, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """How outputs differ from those wanted, beyond what the order of a sum and one rounding can do."""
    allowed = max(2 * torch.finfo(getattr(torch, launch.key.dtype)).eps, 1e-5)
    for got, want in zip(outputs, wanted, strict=True):
        off = float((got.double() - want.double()).abs().max() / want.double().abs().max())
        if not off <= allowed:  # NaN is not
            return f"off by {off:.2g} of the largest value of {list(want.shape)}"
    return ""


def _times(session: Session, launch: Launch, tiles: Sequence[Tile]) -> list[tuple[Times, ...]]:
    """For each configuration, its times at the batches."""
    of_batches = []
    for case in launch.cases.values():
        calls = [captured(partial(case.run, tile.config), session.device) for tile in tiles]
        of_batches.append(interleaved(calls, session.device, seconds=0.5, most=100))
    return list(zip(*of_batches, strict=True))


def _chosen(session: Session, tiles: Sequence[Tile], times: Sequence[Sequence[Times]]) -> Choice:
    if session.dry:  # its times mean nothing, and something is to be written
        return Choice(len(tiles) - 1, len(tiles) - 1)
    return fastest(tiles, [[middle for _, middle, _ in row] for row in times])


def fastest(tiles: Sequence[Tile], times: Sequence[Sequence[float]]) -> Choice:
    """What to take by the tiles' times at the batches; those of the default come first, and DEFAULT is to keep it."""

    def ratios(choice: Choice) -> list[float]:
        """The times of a choice, in terms of the default's."""
        fills = tiles[choice.tile].fills
        return [times[choice.tile if fills[n] else choice.few][n] / default for n, default in enumerate(times[0])]

    def mean(choice: Choice) -> float:
        return math.prod(ratios(choice)) ** (1 / len(times[0]))

    def best(choices: Iterable[Choice], before: Choice) -> Choice:
        gaining = [one for one in choices if mean(one) < (1 - GAIN) * mean(before) and max(ratios(one)) <= 1 + GAIN]
        return min(gaining, key=mean, default=before)

    numbers = range(len(tiles))
    one = best((Choice(n, n) for n in numbers), DEFAULT)
    return best((Choice(n, few) for n in numbers for few in numbers if tiles[n].bits == tiles[few].bits), one)


def _entry(session: Session, launch: Launch, tiles: Sequence[Tile], choice: Choice, times: Sequence[Sequence[Times]]) -> Entry:
    tile, few = tiles[choice.tile], tiles[choice.few]
    ms = {}
    for n, batch in enumerate(launch.cases):
        taken = choice.tile if tile.fills[n] else choice.few
        ms[f"batch {batch}"] = [round(times[number][n][1], 5) for number in (0, taken)]
    measured = {name: session.report.machine[name] for name in ("driver", "torch", "triton", "commit")}
    measured["date"] = datetime.now(timezone.utc).date().isoformat()
    second = None if choice.few == choice.tile else few.config
    return Entry(launch.key.kernel, launch.key.dtype, dict(launch.key.shape), tile.config, second, ms, measured)


def _text(config: Config) -> str:
    return " ".join(f"{name}={size}" for name, size in config.items())
