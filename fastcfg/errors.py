"""The one family of exceptions that fastcfg raises for what a caller can put right, and a check that many need."""

import operator
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
    except TypeError:
        return None


def missing_extra(extra: str, purpose: str, cause: ImportError) -> Error:
    """The error for an optional dependency that is not installed; `extra` names the group that brings it."""
    return Error(f"{purpose} needs {cause.name or 'a package'}, which is not installed: pip install 'fastcfg[{extra}]'")
