"""The two measurements of a session: contenders' loops on a case, and what a small call costs beside its products."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from table import percentiles
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cpu.cases import Case
from cpu.contenders import Contender, contenders
from cpu.overhead import call_and_products
from cpu.rates import Products
from cpu.report import Report
from cpu.timing import Call, Rounds, fastest, round_robin, timed
from fastcfg.errors import Error

Key = tuple[str, str]  # contender, dtype
OURS, REFERENCE, PRODUCT = ("fastcfg", "fastcfg, engine openvino"), "fastcfg's reference engine", "matrix product"
# Of samples from the reference engine's, in norm; another label makes a difference of about 1
AGREEMENT = {"fp32": 1e-4, "bf16": 0.2, "int8": 0.2}
# OpenVINO's bf16 holds for the angles t / 10000^(i / 127) too, and around 750 its values are 4 apart
ROUNDED_ANGLES = 0.5
# Our dtype, the peer, its dtype, and how many times as fast we want to be
TARGETS = (
    ("fp32", "diffusers", "fp32", 1.5),
    ("bf16", "diffusers", "bf16", 1.5),
    ("int8", "diffusers", "bf16", 2.2),
    ("fp32", "OpenVINO", "fp32", 1.0),
    ("bf16", "OpenVINO", "bf16", 1.0),
    ("int8", "OpenVINO", "bf16", 1.4),
)


@dataclass(frozen=True)
class _Ready:
    """A contender that has run once: the option that it runs with, its samples, and the seconds of that call."""

    contender: Contender
    option: str
    call: Call
    samples: Tensor
    seconds: float

    @property
    def key(self) -> Key:
        return self.contender.name, self.contender.dtype


def loops(report: Report, case: Case, products: list[Products], rounds: Rounds, cores: int, dry: bool) -> None:
    """Everyone's time for the case, in the products' dtypes: samples compared first, then calls and matrix products in turn."""
    torch.compiler.reset()
    ready, dtypes = [], [p.dtype for p in products]
    for contender in contenders(case, cores, dry):
        if contender.dtype not in dtypes:
            continue
        try:
            ready.append(_prepare(contender, case.steps))
        except TorchDynamoException as error:  # no compiler
            report.row("note", contender.name, f"left out: {str(error).splitlines()[0]}", "note", dtype=contender.dtype)
    _compare(report, case, ready)
    taking_turns: dict[Key, Call] = {(PRODUCT, p.dtype): p.call for p in products}
    taking_turns |= {one.key: one.call for one in ready if not one.contender.once}
    seconds = round_robin(taking_turns, rounds)
    seconds |= {one.key: [one.seconds] for one in ready if one.contender.once}
    rates = {p.dtype: p.flops / statistics.median(seconds[PRODUCT, p.dtype]) for p in products}
    for p in products:
        times, shape = percentiles(seconds[PRODUCT, p.dtype]), " x ".join(map(str, p.shape))
        report.row("rate", PRODUCT, rates[p.dtype] / 1e9, f"GFLOP/s ({shape})", shape=case.title, dtype=p.dtype, times=times)
    medians = {one.key: _loop_row(report, case, one, seconds[one.key], rates) for one in ready}
    _ratios(report, case, medians)


def overhead(report: Report, case: Case, dtypes: list[str], rounds: Rounds) -> None:
    """A small call, and the products in it."""
    for dtype in dtypes:
        calls = call_and_products(case, dtype)
        for call in calls.values():
            call()
        seconds = round_robin(calls, rounds)
        whole = statistics.median(seconds["call"])
        for name, taken in seconds.items():
            times = percentiles([one / case.steps for one in taken])
            beside = 1 - statistics.median(taken) / whole
            report.row("overhead", name, beside, "of the call is outside", shape=case.title, dtype=dtype, times=times)


def _prepare(contender: Contender, steps: int) -> _Ready:
    option = fastest({name: partial(loop, 1) for name, loop in contender.options.items()})
    call = partial(contender.options[option], steps)
    return _Ready(contender, option, call, *timed(call))


def _compare(report: Report, case: Case, ready: list[_Ready]) -> None:
    """How far samples are from the reference engine's. Raises Error where that is more than the precision explains."""
    want = next(one.samples for one in ready if one.contender.name == REFERENCE)
    for one in ready:
        name, dtype = one.key
        error = ((one.samples - want).norm() / want.norm()).item()
        report.row("check", name, error, "from the reference's samples, in norm", shape=case.title, dtype=dtype)
        if not error <= (ROUNDED_ANGLES if one.key == ("OpenVINO", "bf16") else AGREEMENT[dtype]):
            raise Error(f"{case.title}: samples of {name} in {dtype} are {error:.1e} from the reference's: another function")


def _loop_row(report: Report, case: Case, one: _Ready, seconds: list[float], rates: dict[str, float]) -> float:
    """Reports a contender; its median in ms a guided step."""
    times = percentiles([taken / case.steps for taken in seconds])
    rate = case.flops / times[1] * 1e3
    name, dtype = one.key
    unit = f"GFLOP/s ({one.option})" if one.option else "GFLOP/s"
    report.row("loop", name, rate / 1e9, unit, shape=case.title, dtype=dtype, times=times, fraction=rate / rates[dtype])
    return times[1]


def _ratios(report: Report, case: Case, medians: dict[Key, float]) -> None:
    for ours in OURS:
        for dtype, peer, theirs, target in TARGETS:
            others = [ms for (name, other), ms in medians.items() if name.startswith(peer) and other == theirs]
            if others and (ours, dtype) in medians:
                ratio = min(others) / medians[ours, dtype]
                name = f"{peer} {theirs}{ours.removeprefix(OURS[0])} (target {target:g})"
                report.row("ratio", name, ratio, "times as fast", shape=case.title, dtype=dtype, fraction=ratio / target)
