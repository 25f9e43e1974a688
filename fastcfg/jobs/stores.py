"""Which store an address means."""

from __future__ import annotations

from pathlib import Path

from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.remote_store import RemoteStore
from fastcfg.jobs.store import Store


def open_store(out: str | Path) -> Store:
    """The store at a local path or at a URL that fsspec knows (s3://, gs://, ..). Nothing is read or made yet."""
    text = str(out)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text))
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    return RemoteStore(text)
