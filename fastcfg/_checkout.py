"""Finds `fastcfg.kernels` in a bare checkout, where the folder lies beside the package instead of inside it.

An installed fastcfg (wheel or editable) maps the folder by itself and never gets here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_INIT = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"


class _KernelsFinder:
    """A finder of last resort for one name."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "fastcfg.kernels" or not _INIT.is_file():
            return None
        return importlib.util.spec_from_file_location(name, _INIT, submodule_search_locations=[str(_INIT.parent)])


def register() -> None:
    if not any(isinstance(finder, type) and finder.__name__ == "_KernelsFinder" for finder in sys.meta_path):
        sys.meta_path.append(_KernelsFinder)  # type: ignore[arg-type]
