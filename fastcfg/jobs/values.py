"""What the values of a spec may be: functions from (key, what was given) to the value, which raise Error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastcfg.errors import Error, as_number, as_whole
from fastcfg.guidance import Interval
from fastcfg.noise import as_seed


def _brief(value: Any) -> str:
    """`value` as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        return "a very large number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Error(f"{name} must be text, got {_brief(value)}")
    return value


def one_of(*known: Any) -> Callable[[str, Any], Any]:
    def convert(name: str, value: Any) -> Any:
        if type(value) not in {type(option) for option in known} or value not in known:
            raise Error(f"unknown {name} {_brief(value)}: known are {', '.join(map(str, known))}")
        return value

    return convert


def whole(least: int, most: int = 2**31) -> Callable[[str, Any], int]:
    def convert(name: str, value: Any) -> int:
        number = as_whole(value)
        if number is None or not least <= number <= most:
            raise Error(f"{name} must be a whole number from {least} to {most}, got {_brief(value)}")
        return number

    return convert


def number(low: float, high: float) -> Callable[[str, Any], float]:
    def convert(name: str, value: Any) -> float:
        number = as_number(value)
        if number is None or not low <= number <= high:
            raise Error(f"{name} must be a number from {low:g} to {high:g}, got {_brief(value)}")
        return number

    return convert


def optional(convert: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else convert(name, value)


def several(name: str, values: Any, convert: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise Error(f"{name} must be a list of at least one, got {_brief(values)}")
    return tuple(convert(f"{name}: each", value) for value in values)


def labels(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if value != "balanced":
            raise Error(f'{name} must be "balanced" or a list of whole numbers (or use labels_file), got {_brief(value)}')
        return value
    return several(name, value, whole(0))


def scales(name: str, value: Any) -> tuple[float, ...]:
    scales = several(name, value, number(0.0, 1e9))
    if len(set(scales)) != len(scales):
        raise Error(f"{name} must differ from one another, got {list(scales)}")
    return scales


def seed(name: str, value: Any) -> int:
    seed = as_seed(value)
    if seed is None:
        raise Error(f"{name} must be a whole number of up to 64 bits, got {_brief(value)}")
    return seed


def interval(_: str, value: Any) -> Interval | None:
    interval = Interval.parse(value)
    if interval is not None and not math.isfinite(interval.hi):
        raise Error(f"interval: bounds must be finite, got {interval.hi}")
    return interval
