"""The one family of exceptions that fastcfg raises for what a caller can put right."""


class Error(Exception):
    """Something asked of fastcfg cannot be done: the message says what was asked, what arrived and what would do.

    For bad input it is raised before any work starts and before any file is written. Its kinds for jobs also end work under
    way.
    """


def require(condition: bool, message: str) -> None:
    """Raises `Error(message)` unless `condition` holds. For checks whose message needs no extra work to build."""
    if not condition:
        raise Error(message)


def missing_extra(extra: str, purpose: str, cause: ImportError) -> Error:
    """The error for an optional dependency that is not installed; `extra` names the group that brings it."""
    return Error(f"{purpose} needs {cause.name or 'a package'}, which is not installed: pip install 'fastcfg[{extra}]'")
