"""The one family of exceptions that fastcfg raises for what a caller can put right, and checks that many need."""

import math
import operator
from collections.abc import Iterable
from typing import Any


class Error(Exception):
    """Something asked of fastcfg cannot be done: the message says what was asked, what arrived and what would do.

    For bad input it is raised before any work starts and before any file is written. Its kinds for jobs also end work under
    way.
    """


def require(condition: bool, message: str) -> None:
    """Raises `Error(message)` unless `condition` holds. For checks whose message needs no extra work to build."""
    if not condition:
        raise Error(message)


def as_whole(value: Any) -> int | None:
    """`value` as an int if it is a whole number of any library's (one of NumPy's, a tensor without dimensions), else None."""
    if isinstance(value, bool) or getattr(value, "ndim", None) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return None


def as_number(value: Any) -> float | None:
    """`value` as a float if it is a number, but not NaN, of any library's (NumPy's, a tensor without dimensions), else None."""
    if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", None) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor without values
        return None
    return None if math.isnan(number) else number


def check_known(what: str, value: Any, known: Iterable[str], more: str = "", where: str = "") -> None:
    """Raises Error unless `value` is one of the names `known`. what: is named; more: follows the names, `where` comes first."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise Error(f"{where}unknown {what} {value!r}: known are {', '.join(known)}{more}")


def missing_extra(extra: str, purpose: str, cause: ImportError) -> Error:
    """The error for an optional dependency that is not installed; `extra` names the group that brings it."""
    return Error(f"{purpose} needs {cause.name or 'a package'}, which is not installed: pip install 'fastcfg[{extra}]'")
