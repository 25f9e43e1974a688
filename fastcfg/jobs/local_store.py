"""A job's files in a local folder, or one that machines share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastcfg.errors import Error
from fastcfg.files import sync_folder, temporary_path
from fastcfg.jobs.errors import JobError
from fastcfg.jobs.store import FREEZING, Buffer

_TEMPORARY = re.compile(r"\.unit-([0-9]+)\.safetensors\.[0-9a-f]{16}\.tmp")


class LocalStore:
    """A folder. Claims are POSIX locks on one byte a unit of the file `claims`: they end with their process, whatever ends
    it, and hold between machines where the shared file system has locks. Where it has none, claims are always granted: a
    unit may then be computed twice, to the same bytes."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.url = str(root)
        self._claims: int | None = None  # a file descriptor

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
        found: dict[str, int] = {}
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    # One that is gone by now, or is a link to nowhere, hides no other.
                    with contextlib.suppress(OSError):
                        if not entry.name.startswith("."):
                            found[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise JobError(f"cannot read the folder {self.root / folder}: {error.strerror}") from error
        return found

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"cannot read {self.root / name}: {error.strerror}") from error

    def read(self, name: str) -> Buffer:
        with open(self.root / name, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self.root / name
        temporary = temporary_path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
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
            sync_folder(path.parent)
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
        with contextlib.suppress(JobError):  # a network file system's; what stays claimed ends with the process
            self._lock(number, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._claims is not None:
            os.close(self._claims)  # with it go all locks
        self._claims = None

    @contextmanager
    def freezing(self) -> Iterator[None]:
        locked = self._lock(FREEZING, fcntl.LOCK_EX)
        try:
            if locked:  # nobody else writes job.json now: what is half written is a killed run's
                for path in self.root.glob(".[!.]*.tmp"):
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
        """Open once until `close`: closing any descriptor of the file would drop all its locks. A fork's locks are its own."""
        if self._claims is None:
            try:
                self._claims = os.open(self.root / "claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise JobError(f"cannot write in {self.root}: {error.strerror}") from error
        return self._claims
