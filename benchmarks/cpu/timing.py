"""Times that can be compared: contenders take turns in one process, so that whatever the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")
Call = Callable[[], object]
PAUSE = 0.05  # seconds between two: threads of the last one may still spin, waiting for more work


@dataclass(frozen=True)
class Rounds:
    """As many as `seconds` allow, but no fewer than `least` nor more than `most`."""

    seconds: float
    least: int = 5
    most: int = 25


def round_robin(calls: Mapping[Key, Call], rounds: Rounds) -> dict[Key, list[float]]:
    """Seconds of each call in each round. Every second round goes backwards, so that nobody always follows the same other.

    Calls are warm: whoever measures has called each before.
    """
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    begin = time.monotonic()
    for done in range(rounds.most):
        if done >= rounds.least and time.monotonic() - begin > rounds.seconds:
            break
        for key in list(calls)[:: -1 if done % 2 else 1]:
            time.sleep(PAUSE)
            taken[key].append(seconds_of(calls[key]))
    return taken


def seconds_of(call: Call) -> float:
    return timed(call)[1]


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returned, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def fastest(options: Mapping[Key, Call]) -> Key:
    """The option with the shortest of two times, after a call that does not count."""
    if len(options) == 1:
        return next(iter(options))
    for call in options.values():
        call()
    taken = round_robin(options, Rounds(0, least=2))
    return min(taken, key=lambda key: min(taken[key]))
