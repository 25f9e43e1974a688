"""Where a job's files are: a local folder, or one of an object store (`fastcfg.jobs.remote_store`).

Files appear whole or not at all.

job.json      what the job is, frozen when it began
spec.toml     the spec as it was given, for people
units/        unit-000000.safetensors, ..
damaged/      what `status --verify` set aside
claims        who computes what at the moment: a locked file, or a folder of leases in an object store
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | memoryview | mmap.mmap

FREEZING = 2**40  # the number that stands for job.json among the units' claims


class Store(Protocol):
    """The files of one job. Names are relative: "job.json", "units/unit-000000.safetensors".

    Every store can be pickled, and then serves the process that unpickles it. Claims are the process's: what claimed a
    unit and died holds it no more (local: at once; object store: after a minute).
    """

    url: str

    def names(self) -> list[str]:
        """What the folder holds at top level, [] where there is no folder."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Files in `folder` with their sizes in bytes; temporary ones are not among them."""
        ...

    def size(self, name: str) -> int | None:
        """A file's size in bytes, None where there is no such file. Raises JobError where that cannot be told."""
        ...

    def read(self, name: str) -> Buffer:
        """A file's content. Raises FileNotFoundError."""
        ...

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        """Makes or replaces a file, whole, durably. Raises JobError where it cannot be, leaving nothing new behind."""
        ...

    def set_aside(self, name: str, folder: str) -> None:
        """Moves a file into `folder`, over one of the same name. Raises JobError where it cannot be."""
        ...

    def prepare(self) -> None:
        """Makes the folder ready for writing. Raises JobError where it cannot be."""
        ...

    def clean(self) -> int:
        """Removes temporary files of unit files whose writer is gone; how many."""
        ...

    def claim(self, number: int) -> bool:
        """Whether this process now has unit `number` to itself. It has it until `release`, or its own end."""
        ...

    def release(self, number: int) -> None: ...

    def close(self) -> None:
        """Releases all that this process has claimed. The store can be used again."""
        ...

    @contextmanager
    def freezing(self) -> Iterator[None]:
        """While no other process is in here; best effort in an object store."""
        ...
