"""Reading TOML, and a file of labels, so that an error can name the line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcfg.errors import Error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_text(path: str | Path) -> str:
    """The text of a TOML file. Raises Error."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Error(f"cannot read the spec {path}: {error.strerror}") from error
    except ValueError as error:
        raise Error(f"{path} is not TOML: {error}") from error


def parse_table(text: str, path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(what the text of a TOML file says, "FILE line N" for each of its top-level keys). Raises Error."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, or numbers of thousands of digits
        raise Error(f"{path} is not TOML: {error}") from error
    return data, {key: f"{path} line {line}" for key, line in key_lines(text, data).items()}


def read_labels(path: Path, where: str) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise Error(f"{where}: cannot read labels_file {path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", line, re.ASCII):
            raise Error(f"{where}: labels_file {path} line {number}: want a whole number of at least 0, got {line[:40]!r}")
    return [int(line) for line in lines]


def key_lines(text: str, data: Mapping[str, Any]) -> dict[str, int]:
    """The line, from 1, at which each top-level key of `data`, parsed from `text`, is written."""
    found: dict[str, int] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        match = re.match(r"""\s*\[{0,2}\s*(["']?)([^"'=.\]]+?)\1\s*[=.\]]""", line)
        key = match[2] if match else ""
        if key in data and key not in found and _starts_statement(lines[: number - 1]):
            found[key] = number
    return found


def _starts_statement(before: list[str]) -> bool:
    """Whether what follows these lines of TOML is a new statement, not the inside of a text or a list."""
    try:
        tomllib.loads("\n".join(before))
    except tomllib.TOMLDecodeError:
        return False
    return True
