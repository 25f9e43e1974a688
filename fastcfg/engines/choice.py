"""Choices that differ from machine to machine: measured where they are first needed, and remembered there."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastcfg.errors import Error
from fastcfg.files import replacing

SECONDS = 0.5  # of measuring, beyond the rounds that every choice gets
ROUNDS = (3, 20)  # least and most calls of each option


def fastest(question: str, options: Mapping[str, Callable[[], object]]) -> str:
    """The name of the option that runs fastest here: as remembered, else as measured now and remembered from now on.

    question: what is chosen and for what shapes; the processor and torch's version are added to it. Options are called in
    turn, so that a busy moment falls on all of them, and the shortest time of each counts. A memory that cannot be read
    or written costs a measurement, no more.
    """
    remembered = _read().get(machine(), {}).get(question)
    if isinstance(remembered, str) and remembered in options:
        return remembered
    seconds = measure(options)
    answer = min(seconds, key=seconds.__getitem__)
    _remember(question, answer)
    return answer


def measure(options: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of each option, in seconds, after one call that does not count."""
    for option in options.values():
        option()
    best = dict.fromkeys(options, float("inf"))
    begin = time.perf_counter()
    for taken in range(ROUNDS[1]):
        if taken >= ROUNDS[0] and time.perf_counter() - begin > SECONDS:
            break
        for name, option in options.items():
            start = time.perf_counter()
            option()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def machine() -> str:
    """The processor and the torch that choices hold for."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"


def cpuinfo(*names: str) -> str:
    """The first value that Linux gives the processor under one of these names; empty where there is none."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return next((value.strip() for name, _, value in lines if name.strip() in names), "")
    return ""


def memory_path() -> Path:
    """$XDG_CACHE_HOME/fastcfg/choices.json, in ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcfg" / "choices.json"


def _read() -> dict[str, dict[str, Any]]:
    """{machine: {question: answer}}, with whatever else a damaged file holds left out."""
    try:
        stored = json.loads(memory_path().read_text())
    except (OSError, ValueError, RuntimeError):  # no home folder is a RuntimeError
        return {}
    entries = stored.items() if isinstance(stored, dict) else ()
    return {machine: answers for machine, answers in entries if isinstance(answers, dict)}


def _remember(question: str, answer: str) -> None:
    memory = _read()
    memory.setdefault(machine(), {})[question] = answer
    with contextlib.suppress(OSError, RuntimeError, Error):
        path = memory_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(memory, indent=1, sort_keys=True))
