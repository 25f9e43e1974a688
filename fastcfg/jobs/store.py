"""Where a job's files are: a local folder, or (`fastcfg.jobs.remote`) one of an object store. Files appear whole or not at all.

job.json      what the job is, frozen when it began
spec.toml     the spec as it was given, for people
units/        unit-000000.safetensors, ..
damaged/      what `status --verify` set aside
claims        who computes what at the moment: a locked file, or a folder of leases in an object store
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from fastcfg.errors import Error
from fastcfg.jobs.errors import JobError

Buffer: TypeAlias = bytes | memoryview | mmap.mmap

FREEZING = 2**40  # the number that stands for job.json among the units' claims
_TEMPORARY = re.compile(r"\.unit-([0-9]+)\.safetensors\.[0-9a-f]{16}\.tmp")


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
        """A file's size in bytes, None where there is no such file."""
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
        """Releases all that this process has claimed."""
        ...

    @contextmanager
    def freezing(self) -> Iterator[None]:
        """While no other process is in here; best effort in an object store."""
        ...


def open_store(out: str | Path) -> Store:
    """The store at a local path or at a URL that fsspec knows (s3://, gs://, ..). Nothing is read or made yet."""
    text = str(out)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text))
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    from fastcfg.jobs.remote import RemoteStore  # only where it is asked for

    return RemoteStore(text)


class LocalStore:
    """A folder. Claims are POSIX locks on one byte a unit of the file `claims`: they end with their process, whatever ends
    it, and hold between machines where the shared file system has locks. Where it has none, claims are always granted: a
    unit may then be computed twice, to the same bytes."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.url = str(root)
        self._locks: tuple[int, int] | None = None  # (process, file descriptor)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        return LocalStore, (self.root,)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return []
        except PermissionError as error:
            raise JobError(f"cannot read the folder {self.root}: {error.strerror}") from error
        except OSError as error:
            raise Error(f"cannot read the folder {self.root}: {error.strerror}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            return {e.name: e.stat().st_size for e in entries if not e.name.startswith(".")}
        return {}

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> Buffer:
        with open(self.root / name, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self.root / name
        # A name of its own: machines that share the folder share process numbers too.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise JobError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def set_aside(self, name: str, folder: str) -> None:
        path = self.root / name
        try:
            (self.root / folder).mkdir(exist_ok=True)
            os.replace(path, self.root / folder / path.name)
            _sync_folder(path.parent)
        except OSError as error:
            raise JobError(f"cannot move {path} to {folder}/: {error.strerror}") from error

    def prepare(self) -> None:
        try:
            (self.root / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"cannot write in {self.root}: {error.strerror}") from error

    def clean(self) -> int:
        removed = 0
        for path in (self.root / "units").iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            # Who writes a unit's file holds its claim: what can be claimed has no writer.
            if match and self._lock(int(match[1]), fcntl.LOCK_EX | fcntl.LOCK_NB):
                try:
                    path.unlink(missing_ok=True)
                    removed += 1
                except OSError as error:
                    raise JobError(f"cannot remove {path}: {error.strerror}") from error
                finally:
                    self.release(int(match[1]))
        return removed

    def claim(self, number: int) -> bool:
        return self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False

    def release(self, number: int) -> None:
        self._lock(number, fcntl.LOCK_UN)

    def close(self) -> None:
        pass  # the locks end with the process

    @contextmanager
    def freezing(self) -> Iterator[None]:
        locked = self._lock(FREEZING, fcntl.LOCK_EX)
        try:
            if locked:  # nobody else writes job.json now: what is half written is a killed run's
                for path in self.root.glob(".*.tmp"):
                    path.unlink(missing_ok=True)
            yield
        finally:
            self.release(FREEZING)

    def _lock(self, number: int, operation: int) -> bool | None:
        """Whether it could be locked; None where this file system has no locks."""
        descriptor = self._descriptor()
        try:
            fcntl.lockf(descriptor, operation, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return None
            raise JobError(f"cannot lock {self.root / 'claims'}: {error.strerror}") from error
        return True

    def _descriptor(self) -> int:
        """Open once a process: closing any descriptor of the file would drop all its locks."""
        if self._locks is None or self._locks[0] != os.getpid():
            try:
                descriptor = os.open(self.root / "claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise JobError(f"cannot write in {self.root}: {error.strerror}") from error
            self._locks = os.getpid(), descriptor
        return self._locks[1]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
