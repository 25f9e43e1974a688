"""Which store an address means."""

from __future__ import annotations

import re
from pathlib import Path

from fastcfg.errors import Error
from fastcfg.jobs.local_store import LocalStore
from fastcfg.jobs.remote_store import RemoteStore
from fastcfg.jobs.store import Store


def open_store(out: str | Path) -> Store:
    """The store at a local path or at a URL that fsspec knows (s3://, gs://, ..). Nothing is read or made yet.

    Raises Error for a URL that has lost a slash, or all that should follow them.
    """
    text = str(out)
    protocol, separator, rest = text.partition("://")
    if not separator:
        if looks_remote(text):
            fixed = text.replace(":/", "://", 1)
            raise Error(f"cannot open {text}: want a local path, or a URL with both its slashes, as text: {fixed}")
        return LocalStore(Path(text))
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    if not rest.strip("/"):
        raise Error(f"cannot open {text}: want a bucket and a folder in it, as in {protocol}://bucket/job")
    return RemoteStore(text)


def looks_remote(out: str | Path) -> bool:
    """Whether an address begins as a URL does. One slash is enough: a Path of s3://bucket is s3:/bucket."""
    return re.match(r"[a-z][a-z0-9+.-]*:/", str(out), re.IGNORECASE) is not None
